"""How a relabelling moves the entries of a tensor, once its axes are known in terms of atoms."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from modeconn.symmetry import axes as algebra
from modeconn.symmetry.axes import At, Axis, Families, atoms_of, expand
from modeconn.symmetry.kinds import PERMUTATION, Kind

Labels = tuple[tuple[int, int], ...]
"""For each dimension of a piece, its atom and the axis of the tensor that it came from."""

Perms = Mapping[int, Tensor]
"""``atom -> perm`` of shape ``(*sizes of its parents, n)``: destination place to source unit; absent atoms stay.

Of a group that rotates it is a matrix in double precision for each place of the parents, ``(*sizes of its parents, n,
n)``: what lies at a place is that row of the matrix times what the units of the block held that takes the place.
"""


@dataclass(frozen=True)
class Structure:
    """The atoms of a model after discovery.

    Args:
        sizes: Positions of each atom.
        parents: For each free atom, the atoms whose index its relabelling may depend on: the units of a head, one
            permutation for each head. Parents come before their children.
        families: Atoms that stand for different axes at different indices of a fixed axis.
        batch: Fixed atoms that stand for the batch, whose size is only that of the example.
        kinds: Which kind of group acts on each free atom; permutations on those that are not named.
    """

    sizes: dict[int, int]
    parents: dict[int, tuple[int, ...]]
    families: Families = field(default_factory=dict)
    batch: frozenset[int] = frozenset()
    kinds: Mapping[int, Kind] = field(default_factory=dict)

    def kind(self, atom: int) -> Kind:
        """Return which kind of group acts on a free atom."""
        return self.kinds.get(atom, PERMUTATION)

    def size(self, axis: Axis) -> int:
        """Return the number of positions of an axis."""
        return sum(prod(self.factor_size(f) for f in segment) for segment in axis)

    def factor_size(self, factor: Any) -> int:
        """Return the number of positions of one factor of a product."""
        if isinstance(factor, At):
            return factor.size
        return self.sizes[factor] if isinstance(factor, int) else self.size(factor)

    def moving_atoms(self, axis: Axis) -> set[int]:
        """Return the free atoms of an axis, with those of its families."""
        found: set[int] = set()
        for atom in atoms_of(axis):
            if atom in self.families:
                for member in self.families[atom][1]:
                    found |= self.moving_atoms(member)
            elif atom in self.parents:
                found.add(atom)
        return found

    def pieces(self, x: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, Labels]]:
        """Cut a tensor into views with one dimension per atom.

        Args:
            x: Any tensor whose shape is that of ``axes``.
            axes: One axis per dimension.

        Yields:
            ``view, ((atom, dim), ...)``: a view into ``x`` and, for each of its dimensions, the atom and the dimension
            of ``x`` that it came from. The views cover every entry of ``x`` once.
        """
        for part in expand(tuple(axes), self.families):
            yield from self._explode(x, 0, [(axis, dim) for dim, axis in enumerate(part)], ())

    def _explode(self, x: Tensor, dim: int, items: list[tuple[Any, int]], labels: Labels) -> Iterator[tuple]:
        if not items:
            yield x, labels
            return
        (what, origin), rest = items[0], items[1:]
        if isinstance(what, int):
            yield from self._explode(x, dim + 1, rest, (*labels, (what, origin)))
        elif isinstance(what, At):
            yield from self._explode(x.select(dim, what.index), dim, rest, labels)
        else:
            start, nominal = 0, self.size(what)
            for segment in what:
                sizes = [self.factor_size(factor) for factor in segment]
                length = prod(sizes) * x.shape[dim] // nominal  # differs from its size only along the batch
                sizes = [-1 if factor in self.batch else n for factor, n in zip(segment, sizes, strict=True)]
                part = x.narrow(dim, start, length)
                part = part.unflatten(dim, sizes) if sizes else part.squeeze(dim)
                yield from self._explode(part, dim, [(factor, origin) for factor in segment] + rest, labels)
                start += length

    def relabel(self, x: Tensor, axes: Sequence[Axis], perms: Perms) -> Tensor:
        """Return ``x`` with its entries moved: place ``i`` of an axis holds what unit ``perm[i]`` held.

        Rotations are computed in double precision; permutations move entries as they are, and what does not rotate
        keeps every bit: large whole numbers have more than a double holds.
        """
        matrices = {atom: g for atom, g in perms.items() if g.is_floating_point()}
        perms = {atom: perm for atom, perm in perms.items() if atom not in matrices}
        if any(self.moving_atoms(axis) & matrices.keys() for axis in axes):
            exact = torch.complex128 if x.is_complex() else torch.float64
            return self.turn(self.relabel(x, axes, perms).to(exact), axes, matrices).to(x.dtype)
        for dims in self._coupled(axes, perms):
            index = self._source_index([axes[d] for d in dims], perms).to(x.device)
            if len(dims) == 1:
                x = x.index_select(dims[0], index)
                continue
            moved = x.movedim(dims, tuple(range(len(dims))))
            picked = moved.flatten(0, len(dims) - 1).index_select(0, index)
            x = picked.view(moved.shape).movedim(tuple(range(len(dims))), dims)
        return x

    def turn(self, x: Tensor, axes: Sequence[Axis], matrices: Perms) -> Tensor:
        """Return ``x`` with units turned where they lie, in its own precision; differentiable in the matrices."""
        if not any(self.moving_atoms(axis) & matrices.keys() for axis in axes):
            return x
        return self.turn_pieces(x, axes, repeat(matrices))

    def turn_pieces(self, x: Tensor, axes: Sequence[Axis], matrices: Iterable[Perms]) -> Tensor:
        """Return ``x`` with units mapped where they lie, in each of its `pieces` by matrices of its own."""
        pieces = zip(self.pieces(x, axes), matrices, strict=False)
        parts = [self._rotate_piece(piece, labels, each) for (piece, labels), each in pieces]
        if len(parts) == 1:
            return parts[0].reshape(x.shape)
        turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for (target, _), part in zip(self.pieces(turned, axes), parts, strict=True):
            target.copy_(part)
        return turned

    def _rotate_piece(self, piece: Tensor, labels: Labels, matrices: Perms) -> Tensor:
        for dim, (atom, origin) in enumerate(labels):
            if atom not in matrices:
                continue
            chain = [*(find_label(parent, labels, origin) for parent in self.parents[atom]), dim]
            front = list(range(len(chain)))
            moved = piece.movedim(chain, front)
            matrix = matrices[atom].to(piece.device, piece.dtype)
            turned = matrix @ moved.flatten(len(chain)) if moved.dim() > len(chain) else matrix @ moved[..., None]
            piece = turned.view(moved.shape).movedim(front, chain)
        return piece

    def relabel_all(
        self, tensors: Mapping[str, Tensor], axes: Mapping[str, Sequence[Axis]], perms: Perms
    ) -> dict[str, Tensor]:
        """Return named tensors relabelled, without gradients; names that ``axes`` does not know stay."""
        return {
            name: self.relabel(tensor.detach(), axes[name], perms) if name in axes else tensor
            for name, tensor in tensors.items()
        }

    def can_place(self, axes: Sequence[Axis]) -> bool:
        """Whether a tensor says itself at which index of their parents its units are."""
        moving = {atom for axis in axes for atom in self.moving_atoms(axis)}
        return {parent for atom in moving for parent in self.parents[atom]} <= {
            atom for axis in axes for atom in self._reachable(axis)
        }

    def _coupled(self, axes: Sequence[Axis], perms: Perms) -> list[tuple[int, ...]]:
        """Return the dimensions that move, those together where one tells how another one moves."""
        moving = [self.moving_atoms(axis) & perms.keys() for axis in axes]
        groups: list[set[int]] = []
        for dim, axis in enumerate(axes):
            if not moving[dim]:
                continue
            asked = {p for atom in moving[dim] for p in self.parents[atom]}
            asked |= {self.families[atom][0] for atom in atoms_of(axis) if atom in self.families}
            asked -= set(atoms_of(axis))
            group = {dim} | {d for d, other in enumerate(axes) if d != dim and asked & self._reachable(other)}
            for touching in [g for g in groups if g & group]:
                group |= touching
                groups.remove(touching)
            groups.append(group)
        return [tuple(sorted(group)) for group in groups]

    def _reachable(self, axis: Axis) -> set[int]:
        """Return the atoms of an axis and, for families among them, those of their members."""
        found = set(atoms_of(axis))
        for family in found & self.families.keys():
            found |= {atom for member in self.families[family][1] for atom in self._reachable(member)}
        return found

    def _source_index(self, axes: Sequence[Axis], perms: Perms) -> Tensor:
        if len(axes) == 1 and axes[0] in {((atom,),) for atom in perms if not self.parents[atom]}:
            return perms[axes[0][0][0]].cpu()  # the axis consists of these units only
        shape = [self.size(axis) for axis in axes]
        places = torch.arange(prod(shape)).view(shape)
        index = torch.empty_like(places)
        for (place, labels), (target, _) in zip(self.pieces(places, axes), self.pieces(index, axes), strict=True):
            target.copy_(place[tuple(self._sources(labels, place.shape, perms))] if labels else place)
        return index.flatten()

    def unit_dims(self, labels: Labels, atoms: Container[int]) -> Iterator[list[int]]:
        """Yield, for each time a piece holds units of ``atoms``, the dimensions of their parents and their own.

        An atom that only says where another of ``atoms`` lies (the head of a unit) is part of that one's.
        """
        chains = [
            [*(find_label(parent, labels, origin) for parent in self.parents[atom]), dim]
            for dim, (atom, origin) in enumerate(labels)
            if atom in atoms
        ]
        inner = {dim for chain in chains for dim in chain[:-1]}
        yield from (chain for chain in chains if chain[-1] not in inner)

    def move_piece(self, piece: Tensor, labels: Labels, perms: Perms) -> Tensor:
        """Relabel a piece along all its dimensions, rotations in its own precision."""
        matrices = {atom: g for atom, g in perms.items() if g.is_floating_point()}
        if matrices:
            perms = {atom: perm for atom, perm in perms.items() if atom not in matrices}
            return self._rotate_piece(self.move_piece(piece, labels, perms), labels, matrices)
        sources = list(self._sources(labels, piece.shape, perms))
        moving = [dim for dim, (atom, _) in enumerate(labels) if atom in perms]
        for dim in sorted(moving, key=lambda d: len(self.parents[labels[d][0]])):  # blocks before what is inside them
            if self.parents[labels[dim][0]]:
                piece = piece.gather(dim, sources[dim].expand(piece.shape).to(piece.device))
            else:
                piece = piece.index_select(dim, sources[dim].flatten().to(piece.device))
        return piece

    def _sources(self, labels: Labels, shape: Sequence[int], perms: Perms) -> Iterable[Tensor]:
        """For each dimension of a piece, the coordinate its entries come from."""
        here = [_along(torch.arange(n), dim, len(shape)) for dim, n in enumerate(shape)]
        for dim, (atom, origin) in enumerate(labels):
            if atom not in perms:
                yield here[dim]
                continue
            where = [find_label(parent, labels, origin) for parent in self.parents[atom]]
            yield perms[atom].cpu()[(*(here[w] for w in where), here[dim])]


def _along(values: Tensor, dim: int, num_dims: int) -> Tensor:
    return values.view([-1 if d == dim else 1 for d in range(num_dims)])


def find_label(atom: int, labels: Labels, origin: int) -> int:
    """Return the dimension that holds ``atom``: in the same axis of the tensor if it is there, else in another."""
    dims = [dim for dim, label in enumerate(labels) if label == (atom, origin)]
    return dims[0] if dims else next(dim for dim, label in enumerate(labels) if label[0] == atom)


def dependencies(
    tensors: Iterable[algebra.Tensor],
    families: Families,
    free: Iterable[int],
    told: Sequence[tuple[frozenset[int], int]] = (),
) -> dict[int, set[int]]:
    """Return, for each free atom, the atoms whose index every tensor that holds it also determines.

    Args:
        tensors: All that there are.
        families: Atoms that stand for different axes at different indices.
        free: The atoms that are asked for.
        told: Fixed atoms, and another one whose index they say together, as rows do of the group that they are in.
    """
    free = set(free)
    found: dict[int, set[int]] = {}
    for tensor in tensors:
        for part in expand(tensor, families):
            for atom, determined in algebra.co_occurrences(part):
                if atom in free:
                    determined = determined | {group for rows, group in told if rows <= determined}
                    found[atom] = found[atom] & determined if atom in found else set(determined)
    return found
