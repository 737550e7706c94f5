"""Orthogonal Procrustes problems: which rotation of b's units brings them closest to a's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modeconn.symmetry.groups import without_ones
from modeconn.symmetry.kinds import ORTHOGONAL_ONES, Kind


def best_rotations(similarity: Tensor, kind: Kind) -> Tensor:
    r"""Return the orthogonal matrices that make the total similarity largest (Schönemann, 1966).

    .. math:: G^\star = \operatorname{argmax}_{G G^T = 1} \sum_{ij} G_{ij} C_{ij} = U V^T, \qquad C = U \Sigma V^T

    Where the group keeps the vector of ones the same is solved among the vectors that sum to zero. Directions of which
    nothing is known stay where they can. Exact; O(n^3).

    Args:
        similarity: ``C``, shape ``(..., n, n)``, rows for units of a, columns for units of b; in double precision.
        kind: The kind of the group.

    Returns:
        ``G``, shape ``(..., n, n)``: place ``i`` gets the sum over ``j`` of ``G[i, j]`` times unit ``j`` of b.
    """
    if kind is not ORTHOGONAL_ONES:
        return _rotations(similarity)
    basis = without_ones(similarity.shape[-1]).to(similarity.device)
    return basis @ _rotations(basis.T @ similarity @ basis) @ basis.T + 1 / len(basis)


def _rotations(similarity: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(similarity)
    rank = (s > s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1]).sum(-1)
    if bool((rank == s.shape[-1]).all()):
        return u @ v
    if similarity.dim() > 2:
        return torch.stack([_rotations(part) for part in similarity])
    left, right = u[:, rank:], v[rank:]  # what is mapped where the weights say nothing: as little moved as possible
    x, _, y = torch.linalg.svd(left.T @ right.T)
    return u[:, :rank] @ v[:rank] + left @ (x @ y) @ right


def best_values(similarity: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the largest total similarity that a rotation can give, for each of many matrices ``(..., n, n)``."""
    if kind is not ORTHOGONAL_ONES:
        return np.linalg.svd(similarity, compute_uv=False).sum(-1)
    basis = without_ones(similarity.shape[-1]).numpy()
    values = np.linalg.svd(basis.T @ similarity @ basis, compute_uv=False).sum(-1)
    return values + similarity.sum((-1, -2)) / similarity.shape[-1]
