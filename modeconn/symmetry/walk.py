"""What rules work with: tensors of the graph as axes, and the walk that they tell what they know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modeconn.symmetry.axes import UNIT, Axis, Space

if TYPE_CHECKING:
    from torch.fx import Node

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


class Walk(Space):
    """A space of atoms on its way through the graphs of a model, as rules see it: their first argument.

    Rules tell it what they know by the methods of `Space` and by `show` and `contract`.

    Attributes:
        shapes: The shapes of the outputs of the operator at hand.
        arguments: The arguments of the operator at hand, by their names in its schema.
        node: The operator at hand as a node of the graph; None inside of another one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.arguments: dict[str, Any] = {}
        self.node: Node | None = None
        self._shown: set[tuple[Axis, ...]] = set()
        self._seen: list[Axis] = []  # contracted, so they matter though no output has them
        self._contracted: list[list[tuple[Node, Axis]]] = []  # one list for each graph
        self._told: list[tuple[Axis, Axis, Node]] = []  # rows, the groups that they belong to, and what says to which

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shapes[0]

    def show(self, axes: Iterable[Axis]) -> None:
        """Record a tensor that an operator forms inside."""
        self._shown.add(tuple(axes))

    def contract(self, tensor: Traced, axis: Axis) -> None:
        """Record that an operator sums over ``axis``, which is an axis of ``tensor`` or part of one: a tap."""
        if axis == UNIT:
            return
        self._seen.append(axis)
        if tensor.node is not None:
            self._contracted[-1].append((tensor.node, axis))

    def tell(self, rows: Axis, groups: Axis, by: Node) -> None:
        """Learn that the values of a node say which index of the axis ``groups`` each of some rows is of: both stay.

        So what belongs to a group may be relabelled on its own though a tensor has rows in its place.
        """
        if UNIT in (rows, groups):
            return
        for axis in (rows, groups):
            self.fix(axis, "grouped by number")
        for other_rows, other_groups, other in self._told:  # what the same values say is of the same rows and groups
            if (
                other is by
                and self.size(other_groups) == self.size(groups)
                and self.size(other_rows) == self.size(rows)
            ):
                self.unify(rows, other_rows)
                self.unify(groups, other_groups)
        self._told.append((rows, groups, by))

    def values(self, tensor: Traced) -> torch.Tensor | None:
        """Return the entries of a small tensor that no weight and no input decides, None of all others."""
        return None

    def dtype(self, tensor: Traced) -> torch.dtype | None:
        """Return the type of a tensor of the graph."""
        return None if tensor.node is None else tensor.node.meta["val"].dtype
