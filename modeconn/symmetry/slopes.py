"""Which places of a group have to be mapped in opposite ways so that a function stays: found by small steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.network.copies import untied_copy
from modeconn.network.weights import named_state
from modeconn.symmetry.explore import example_for
from modeconn.symmetry.graph import Example, Graph
from modeconn.symmetry.groups import Group
from modeconn.symmetry.spec import PermutationSpec
from modeconn.symmetry.verify import check_function, in_double, redraw_folded
from modeconn.tools.rng import seeded


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
    """How the outputs of a model change, in both modes and on redrawn weights, if units of one place are mapped.

    Args:
        spec: The groups.
        model: A model of this spec.
        example: What ``model(...)`` takes; a few examples of it are used.
        generator: For the weights.

    Raises:
        ValueError: If the model is not the one that the spec was found for.
    """

    def __init__(self, spec: PermutationSpec, model: nn.Module, example: Any, generator: torch.Generator) -> None:
        model = untied_copy(model) if spec.untied else model
        spec = spec.with_traces(model, example)
        there = example_for(model, example)
        check_function(spec, model, there)
        self._spec = spec
        self._runs = [(trace.graph, self._few(trace.graph, there)) for trace in spec.traces]
        own = {name: x for name, x in named_state(spec.prepared(model))}
        wide = {id(x): in_wide(x) for x in own.values()}
        self._states = [redraw_folded(spec, model, generator), {name: wide[id(x)] for name, x in own.items()}]

    def _few(self, graph: Graph, example: Example) -> Example:
        """Return inputs in double precision, few of them: the more units a step changes, the more meet a kink."""

        def cut(leaf: Any) -> Any:
            return leaf[:_FEW] if graph.free_batch and isinstance(leaf, Tensor) and example.has_batch(leaf) else leaf

        return in_double(Example(*pytree.tree_map(cut, (example.args, example.kwargs))).to("cpu"))

    def _of(self, state: Mapping[str, Tensor], *, whole: bool = False) -> Tensor:
        """Return the outputs as one vector; those of whole numbers only if ``whole``."""
        found = [torch.zeros(0, dtype=torch.float64)]
        for graph, example in self._runs:
            with seeded(0):
                for node, value in graph.run(state, example, dtype=torch.float64):
                    if node.name not in graph.outputs or not isinstance(value, Tensor):
                        continue
                    value = torch.view_as_real(value) if value.is_complex() else value
                    if value.is_floating_point() or whole:
                        found.append(_some(value.flatten()).double())
        return torch.cat(found)

    @cached_property
    def _as_they_are(self) -> list[Tensor]:
        """The outputs on the redrawn weights and on the model's own."""
        return [self._of(state, whole=True) for state in self._states]

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
        (name, number), state = place, self._states[0]
        axes, identity = self._spec.state[name], torch.eye(group.size, dtype=torch.float64)
        both = []
        for step in (_STEP, -_STEP):
            count = sum(1 for _ in self._spec.structure.pieces(state[name], axes))
            matrices = [{group.atom: identity + step * direction} if at == number else {} for at in range(count)]
            changed = self._spec.structure.turn_pieces(state[name], axes, matrices)
            both.append(self._of({**state, **_tied(state, name, changed)}))
        return (both[0] - both[1]) / (2 * _STEP)

    def change(self, relabel: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> float:
        """Return the largest change of an output if all weights are relabelled, relative to the largest output.

        On the redrawn weights and on the model's own: bounds may be met by these alone.
        """
        worst = 0.0
        for state, before in zip(self._states, self._as_they_are, strict=True):
            moved = relabel({name: state[name] for name in self._spec.state})
            changed: dict[str, Tensor] = {}
            for name in reversed(self._spec.state):  # of a tensor of several names what the first one says
                changed |= _tied(state, name, moved[name])
            after = self._of({**state, **changed}, whole=True)
            if before.numel():
                difference, size = float((after - before).abs().max()), float(before.abs().max())
                worst = max(worst, difference / size if size else difference, key=lambda x: (x != x, x))
        return worst


def _tied(state: Mapping[str, Tensor], name: str, changed: Tensor) -> dict[str, Tensor]:
    """Return a tensor under all names that it has in a state."""
    return {other: changed for other, x in state.items() if x is state[name]}


def in_wide(x: Tensor) -> Tensor:
    """Return a parameter or buffer in double precision, one of whole numbers as it is, on the CPU."""
    x = x.detach().cpu()
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x


def _some(values: Tensor) -> Tensor:
    """Return entries from all over, as many as are enough."""
    return values[:: len(values) // _ENOUGH | 1]


def cancelling(slopes: Tensor) -> Tensor | None:
    """Return which of the slopes ``(P, outputs)`` to subtract so that nothing is left, None if there is no such way."""
    ways = torch.tensor([(False, *rest) for rest in product((False, True), repeat=len(slopes) - 1)])
    left = ((1.0 - 2.0 * ways.double()) @ slopes).norm(dim=1)
    right = (left < _NOTHING * slopes.norm()).nonzero()
    return ways[int(right[0])] if len(right) and bool(slopes.any()) else None


_STEP, _NOTHING = 1e-6, 1e-6
_MOST_PLACES, _ENOUGH, _FEW = 12, 1 << 15, 4
