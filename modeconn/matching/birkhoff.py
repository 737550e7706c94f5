"""Doubly stochastic matrices as means of permutations (Birkhoff and von Neumann), and draws from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from modeconn.matching.assignment import match_units
from modeconn.symmetry.spec import Permutation, PermutationSpec

_SMALLEST = 5e-4  # Smaller entries are ignored in a decomposition.

_Parts = list[tuple[float, Tensor]]


def decompose(matrix: Tensor, num_parts: int) -> _Parts:
    """Write a doubly stochastic matrix as a mean of permutations, greedily; return the largest, ``(weight, perm)``."""
    rest, parts = matrix.clone(), []
    while len(parts) < 4 * num_parts:
        perm = match_units(torch.where(rest > _SMALLEST, rest, 0.0))
        weight = float(rest.gather(1, perm[:, None]).min())
        if weight <= _SMALLEST:
            break
        rest.scatter_add_(1, perm[:, None], torch.full((len(perm), 1), -weight, dtype=rest.dtype))
        parts.append((weight, perm))
    if not parts:
        parts = [(1.0, match_units(matrix))]
    return sorted(parts, key=lambda part: -part[0])[:num_parts]


def draws(
    spec: PermutationSpec, matrices: Mapping[str, Tensor], num_parts: int, generator: torch.Generator
) -> Iterator[Permutation]:
    """Yield permutations without end, each group drawn by itself from the largest parts of its matrices.

    Args:
        spec: The groups.
        matrices: By group name, doubly stochastic ``(n, n)``, rows for places; of units that lie in blocks
            ``(*blocks, *blocks, n, n)``, see `modeconn.SoftPermutation`.
        num_parts: Parts of each decomposition to draw from, by their weights.
        generator: What draws.
    """
    parts = {name: _decompose_all(m.detach().double().cpu(), num_parts) for name, m in matrices.items()}
    while True:
        yield _draw(spec, parts, generator)


def _decompose_all(matrices: Tensor, num_parts: int) -> dict[tuple[int, ...], _Parts]:
    """Decompose each matrix of a group, by place and source of the blocks around it."""
    blocks = matrices.shape[:-2]
    return {index: decompose(matrices[index], num_parts) for index in product(*map(range, blocks))}


def _draw(
    spec: PermutationSpec, parts: Mapping[str, Mapping[tuple[int, ...], _Parts]], generator: torch.Generator
) -> Permutation:
    """Draw the relabelling of each group by itself; of units inside a block, given the block that takes the place."""
    perms: dict[str, Tensor] = {}
    for group in sorted(spec.groups, key=lambda g: len(g.parents)):
        parents = spec.structure.parents[group.atom]
        by_atom = {g.atom: g.name for g in spec.groups}
        perm = torch.empty(group.shape, dtype=torch.int64)
        for place in product(*map(range, group.shape[:-1])):
            where = dict(zip(parents, place, strict=True))
            source = tuple(
                int(perms[by_atom[atom]][(*(where[p] for p in spec.structure.parents[atom]), where[atom])])
                if atom in by_atom
                else where[atom]
                for atom in parents
            )
            choices = parts[group.name][(*place, *source)]
            weights = torch.tensor([weight for weight, _ in choices])
            perm[place] = choices[int(torch.multinomial(weights, 1, generator=generator))][1]
        perms[group.name] = perm
    return Permutation(spec, perms)
