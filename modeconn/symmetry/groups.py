"""The groups of units of a model that may be relabelled, read off from the axes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from modeconn.symmetry.axes import Axis
from modeconn.symmetry.kinds import ORTHOGONAL_ONES, PERMUTATION, Kind
from modeconn.symmetry.structure import Structure

NamedPerms = dict[str, Tensor]
"""By group name, on the CPU: int64 of the group's shape, unit ``perm[i]`` takes place ``i``; of a group that rotates,
float64 with one axis more, a matrix for each place of the parents."""


@dataclass(frozen=True)
class Group:
    """Units that are relabelled together.

    Args:
        name: After the first module that makes them.
        atom: Their number in the spec's structure.
        size: How many they are.
        parents: Sizes of what their relabelling may vary with, by the name of the group, or "" for a fixed axis:
            ``{"attention": 12}`` for the units of a head, of which each head has its own relabelling.
        places: Where they appear: ``(parameter or buffer, dimension)``.
        kind: Which maps of them leave the function as it is.
    """

    name: str
    atom: int
    size: int
    parents: tuple[tuple[str, int], ...]
    places: tuple[tuple[str, int], ...]
    kind: Kind = PERMUTATION

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this group's ``perm``."""
        return (*(size for _, size in self.parents), self.size)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of its relabellings; 0 of rotations, which are continuous."""
        return math.prod(self.shape[:-1]) * self.kind.log10_order(self.size)

    @property
    def dimension(self) -> int:
        """The number of directions in which a relabelling can be moved a little; 0 of permutations."""
        return math.prod(self.shape[:-1]) * self.kind.dimension(self.size)

    @property
    def rotates(self) -> bool:
        """Whether its elements are matrices, and no permutations."""
        return self.kind is not PERMUTATION

    def __str__(self) -> str:
        units = f"{self.size} {_CALLED.get(self.kind.name, 'units')}"
        return " in each of ".join([units, *(f"{n} {name or 'places'}" for name, n in self.parents)])


_CALLED = {"orthogonal": "rotated units", "orthogonal-ones": "rotated units of kept mean"}


def groups_of(structure: Structure, state: Mapping[str, tuple[Axis, ...]]) -> tuple[Group, ...]:
    """Return the groups in the order in which they first appear among a model's parameters.

    Args:
        structure: The atoms of the model.
        state: The axes of every saved parameter and floating buffer, by name.
    """
    places: dict[int, list[tuple[str, int]]] = {atom: [] for atom in structure.parents}
    for name, axes in state.items():
        for dim, axis in enumerate(axes):
            for atom in structure.moving_atoms(axis):
                places[atom].append((name, dim))
    order = {name: i for i, name in enumerate(state)}
    depth = {atom: len(parents) for atom, parents in structure.parents.items()}
    atoms = sorted(places, key=lambda a: (min((d > 0, order[name], d) for name, d in places[a]), depth[a], a))
    names = _unique_names([_module_of(places[atom]) for atom in atoms])
    by_atom = dict(zip(atoms, names, strict=True))
    return tuple(
        Group(
            name=by_atom[atom],
            atom=atom,
            size=structure.sizes[atom],
            parents=tuple((by_atom.get(p, ""), structure.sizes[p]) for p in structure.parents[atom]),
            places=tuple(places[atom]),
            kind=structure.kind(atom),
        )
        for atom in atoms
    )


def identity_perms(groups: Sequence[Group]) -> NamedPerms:
    """Return the perms that move nothing."""
    return {group.name: _identity(group) for group in groups}


def _identity(group: Group) -> Tensor:
    if group.rotates:
        matrix = torch.eye(group.size, dtype=torch.float64, device="cpu")
        return matrix.expand(*group.shape, group.size).contiguous()
    return torch.arange(group.size, device="cpu").expand(group.shape).contiguous()


def random_perms(groups: Sequence[Group], generator: torch.Generator | None = None) -> NamedPerms:
    """Return perms drawn uniformly, with a CPU ``generator``."""
    return {
        group.name: random_rotations(group, generator)
        if group.rotates
        else torch.rand(group.shape, generator=generator, dtype=torch.float64, device="cpu").argsort(-1)
        for group in groups
    }


def random_rotations(group: Group, generator: torch.Generator | None = None) -> Tensor:
    """Return one orthogonal matrix for each place of a group's parents, drawn uniformly."""
    size = group.size - (group.kind is ORTHOGONAL_ONES)
    drawn = torch.randn((*group.shape[:-1], size, size), generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(drawn)
    return on_all_units(q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :], group.kind)


def on_all_units(matrix: Tensor, kind: Kind) -> Tensor:
    """Return a map of all units from one of the directions that a kind of group moves."""
    if kind is not ORTHOGONAL_ONES:
        return matrix
    basis = without_ones(matrix.shape[-1] + 1)
    return basis @ matrix @ basis.T + 1 / len(basis)


@cache
def without_ones(size: int) -> Tensor:
    """Return an orthonormal basis of the vectors that sum to zero, ``(size, size - 1)`` in float64: Helmert's."""
    columns = torch.arange(1, size, dtype=torch.float64, device="cpu")
    rows = torch.arange(size, dtype=torch.float64, device="cpu")[:, None]
    basis = torch.where(rows < columns, 1.0, torch.where(rows == columns, -columns, 0.0))
    return basis / (columns * (columns + 1)).sqrt()


def _module_of(places: Sequence[tuple[str, int]]) -> str:
    """Name a group after the module of the first tensor that has it as its first axis, else as any."""
    name = min(places, key=lambda place: place[1] > 0)[0]
    return name.rpartition(".")[0] or name


def _unique_names(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
