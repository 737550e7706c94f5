"""The weights of two networks side by side, b's as they lie relabelled so far: in memory, or read when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modeconn.symmetry.kinds import ORTHOGONAL_ONES
from modeconn.symmetry.spec import PermutationSpec
from modeconn.symmetry.structure import Labels, Perms, Structure

Sources = Mapping[str, Tensor]
"""By group: which unit of b lies at each place, numbered row-major; of groups that rotate, matrices."""


class Pair(Protocol):
    """Weights of a and of b by name, in at least single precision, also cut into pieces with a dimension per atom.

    Attributes:
        names: Of the weights that move.
        eps: The distance from one to the next larger number in the precision in which the networks are kept.
    """

    names: Sequence[str]
    eps: float

    def begin(self, sources: Sources) -> None:
        """Lay b's weights as ``sources`` says, which is kept up to date from now on."""
        ...

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a weight of a, and that of b as it lies."""
        ...

    def pieces(self, name: str, unturned: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the pieces of both, in the order of `Structure.pieces`; b's may be left unturned along one group."""
        ...

    def turned(self, similarity: Tensor, unturned: str) -> Tensor:
        """Return similarities of a's units to b's as these lie, from pieces that may have been left unturned."""
        ...

    def move(self, pieces: Iterable[tuple[str, int, Labels]], still: Callable[[int], bool], perms: Perms) -> None:
        """Relabel pieces of b, given by name, number and labels, before ``sources`` says so.

        Args:
            pieces: Those with units that move.
            still: Whether entries at different indices of an atom may be moved one after the other.
            perms: What is done to them where they lie.
        """
        ...


class InMemory:
    """A pair whose tensors are at hand; b's lie in a copy, which is moved."""

    def __init__(self, spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor], eps: float) -> None:
        self.names = tuple(a)
        self.eps = eps
        self._spec = spec
        self._a, self._b = a, b
        self._moved = {name: torch.empty_like(weight) for name, weight in a.items()}
        self._pieces = {name: _cut(spec, name, a[name], self._moved[name]) for name in a}

    def begin(self, sources: Sources) -> None:
        """Copy b's weights to where ``sources`` says."""
        for name, weight in self._b.items():
            perms = elements(self._spec, sources, name)
            self._moved[name].copy_(self._spec.structure.relabel(weight, self._spec.state[name], perms))
            erase_means(self._spec, name, self._moved[name])

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a weight of a, and that of b as it lies."""
        return self._a[name], self._moved[name]

    def pieces(self, name: str, unturned: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return views of both; b's lie turned."""
        return self._pieces[name]

    def turned(self, similarity: Tensor, unturned: str) -> Tensor:
        """Return them as they are: b's pieces lie turned."""
        return similarity

    def move(self, pieces: Iterable[tuple[str, int, Labels]], still: Callable[[int], bool], perms: Perms) -> None:
        """Write over b's pieces, part by part where that can be."""
        for name, number, labels in pieces:
            piece = self._pieces[name][number][1]
            apart = [dim for dim, (atom, _) in enumerate(labels) if still(atom)]
            for part in piece.split(64, apart[0]) if apart else [piece]:
                part.copy_(self._spec.structure.move_piece(part, labels, perms))


class Read:
    """A pair of which no more than one weight of each network is in memory: read, and relabelled, whenever needed.

    Args:
        spec: The groups.
        names: Of the weights that move.
        a: Returns a weight of a; all are of one precision, at least single.
        b: The same for b.
        eps: Of the precision in which they are kept.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        names: Sequence[str],
        a: Callable[[str], Tensor],
        b: Callable[[str], Tensor],
        eps: float,
    ) -> None:
        self.names = tuple(names)
        self.eps = eps
        self._spec = spec
        self._a, self._b = a, b
        self._sources: Sources = {}

    def begin(self, sources: Sources) -> None:
        """Remember where ``sources`` says how b's weights lie."""
        self._sources = sources

    def both(self, name: str, unturned: str | None = None) -> tuple[Tensor, Tensor]:
        """Read a weight of each network."""
        structure, axes = self._spec.structure, self._spec.state[name]
        perms = elements(self._spec, self._sources, name, but=unturned)
        turning = {atom: element for atom, element in perms.items() if element.is_floating_point()}
        given = self._b(name)
        b = structure.relabel(given, axes, {atom: each for atom, each in perms.items() if atom not in turning})
        b = structure.turn(b, axes, turning)  # in its own precision: it does not add up, as b is read anew each time
        b = b.contiguous()  # as a lies: products go through the parts of both in step
        if without_ones(self._spec):
            b = b.clone() if b is given else b
            erase_means(self._spec, name, b)
        return self._a(name), b

    def pieces(self, name: str, unturned: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Read a weight of each network and return the pieces, b's as they are along one group.

        A rotation of a group's similarities does what one of its weights would do, and there are more of these.
        """
        return _cut(self._spec, name, *self.both(name, unturned))

    def turned(self, similarity: Tensor, unturned: str) -> Tensor:
        """Return similarities to b's units as they lie, from those to its units as they are."""
        return (similarity.double() @ self._sources[unturned].T).to(similarity.dtype)

    def move(self, pieces: Iterable[tuple[str, int, Labels]], still: Callable[[int], bool], perms: Perms) -> None:
        """Do nothing: weights lie as the sources say when they are read."""


def elements(spec: PermutationSpec, sources: Sources, name: str, but: str | None = None) -> dict[int, Tensor]:
    """Return the elements of the groups, but one, that move a weight and do not leave their units in place, by atom."""
    moving = {atom for axis in spec.state[name] for atom in spec.structure.moving_atoms(axis)}
    found = {}
    for group in spec.groups:
        if group.atom not in moving or group.name == but:
            continue
        element = sources[group.name] if group.rotates else sources[group.name] % group.size
        still = torch.eye(group.size, dtype=element.dtype) if group.rotates else torch.arange(group.size)
        if not element.equal(still.expand(element.shape)):
            found[group.atom] = element
    return found


def moving_names(spec: PermutationSpec, names: Iterable[str]) -> list[str]:
    """Return which names are of weights that have units of some group."""
    return [n for n in names if any(spec.structure.moving_atoms(axis) for axis in spec.state.get(n, ()))]


def labels_of(spec: PermutationSpec, name: str) -> list[Labels]:
    """Return the labels of a weight's pieces."""
    sketch = torch.empty(spec.shapes[name], device="meta")
    return [labels for _, labels in spec.structure.pieces(sketch, spec.state[name])]


def without_ones(spec: PermutationSpec) -> set[int]:
    """Return the atoms whose groups keep the vector of ones."""
    return {group.atom for group in spec.groups if group.kind is ORTHOGONAL_ONES}


def erase_means(spec: PermutationSpec, name: str, weight: Tensor) -> None:
    """Take from one of b's weights what it holds along the vector of ones of a stream that layer norm reads, in place.

    Layer norm erases what writers add there, and gives nothing there to its readers: it has no part in the function,
    and none in the match. Products with a's weights lose it by what b's have lost.
    """
    erased = without_ones(spec)
    if not erased:
        return
    for piece, labels in spec.structure.pieces(weight, spec.state[name]):
        for dim, (atom, _) in enumerate(labels):
            if atom in erased:
                piece -= piece.mean(dim, keepdim=True)


def _cut(spec: PermutationSpec, name: str, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    structure: Structure = spec.structure
    cut = [[piece for piece, _ in structure.pieces(x, spec.state[name])] for x in (a, b)]
    return list(zip(*cut, strict=True))
