"""A network as a graph: units are nodes, the weights between two of them an edge."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from modeconn.symmetry.groups import Group
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import check


class Entry(NamedTuple):
    """What networks have under one name of a parameter or floating buffer.

    Args:
        tensor: The tensor's first name: another than this one where tensors are tied.
        shape: Its shape.
        role: "norm" is a parameter of a module that has none with two axes, as norm layers have none.
    """

    tensor: str
    shape: tuple[int, ...]
    role: Literal["weight", "norm", "buffer"]

    @classmethod
    def restored(cls, tensor: str, shape: Sequence[int], role: Literal["weight", "norm", "buffer"]) -> Entry:
        """Return what a file says of one, if it can be one."""
        check("layout", [tensor, role], list[str])
        return cls(tensor, tuple(map(operator.index, shape)), role)


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a parameter or buffer along one or two axes of units; what lies along other axes are its channels.

    Args:
        name: The parameter or buffer.
        groups: Numbers of the groups of its axes: one (features of units) or two (of edges), perhaps the same twice.
        dims: Which dimensions of the tensor these axes are.
        index: Where its entries lie in a flat state, ``(n, c)`` or ``(n, m, c)``.
    """

    name: str
    groups: tuple[int, ...]
    dims: tuple[int, ...]
    index: Tensor


class UnitGraph:
    """What all networks of one spec share: where in a flat state the features of units and edges lie.

    A flat state ``(P,)`` holds the parameters and floating buffers that the spec knows, one after another. Inputs and
    outputs of the network, taps of kernels, and the pixels of a flattened channel become channels of units and edges;
    concatenated axes become several pieces; a residual stream is one group, however many parameters share it.

    Args:
        spec: The groups; none may lie in blocks.
        layout: All that the networks have, by every name; see `layout_of`.
        device: Where states are.

    Attributes:
        names: The parameters and buffers of a state, tied ones once.
        pieces: Those with units, in the order of the names.
        slices: Where each parameter or buffer lies.
        fixed: Positions of entries that no unit has.
        is_buffer: Which entries are of buffers, ``(P,)``.

    Raises:
        ValueError: If there is no group, or one that is not relabelled unit by unit: its name and why.
    """

    def __init__(
        self, spec: PermutationSpec, layout: Mapping[str, Entry], device: torch.device | str | None = None
    ) -> None:
        _check_groups(spec)
        self.spec, self.layout = spec, dict(layout)
        self.names = tuple(name for name in spec.state if name in layout and layout[name].tensor == name)
        self.slices: dict[str, slice] = {}
        self.pieces: list[Piece] = []
        start = 0
        for name in self.names:
            shape = spec.shapes[name]
            positions = torch.arange(start, start + prod(shape), device=device).view(shape)
            self.slices[name] = slice(start, start + positions.numel())
            self.pieces += _pieces(spec, name, positions)
            start += positions.numel()
        read = torch.cat([piece.index.flatten() for piece in self.pieces])
        is_fixed = torch.ones(start, dtype=torch.bool, device=device)
        is_fixed[read] = False
        self.fixed = is_fixed.nonzero()[:, 0]
        self.is_buffer = torch.zeros(start, dtype=torch.bool, device=device)
        for name, part in self.slices.items():
            self.is_buffer[part] = self.layout[name].role == "buffer"
        self._order = torch.cat([self.fixed, read]).argsort()

    def read(self, models: Sequence[nn.Module], dtype: torch.dtype | None = None) -> Tensor:
        """Return the states of networks, ``(N, P)``, in the dtype given or that of the first."""
        states: list[Tensor] = []
        for model in models:
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            state = torch.cat([tensors[name].detach().reshape(-1) for name in self.names])
            dtype = dtype or state.dtype
            states.append(state.to(device=self.fixed.device, dtype=dtype))
        return torch.stack(states)

    def named(self, states: Tensor) -> dict[str, Tensor]:
        """Return states ``(B, P)`` as named tensors ``(B, *shape)``, views."""
        return {name: states[:, part].view(-1, *self.spec.shapes[name]) for name, part in self.slices.items()}

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the squared distances between the parameters of states ``(B, P)``, ``(B,)``; buffers do not count."""
        return (a - b).masked_fill(self.is_buffer, 0).square().sum(1)

    @staticmethod
    def between(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
        """Return states on the line from a to b; what is infinite and the same in both, as in masks, stays."""
        return torch.where((a == b) & a.isinf(), a, torch.lerp(a, b, t))

    def permute(self, states: Tensor, perms: Sequence[Tensor]) -> Tensor:
        """Relabel the units of states ``(B, P)``, each state by its own ``perms``, ``(B, n)`` for each group."""
        sources = [self.fixed.expand(len(states), -1)]
        for piece in self.pieces:
            index, rows = piece.index, perms[piece.groups[0]]
            if len(piece.groups) == 1:
                moved = index[rows]
            else:
                moved = index[rows[:, :, None], perms[piece.groups[1]][:, None, :]]
            sources.append(moved.flatten(1))
        return states.gather(1, torch.cat(sources, 1)[:, self._order])

    def mix(self, states: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Relabel softly: units of states ``(B, P)`` become means by ``matrices``, ``(B, n, n)`` for each group."""
        mixed = [states[:, self.fixed]]
        for piece in self.pieces:
            moved = states[:, piece.index]
            if len(piece.groups) == 2:
                moved = torch.einsum("bjk,bikc->bijc", matrices[piece.groups[1]], moved)
            mixed.append((matrices[piece.groups[0]] @ moved.flatten(2)).flatten(1))
        return torch.cat(mixed, 1)[:, self._order]


def _pieces(spec: PermutationSpec, name: str, positions: Tensor) -> list[Piece]:
    number = {group.atom: i for i, group in enumerate(spec.groups)}
    pieces = []
    for view, labels in spec.structure.pieces(positions, spec.state[name]):
        units = [dim for dim, (atom, _) in enumerate(labels) if atom in number]
        groups = tuple(number[labels[dim][0]] for dim in units)
        if len(groups) > 2:
            raise ValueError(
                f"DeepAlign reads tensors with up to two axes of units, but {name!r} has those of groups "
                f"{', '.join(repr(spec.groups[g].name) for g in groups)}; use WeightMatching for these networks."
            )
        if groups:
            sizes = [view.shape[dim] for dim in units]
            index = view.movedim(units, tuple(range(len(units)))).reshape(*sizes, -1)
            pieces.append(Piece(name, groups, tuple(labels[dim][1] for dim in units), index))
    return pieces


def _check_groups(spec: PermutationSpec) -> None:
    if not spec.groups:
        raise ValueError("the networks have no group of units that may be relabelled, so there is nothing to align.")
    rotating = [group.name for group in spec.groups if group.rotates]
    if rotating:
        raise ValueError(
            f"DeepAlign permutes units, and this spec has {len(rotating)} groups that rotate them, such as "
            f"{rotating[0]!r}. Pass a spec of permutations: discover(..., symmetries='permutation')."
        )
    blocked = [group for group in spec.groups if group.parents]
    if not blocked:
        return
    names, others_move = _freeze(spec, blocked)
    way_out = f", or leave them fixed by a spec of discover(..., freeze={names})" if others_move else ""
    raise ValueError(
        f"DeepAlign moves units one by one, but those of group {blocked[0].name!r} lie in blocks ({blocked[0]}); use "
        f"WeightMatching or ActivationMatching{way_out}."
    )


def _freeze(spec: PermutationSpec, blocked: Sequence[Group]) -> tuple[list[str], bool]:
    """Return parameters that fix groups in blocks, and as few others as can be; and whether others then still move."""
    groups_of: dict[str, set[str]] = {}
    for group in spec.groups:
        for name, _ in group.places:
            groups_of.setdefault(name, set()).add(group.name)
    meant = {group.name for group in blocked} | {name for group in blocked for name, _ in group.parents}
    names = {
        min((name for name, _ in group.places), key=lambda name: (len(groups_of[name] - meant), name))
        for group in blocked
    }
    fixed = {group for name in names for group in groups_of[name]}
    return sorted(names), any(group.name not in fixed for group in spec.groups)


def layout_of(model: nn.Module) -> dict[str, Entry]:
    """Return what a model has under each name of a parameter or floating buffer."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: x for name, x in model.named_buffers(remove_duplicate=False) if x.is_floating_point()}
    linear = {_module_of(name) for name, x in parameters.items() if x.dim() > 1}
    first: dict[int, str] = {}
    layout = {}
    for name, tensor in {**parameters, **buffers}.items():
        role = "buffer" if name in buffers else "weight" if _module_of(name) in linear else "norm"
        layout[name] = Entry(first.setdefault(id(tensor), name), tuple(tensor.shape), role)
    return layout


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def difference(graph: UnitGraph, model: nn.Module) -> str | None:
    """Return in which parameter or buffer, and how, a model is none of this graph, or None."""
    found = layout_of(model)
    for name in [*graph.layout, *found]:
        ours, theirs = graph.layout.get(name), found.get(name)
        if ours == theirs:
            continue
        if theirs is None:
            return f"it has no {name!r}"
        if ours is None:
            return f"it has {name!r}, of shape {theirs.shape}, besides"
        if ours.shape != theirs.shape:
            return _size_difference(graph.spec, name, ours.shape, theirs.shape)
        if ours.tensor != theirs.tensor:
            return f"{name!r} is {_tied(name, theirs)}, not {_tied(name, ours)}"
        return f"{name!r} is a {theirs.role} of its module, not a {ours.role}"
    return None


def _size_difference(spec: PermutationSpec, name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> str:
    if len(found) != len(wanted):
        return f"{name!r} has shape {found}, not {wanted}"
    dim = next(dim for dim in range(len(found)) if found[dim] != wanted[dim])
    group = next((group for group in spec.groups if (name, dim) in group.places), None)
    where = f"{name!r} along axis {dim}" if group is None else f"group {group.name!r} ({name!r})"
    return f"{where} has size {found[dim]}, not {wanted[dim]}"


def _tied(name: str, entry: Entry) -> str:
    return "a tensor of its own" if entry.tensor == name else f"tied to {entry.tensor!r}"


def spec_difference(ours: PermutationSpec, theirs: Mapping[str, int]) -> str | None:
    """Return which group, by its size, is another one in ``theirs``, or None."""
    own = {group.name: group.size for group in ours.groups}
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            sizes = [f"{sizes[name]} units" if name in sizes else "none" for sizes in (theirs, own)]
            return f"group {name!r} has {sizes[0]}, not {sizes[1]}"
    return None
