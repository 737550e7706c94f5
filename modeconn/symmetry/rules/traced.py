"""What rules work with: tensors of the graph as axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeconn.symmetry.axes import Axis

aten = torch.ops.aten

Rule = Callable[..., Any]
"""``rule(walk, *args, **kwargs)``, see `modeconn.symmetry.rules`."""


@dataclass(frozen=True)
class Traced:
    """A tensor of the graph.

    Args:
        axes: One axis per dimension.
        node: The graph node that made it.
        points_into: For a tensor of positions (argmax), the axis they count: whoever reads them fixes it.
    """

    axes: tuple[Axis, ...]
    node: Any = None
    points_into: Axis | None = None

    def without(self, *dims: int) -> list[Axis]:
        """Return the axes but for some dimensions."""
        drop = {dim % len(self.axes) for dim in dims}
        return [axis for dim, axis in enumerate(self.axes) if dim not in drop]

    def replace(self, changes: dict[int, Axis]) -> list[Axis]:
        """Return the axes with some dimensions exchanged."""
        changes = {dim % len(self.axes): axis for dim, axis in changes.items()}
        return [changes.get(dim, axis) for dim, axis in enumerate(self.axes)]


def traced_in(values: Any) -> list[Traced]:
    """Return every tensor in nested arguments."""
    if isinstance(values, Traced):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return [t for v in values for t in traced_in(v)] if isinstance(values, (list, tuple, type({}.values()))) else []


def table(names: dict[Rule, str]) -> dict[Any, Rule]:
    """Return the rules by operator, of the operators with these names that this torch has."""
    return {getattr(aten, name): rule for rule, text in names.items() for name in text.split() if hasattr(aten, name)}
