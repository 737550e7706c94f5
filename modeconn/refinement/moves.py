"""Small relabellings of b: the cycles of a larger one, and exchanges of two units or blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor

from modeconn.matching.assignment import match_tree
from modeconn.symmetry.groups import identity_perms
from modeconn.symmetry.spec import Group, Orthogonal, Permutation, PermutationSpec


@dataclass(frozen=True, eq=False)
class Move:
    """A relabelling of a few units, relative to how b lies now.

    Args:
        spec: The groups.
        perms: By group name; groups left out stay.
        gain: By how much the loss would fall if it were linear; an estimate where a weight holds units of the tree
            twice (from the hidden state to itself, the channels of one convolution group).
    """

    spec: PermutationSpec
    perms: Mapping[str, Tensor]
    gain: float

    @property
    def key(self) -> tuple[tuple[str, bytes], ...]:
        """What tells two moves apart."""
        return tuple((name, perm.numpy().tobytes()) for name, perm in sorted(self.perms.items()))

    @cached_property
    def permutation(self) -> Permutation | Orthogonal:
        """The move as a relabelling of all groups."""
        return self.spec.relabelling({**self.spec.identity().tensors(), **self.perms})

    @cached_property
    def places(self) -> frozenset[tuple[str, int]]:
        """Where units change, those inside blocks included: a group and the row-major number of a unit in it."""
        found: set[tuple[str, int]] = set()
        for group in self.spec.groups:
            if group.rotates:
                continue
            if any(name in self.perms for name, _ in group.parents):
                moved = self.permutation.sources(group.name) != torch.arange(prod(group.shape))
            elif group.name in self.perms:
                moved = (self.perms[group.name] != torch.arange(group.size)).flatten()
            else:
                continue
            found |= {(group.name, place) for place in moved.nonzero().flatten().tolist()}
        return frozenset(found)

    def apply(self, theta_b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of b's parameters that change, relabelled."""
        structure, groups = self.spec.structure, [self.spec[name] for name in self.perms]
        perms = {group.atom: self.perms[group.name] for group in groups}
        names = parameters_of(self.spec, groups, theta_b)
        return {name: structure.relabel(theta_b[name], self.spec.state[name], perms) for name in names}


def linear_costs(
    spec: PermutationSpec, tree: Sequence[Group], gradient: Mapping[str, Tensor], theta_b: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    r"""Return by group :math:`G` of shape ``(N, N)``, with :math:`G_{ij}` what unit j of b costs at place i.

    To first order a move :math:`\pi` changes the loss by :math:`\sum_i G_{i \pi(i)} - G_{ii}`: the gradient with
    respect to the relabelled b, contracted with b over every axis but that of the group.

    Args:
        spec: The groups.
        tree: Groups that are moved together.
        gradient: By parameter, with respect to the relabelled b.
        theta_b: The relabelled b, by parameter.
    """
    structure, names = spec.structure, {group.atom: group.name for group in tree}
    costs: dict[str, Tensor] = {}
    for name in parameters_of(spec, tree, theta_b):
        axes = spec.state[name]
        pieces = zip(structure.pieces(gradient[name], axes), structure.pieces(theta_b[name], axes), strict=True)
        for (slope, labels), (weight, _) in pieces:
            for dims in structure.unit_dims(labels, names):
                units = prod(slope.shape[dim] for dim in dims)
                front = list(range(len(dims)))
                x, y = (part.movedim(dims, front).reshape(units, -1) for part in (slope, weight))
                group = names[labels[dims[-1]][0]]
                costs[group] = costs[group].addmm_(x, y.T) if group in costs else x @ y.T
    return {name: cost.double().cpu() for name, cost in costs.items()}


def parameters_of(spec: PermutationSpec, tree: Sequence[Group], names: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters among ``names`` that hold units of a tree."""
    atoms = {group.atom for group in tree}
    return [
        name for name in names if any(spec.structure.moving_atoms(axis) & atoms for axis in spec.state.get(name, ()))
    ]


def proximal_proposals(
    tree: Sequence[Group], costs: Mapping[str, Tensor], weights: Sequence[float]
) -> Iterator[dict[str, Tensor]]:
    r"""Yield the minimisers of :math:`\langle G, P \rangle + \tfrac{1}{2 \nu} \lVert P - I \rVert^2`.

    Since :math:`\lVert P - I \rVert^2 = 2 n - 2 \operatorname{tr} P`, each is one assignment.

    Args:
        tree: Groups that are moved together.
        costs: From `linear_costs`.
        weights: Values of :math:`1 / \nu`, in units of the largest entry of :math:`G`.
    """
    for weight in weights:
        similarities = {}
        for name, cost in costs.items():
            stay = weight * float(cost.abs().max())
            similarities[name] = torch.diag(torch.full((len(cost),), stay, dtype=cost.dtype)) - cost
        yield match_tree(list(tree), similarities)


def gain(
    spec: PermutationSpec, tree: Sequence[Group], perms: Mapping[str, Tensor], costs: Mapping[str, Tensor]
) -> float:
    """Return by how much a linear loss falls when some groups of a tree are relabelled; others stay.

    Of groups that rotate nothing is counted.
    """
    permutation = spec.relabelling({**spec.identity().tensors(), **perms})
    total = 0.0
    for group in tree:
        if group.name in costs and not group.rotates:
            cost, sources = costs[group.name], permutation.sources(group.name)
            total += float((cost.diagonal() - cost.gather(1, sources[:, None])[:, 0]).sum())
    return total


def cycles(
    spec: PermutationSpec, tree: Sequence[Group], perms: Mapping[str, Tensor], costs: Mapping[str, Tensor]
) -> Iterator[Move]:
    """Split a relabelling of a tree into the parts that can be made one by one.

    A part is a cycle of units, or of blocks with everything inside them. Turns of units alone are left out.
    """
    taken: set[tuple[str, tuple[int, ...]]] = set()  # Rows of perms that move together with a cycle of their blocks.
    for group in sorted((g for g in tree if not g.rotates), key=lambda g: len(g.parents)):
        perm, cost = perms[group.name], costs.get(group.name)
        falls = [0.0] * prod(group.shape) if cost is None else _falls(group, perm, cost)
        for number, row in enumerate(product(*map(range, group.shape[:-1]))):
            if (group.name, row) in taken:
                continue
            for cycle in _cycles(perm[row]):
                part = identity_perms([group])
                part[group.name][row][cycle] = perm[row][cycle]
                inside = list(_rows_inside(spec, tree, group, row, cycle))
                if not inside:
                    yield Move(spec, part, sum(falls[number * group.size + place] for place in cycle))
                    continue
                for inner, place in inside:
                    taken.add((inner.name, place))
                    part.setdefault(inner.name, identity_perms([inner])[inner.name])
                    part[inner.name][place] = perms[inner.name][place]
                yield Move(spec, part, gain(spec, tree, part, costs))


def _falls(group: Group, perm: Tensor, cost: Tensor) -> list[float]:
    """Return by how much a linear loss falls at each place if its new unit comes there, and blocks stay."""
    blocks = torch.arange(len(cost)) // group.size * group.size
    sources = perm.flatten() + blocks
    return (cost.diagonal() - cost.gather(1, sources[:, None])[:, 0]).tolist()


def _cycles(perm: Tensor) -> Iterator[list[int]]:
    """Yield the cycles of a permutation, without fixed points."""
    sources, seen = perm.tolist(), set()
    for start in range(len(sources)):
        cycle, place = [], start
        while place not in seen:
            seen.add(place)
            cycle.append(place)
            place = sources[place]
        if len(cycle) > 1:
            yield cycle


def _rows_inside(
    spec: PermutationSpec, tree: Sequence[Group], block: Group, row: tuple[int, ...], places: Sequence[int]
) -> Iterator[tuple[Group, tuple[int, ...]]]:
    """Yield the rows of perms of what lies inside some blocks of a group."""
    above = spec.structure.parents[block.atom]
    for group in tree:
        parents = spec.structure.parents[group.atom]
        if block.atom not in parents:
            continue
        for place in product(*map(range, group.shape[:-1])):
            where = dict(zip(parents, place, strict=True))
            if where[block.atom] in places and tuple(where[atom] for atom in above) == row:
                yield group, place


def exchanges(spec: PermutationSpec, tree: Sequence[Group], costs: Mapping[str, Tensor], count: int) -> Iterator[Move]:
    """Yield the exchanges of two units, or of two blocks as they are, that promise most: at most ``count`` a group."""
    for group in tree:
        if group.rotates:
            continue
        cost = _with_insides(spec, tree, group, costs)
        own = cost.diagonal()
        gains = own[:, None] + own[None, :] - cost - cost.T
        block = torch.arange(len(cost)) // group.size
        gains = torch.where((block[:, None] == block[None, :]).triu(1), gains, -torch.inf).flatten()
        best = gains.topk(min(count, len(gains)))
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value == -math.inf:
                break
            i, j = divmod(index, len(cost))
            perm = torch.arange(group.size).repeat(len(cost) // group.size)
            perm[i], perm[j] = j % group.size, i % group.size
            yield Move(spec, {group.name: perm.view(group.shape)}, value)


def _with_insides(spec: PermutationSpec, tree: Sequence[Group], group: Group, costs: Mapping[str, Tensor]) -> Tensor:
    """Return what a unit of a group costs at each place, with all that lies inside it if it is a block."""
    atoms = (*spec.structure.parents[group.atom], group.atom)
    count = prod(group.shape)
    total = torch.zeros(count, count, dtype=torch.float64)
    for other in tree:
        if other.name not in costs:
            continue
        theirs = (*spec.structure.parents[other.atom], other.atom)
        if set(atoms) <= set(theirs):
            front = [theirs.index(atom) for atom in atoms]
            cost = costs[other.name].view(*other.shape, *other.shape)
            cost = cost.movedim([*front, *(len(theirs) + d for d in front)], list(range(2 * len(front))))
            cost = cost.reshape(count, count, prod(other.shape) // count, -1)
            total += cost.diagonal(dim1=2, dim2=3).sum(-1)
    return total
