"""Soft permutations: doubly stochastic matrices in place of permutation matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.matching.assignment import match_groups
from modeconn.matching.birkhoff import draws
from modeconn.symmetry.groups import Group
from modeconn.symmetry.relabelling import relabelled_copy
from modeconn.symmetry.spec import Permutation, PermutationSpec
from modeconn.symmetry.structure import Labels, find_label
from modeconn.tools.door import check, check_settings, checked
from modeconn.tools.shown import Shown

_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class SoftPermutation(Shown):
    r"""One doubly stochastic matrix per group of a spec: place i holds a mean of the units of b, weighted by row i.

    Units that lie in blocks (the units of a head) have one matrix for each pair of a place and a source of the block:
    with :math:`S` the matrix of the heads and :math:`T_{h h'}` those inside them, unit :math:`j` of head :math:`h'` has
    weight :math:`S_{h h'} T_{h h', i j}` at place :math:`i` of head :math:`h`, which is doubly stochastic again.
    A hard permutation is the case of matrices of 0 and 1, see `of`.

    Args:
        spec: The groups.
        matrices: By group name, floating, ``(n, n)``, rows for places of a, columns for units of b; with parents
            ``(*parent sizes, *parent sizes, n, n)``, places of the parents, then their sources.

    Raises:
        ValueError: If a group is missing or unknown, or its matrices have another shape or are not doubly stochastic.

    Example:
        >>> from modeconn import discover, models
        >>> spec = discover(models.mlp(4, (2,), 3))
        >>> SoftPermutation(spec, {"layers.0": torch.tensor([[0.2, 0.8], [0.8, 0.2]])}).round().perms
        {'layers.0': tensor([1, 0])}
    """

    spec: PermutationSpec
    matrices: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_settings(self)
        odd = sorted({group.name for group in self.spec.groups} ^ self.matrices.keys())
        if odd:
            problem = "is no group of this spec" if odd[0] in self.matrices else "is missing from the soft permutation"
            raise ValueError(f"group '{odd[0]}' {problem}.")
        for group in self.spec.groups:
            check(f"matrices[{group.name!r}]", self.matrices[group.name], Tensor)
            _check_matrices(group, self.matrices[group.name])

    @classmethod
    def of(cls, permutation: Permutation) -> SoftPermutation:
        """Return a hard permutation as matrices of 0 and 1; relabelling with them is exact."""
        perms = permutation.perms
        return cls(permutation.spec, {g.name: hard_matrices(g, perms[g.name]) for g in permutation.spec.groups})

    def round(self) -> Permutation:
        """Return the permutation of largest total weight, by assignment; blocks with what is inside them."""
        return match_groups(self.spec, {g.name: self.matrix(g.name).detach() for g in self.spec.groups})

    @checked
    def sample(self, num_samples: int = 1, *, num_parts: int = 11, seed: int = 0) -> list[Permutation]:
        """Draw permutations, of which this is nearly the mean.

        The matrices of each group are decomposed into permutations (Birkhoff and von Neumann), greedily, from the
        largest weight on; what is drawn are parts by their weights, for each group by itself.

        Args:
            num_samples: How many permutations, at least 1.
            num_parts: How many parts of each decomposition are drawn from, the largest ones; at least 1. The more, the
                closer is the mean.
            seed: Of the draws.

        Returns:
            The permutations, independent of each other; the first k are those of ``num_samples=k``.

        Raises:
            ValueError: If a number is below 1, or the seed is none of 0 to 2**63 - 1.

        Example:
            >>> from modeconn import discover, models
            >>> spec = discover(models.mlp(4, (2,), 3))
            >>> even = SoftPermutation(spec, {"layers.0": torch.full((2, 2), 0.5)})
            >>> len({tuple(one.perms["layers.0"].tolist()) for one in even.sample(20)})
            2
        """
        for name, value in (("num_samples", num_samples), ("num_parts", num_parts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={value}.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, got seed={seed}.")
        drawn = draws(self.spec, self.matrices, num_parts, torch.Generator().manual_seed(seed))
        return list(islice(drawn, num_samples))

    def matrix(self, name: str) -> Tensor:
        """Return the weight of every unit of a group at every place, ``(N, N)``, blocks and units inside row-major."""
        group = self.spec[name]
        atoms = [*self.spec.structure.parents[group.atom], group.atom]
        factors = self._factors([(atom, 0) for atom in atoms], range(len(atoms)), self.matrices[name])
        count = math.prod(group.shape)
        return torch.einsum(*factors, list(range(2 * len(atoms)))).reshape(count, count)

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a copy of ``model`` whose units are the weighted means, its own function no longer.

        Parameters and saved floating buffers are mixed; running statistics of norm layers are then only a first guess.

        Raises:
            ValueError: If the model is not of this spec.
        """
        return relabelled_copy(self.spec, model, self.relabel)

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers with their units mixed; names that the spec does not know stay.

        Differentiable in the tensors and in the matrices.
        """
        return {name: self._relabel(name, x) if name in self.spec.state else x for name, x in tensors.items()}

    def _relabel(self, name: str, x: Tensor) -> Tensor:
        structure, axes = self.spec.structure, self.spec.state[name]
        mixed = [self._mix(view, labels) for view, labels in structure.pieces(x, axes)]
        if len(mixed) == 1:
            return mixed[0].reshape(x.shape)
        result = torch.empty_like(x)
        for (view, _), part in zip(structure.pieces(result, axes), mixed, strict=True):
            view.copy_(part)
        return result

    def _mix(self, piece: Tensor, labels: Labels) -> Tensor:
        """Mix a piece along all dimensions that move, those together whose weights depend on each other."""
        for dims in self._coupled(labels):
            sources = [piece.dim() + dim if dim in dims else dim for dim in range(piece.dim())]
            factors = self._factors(labels, dims, piece)
            piece = torch.einsum(*factors, piece, sources, list(range(piece.dim())))
        return piece

    def _coupled(self, labels: Labels) -> list[set[int]]:
        clusters: list[set[int]] = []
        for dim, (atom, origin) in enumerate(labels):
            if atom in self.spec.structure.parents:
                cluster = {dim, *self._parent_dims(atom, labels, origin)}
                for touching in [c for c in clusters if c & cluster]:
                    cluster |= touching
                    clusters.remove(touching)
                clusters.append(cluster)
        return clusters

    def _factors(
        self, labels: Sequence[tuple[int, int]], dims: Iterable[int], like: Tensor
    ) -> list[Tensor | list[int]]:
        """Return for each dimension its matrices and their axes for einsum: d for a place, d + len(labels) a source."""
        groups = {group.atom: group.name for group in self.spec.groups}
        factors: list[Tensor | list[int]] = []
        for dim in sorted(dims):
            atom, origin = labels[dim]
            parents = self._parent_dims(atom, labels, origin) if atom in groups else []
            size = self.spec.structure.sizes[atom]
            matrix = self.matrices[groups[atom]] if atom in groups else torch.eye(size, device="cpu")
            sources = [len(labels) + d for d in (*parents, dim)]
            factors += [matrix.to(like), [*parents, *sources[:-1], dim, sources[-1]]]
        return factors

    def _parent_dims(self, atom: int, labels: Sequence[tuple[int, int]], origin: int) -> list[int]:
        return [find_label(parent, tuple(labels), origin) for parent in self.spec.structure.parents[atom]]

    def __repr__(self) -> str:
        groups = f"{len(self.matrices)} group{'s' * (len(self.matrices) != 1)}"
        return f"SoftPermutation({groups}, {self.spec.num_units:,} units)"


def shape_of(group: Group) -> tuple[int, ...]:
    """Return the shape of a group's matrices: ``(*parent sizes, *parent sizes, n, n)``."""
    blocks = group.shape[:-1]
    return (*blocks, *blocks, group.size, group.size)


def hard_matrices(group: Group, perm: Tensor) -> Tensor:
    """Return a group's ``perm`` as matrices of 0 and 1, those inside a block the same for every source of the block."""
    hard = F.one_hot(perm, group.size).to(torch.get_default_dtype())
    return hard.view(*perm.shape[:-1], *[1] * len(group.parents), group.size, group.size).expand(shape_of(group))


def _check_matrices(group: Group, matrices: Tensor) -> None:
    if tuple(matrices.shape) != shape_of(group):
        raise ValueError(
            f"the soft permutation of group '{group.name}' must have shape {shape_of(group)}, "
            f"got {tuple(matrices.shape)}."
        )
    values = matrices.detach()
    off = max(float((values.sum(dim) - 1).abs().max()) for dim in (-1, -2))
    if not (off <= _TOLERANCE and float(values.min()) >= 0):  # a comparison that is False for NaN, which is refused
        raise ValueError(
            f"the soft permutation of group '{group.name}' must be doubly stochastic: entries of at least 0 (the "
            f"smallest is {float(values.min()):.3g}), rows and columns that sum to 1 (the worst is off by {off:.3g})."
        )
