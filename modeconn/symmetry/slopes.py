"""Which places of a group have to be mapped in opposite ways so that a function stays: found by small steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.copies import untied_copy
from modeconn.symmetry.graph import Example
from modeconn.symmetry.groups import Group
from modeconn.symmetry.spec import PermutationSpec
from modeconn.symmetry.verify import in_double, redraw_folded


def places(spec: PermutationSpec, group: Group) -> list[tuple[str, int]]:
    """Return where units of a group lie: parameters by name, and which piece of each; tensors of several names once."""
    others = {name for names in spec.tied or () if not spec.untied for name in names[1:]}
    return [
        (name, number)
        for name, axes in spec.state.items()
        if name not in others
        for number, (_, labels) in enumerate(spec.structure.pieces(shaped(spec, name), axes))
        for atom, _ in labels
        if atom == group.atom
    ]


def shaped(spec: PermutationSpec, name: str) -> Tensor:
    """Return a tensor without entries of the shape of a parameter."""
    return torch.empty(spec.shapes[name], device="meta")


class SlopesOfOutputs:
    """How the outputs of a model change, in eval mode and on redrawn weights, if units of one place are mapped.

    Args:
        spec: The groups.
        model: A model of this spec.
        example: What ``model(...)`` takes.
        generator: For the weights.
    """

    def __init__(self, spec: PermutationSpec, model: nn.Module, example: Any, generator: torch.Generator) -> None:
        spec = spec.with_traces(model, example)
        self._spec, self._graph = spec, spec.traces[0].graph
        self._example = in_double(Example.of(example).to("cpu"))
        self._state = redraw_folded(spec, untied_copy(model) if spec.untied else model, generator)

    def _of(self, state: Mapping[str, Tensor]) -> Tensor:
        named = self._graph.outputs
        found = [
            _some(value.flatten()).clone()
            for node, value in self._graph.run(state, self._example, dtype=torch.float64)
            if node.name in named and isinstance(value, Tensor) and value.is_floating_point()
        ]
        return torch.cat(found or [torch.zeros(0, dtype=torch.float64)])

    def signs(self, group: Group, direction: Tensor) -> Tensor | None:
        """Return which places of a group have to be mapped the other way so that nothing changes.

        Args:
            group: The group.
            direction: Symmetric ``(*parent sizes, n, n)``: where units are mapped by ``1 + e direction``.

        Returns:
            Bool ``(P,)``, for each of its `places`; None if there is no such way, or no place changes anything.
        """
        at = places(self._spec, group)
        if not 2 <= len(at) <= _MOST_PLACES or len(set(at)) < len(at):  # a piece with the units twice
            return None
        return cancelling(torch.stack([self._slope(group, place, direction) for place in at]))

    def _slope(self, group: Group, place: tuple[str, int], direction: Tensor) -> Tensor:
        """Return how the outputs change if the units in one place of a group are mapped in a direction."""
        (name, number), axes = place, self._spec.state[place[0]]
        identity = torch.eye(group.size, dtype=torch.float64)
        both = []
        for step in (_STEP, -_STEP):
            count = sum(1 for _ in self._spec.structure.pieces(self._state[name], axes))
            matrices = [{group.atom: identity + step * direction} if at == number else {} for at in range(count)]
            changed = self._spec.structure.turn_pieces(self._state[name], axes, matrices)
            both.append(self._of({**self._state, **self._tied(name, changed)}))
        return (both[0] - both[1]) / (2 * _STEP)

    def _tied(self, name: str, changed: Tensor) -> dict[str, Tensor]:
        """Return a tensor under all names that it has."""
        return {other: changed for other, x in self._state.items() if x is self._state[name]}

    def change(self, relabel: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> float:
        """Return the largest change of an output if all weights are relabelled, in standard deviations of all."""
        before = self._of(self._state)
        moved = relabel({name: self._state[name] for name in self._spec.state})
        changed: dict[str, Tensor] = {}
        for name in reversed(self._spec.state):  # of a tensor of several names what the first one says
            changed |= self._tied(name, moved[name])
        after = self._of({**self._state, **changed})
        return float((after - before).abs().max() / before.std())


def _some(values: Tensor) -> Tensor:
    """Return entries from all over, as many as are enough."""
    return values[:: len(values) // _ENOUGH | 1]


def cancelling(slopes: Tensor) -> Tensor | None:
    """Return which of the slopes ``(P, outputs)`` to subtract so that nothing is left, None if there is no such way."""
    ways = torch.tensor([(False, *rest) for rest in product((False, True), repeat=len(slopes) - 1)])
    left = ((1.0 - 2.0 * ways.double()) @ slopes).norm(dim=1)
    right = (left < _NOTHING * slopes.norm()).nonzero()
    return ways[int(right[0])] if len(right) and bool(slopes.any()) else None


_STEP, _NOTHING = 1e-5, 1e-6
_MOST_PLACES, _ENOUGH = 12, 1 << 15
