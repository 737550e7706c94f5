"""Groups of many blocks, such as experts of a mixture: blocks are paired first, then units inside of each pair.

The similarities of all units with all are N^2 numbers for N units in all blocks. Inside of a pair of blocks they are
n^2, and which blocks belong together shows without them: the Gram matrix of a block's weights is the same whatever its
units are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.matching.assignment import match_units
from modeconn.matching.procrustes import best_rotations
from modeconn.symmetry.groups import Group

LARGE = 16_384
"""Units in all blocks together beyond which blocks are paired first: their similarities would take 1 GB."""

Parts = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]
"""Yields, for each part of a weight, its group and the part in a and in b: blocks, units, then the rest."""


@dataclass
class InBlocks:
    """The best move for one way of pairing blocks.

    Args:
        elements: By group name, as `modeconn.matching.assignment.match_tree` returns them.
        gain: What the objective gains.
    """

    elements: dict[str, Tensor]
    gain: float


def is_of_blocks(groups: Sequence[Group]) -> bool:
    """Whether groups are blocks that are permuted and what is inside of each, of too many units to compare all."""
    outer = [group for group in groups if not group.parents]
    inner = [group for group in groups if group.parents]
    if len(outer) != 1 or not inner or outer[0].rotates:
        return False
    are_direct = all(group.parents == ((outer[0].name, outer[0].size),) for group in inner)
    return are_direct and max(group.shape[0] * group.shape[1] for group in inner) > LARGE


def matched(groups: Sequence[Group], own: Tensor, parts: Parts) -> list[InBlocks]:
    """Return the best move if blocks are paired by what is inside of them, and if they stay in pairs as they lie.

    Args:
        groups: The blocks, and what is inside of each.
        own: How similar the blocks are by weights that hold them alone, ``(m, m)``.
        parts: What holds the units inside.
    """
    (outer,) = (group for group in groups if not group.parents)
    own = own.double().cpu()
    evidence = own + sum(_norms_of_products(a, b) for _, a, b in parts())
    still = torch.arange(outer.size)
    pairings = [match_units(evidence)]
    if not torch.equal(pairings[0], still):
        pairings.append(still)
    found = []
    for pairing in pairings:
        similar, here = _inside(parts, pairing)
        elements, value = {outer.name: pairing}, float(own[still, pairing].sum() - own.trace())
        for group in (group for group in groups if group.parents):
            elements[group.name], best = _best_inside(group, similar[group.name])
            value += best
        found.append(InBlocks(elements, value - here))
    return found


def _norms_of_products(a: Tensor, b: Tensor) -> Tensor:
    r"""Return :math:`\|A_i B_j^T\|` for blocks i of a and j of b, whatever units are called inside of them.

    By Gram matrices, :math:`\|A_i B_j^T\|^2 = \langle A_i^T A_i, B_j^T B_j \rangle`, where these are the smaller ones,
    else by the products themselves, one pair of blocks at a time.
    """
    a, b = (x.flatten(2) for x in (a, b))
    if a.shape[2] <= a.shape[0] * a.shape[1]:
        grams = [(x.mT @ x).flatten(1) for x in (a, b)]
        return (grams[0] @ grams[1].T).double().cpu().clamp_min(0).sqrt()
    rows = [torch.stack([(x @ y.T).norm() for y in b]) for x in a]
    return torch.stack(rows).double().cpu()


def _inside(parts: Parts, pairing: Tensor) -> tuple[Mapping[str, Tensor], float]:
    """Return how similar units are inside of each pair of blocks, ``(m, n, n)`` by group, and of those as they lie."""
    found: dict[str, Tensor] = {}
    here = 0.0
    for name, a, b in parts():
        a, b = (x.flatten(2) for x in (a, b))
        here += float(torch.linalg.vecdot(a, b).double().sum())
        other = b[pairing.to(b.device)].mT
        found[name] = torch.baddbmm(found[name], a, other) if name in found else a @ other
    return found, here


def _best_inside(group: Group, similar: Tensor) -> tuple[Tensor, float]:
    """Return the element of a group inside of each pair of blocks, and their value."""
    if group.rotates:
        matrices = torch.stack([best_rotations(block.double().cpu(), group.kind) for block in similar])
        return matrices, sum(float((m * s.double().cpu()).sum()) for m, s in zip(matrices, similar, strict=True))
    perms = torch.stack([match_units(block).cpu() for block in similar])
    chosen = similar.gather(2, perms.to(similar.device)[..., None])
    return perms, float(chosen.double().sum())
