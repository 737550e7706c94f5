"""Sinkhorn's operator: the doubly stochastic matrix that belongs to a matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = 1e-6
_FEW, _MANY = 12, 1_000  # iterations before scores are taken for hard ones, and before giving up
_EASY_RANGE = 10.0  # scores that differ by no more than this converge from anywhere within a few iterations
_RIDGE = 1e-12


def sinkhorn(log_scores: Tensor, *, tolerance: float = _TOLERANCE) -> Tensor:
    r"""Return the doubly stochastic matrix of largest entropy-regularised score.

    .. math:: P = \operatorname{argmax}_{P 1 = P^\top 1 = 1} \sum_{ij} P_{ij} (X_{ij} - \log P_{ij})
              = \exp(X + u 1^\top + 1 v^\top)

    With ``log_scores`` divided by a temperature that goes to 0, this becomes the permutation matrix of the best
    assignment (Mena et al., 2018). Computed in the log domain and in float64. Sinkhorn's sweeps, rows and columns in
    turn, alternate with Newton steps in :math:`u`: sweeps alone need a thousand iterations where P is close to a
    permutation. Scores of a wide range are reached by doubling. Any scores take a few dozen iterations.

    The gradient is that of the fixed point (Eisenberger et al., 2022), exact to the tolerance and without a record of
    the iterations: one linear system for each matrix.

    Args:
        log_scores: ``X``, ``(..., n, n)``, finite; matrices of a batch are independent.
        tolerance: How far a sum of a row or column may be from 1.

    Returns:
        ``P``, ``(..., n, n)``, of the dtype and on the device of ``log_scores``.

    Raises:
        ValueError: If the matrices are not square or not finite.

    References:
        Mena et al., 2018, https://arxiv.org/abs/1802.08665; Eisenberger et al., 2022,
        https://arxiv.org/abs/2205.06688; Peña et al., 2023, https://arxiv.org/abs/2212.12042

    Example:
        >>> sinkhorn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """
    if log_scores.dim() < 2 or log_scores.shape[-2] != log_scores.shape[-1]:
        raise ValueError(f"log_scores must be square matrices, got shape {tuple(log_scores.shape)}.")
    if not bool(torch.isfinite(log_scores).all()):
        raise ValueError("log_scores must be finite; they hold NaN or infinite entries.")
    return _Sinkhorn.apply(log_scores, tolerance)


def soft_matrices(logits: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Return the doubly stochastic matrices of all logits, those of one size together."""
    matrices: dict[str, Tensor] = {}
    for size in {tensor.shape[-1] for tensor in logits.values()}:
        chosen = {name: tensor for name, tensor in logits.items() if tensor.shape[-1] == size}
        flat = [tensor.reshape(-1, size, size) for tensor in chosen.values()]
        parts = sinkhorn(torch.cat(flat) / temperature).split([len(part) for part in flat])
        matrices |= {name: part.view_as(logits[name]) for name, part in zip(chosen, parts, strict=True)}
    return matrices


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scores: Tensor, tolerance: float) -> Tensor:
        plan = _fixed_point(log_scores.double(), tolerance).exp()
        ctx.save_for_backward(plan)
        return plan.to(log_scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Project onto the directions in which rows and columns keep their sums."""
        (plan,) = ctx.saved_tensors
        weighted = plan * grad.double()
        rows, columns = weighted.sum(-1, keepdim=True), weighted.sum(-2, keepdim=True).mT
        right = columns - plan.mT @ rows
        # It is 0 up to the tolerance; the nearly singular system would amplify the rest.
        right -= right.mean(-2, keepdim=True)
        v = _solve_laplacian(plan.mT @ plan, right)
        u = rows - plan @ v
        return (weighted - plan * (u + v.mT)).to(grad.dtype), None


def _fixed_point(scores: Tensor, tolerance: float) -> Tensor:
    """Return the logarithm of the plan, float64."""
    log_plan, error = _iterate(_normalize(_normalize(scores, -1), -2), tolerance, _FEW)
    if error <= tolerance:
        return log_plan
    spread = float((scores.amax((-2, -1)) - scores.amin((-2, -1))).max())  # solve easier scores, double them, go on
    halvings = max(0, math.ceil(math.log2(spread / _EASY_RANGE)))
    log_plan = _normalize(scores / 2**halvings, -2)
    for _ in range(halvings):
        log_plan = _normalize(2 * _iterate(log_plan, 0.1, _MANY)[0], -2)
    log_plan, error = _iterate(log_plan, tolerance, _MANY)
    if error > tolerance:
        raise ValueError(
            f"rows and columns sum to 1 only within {error:.1g} after {_MANY} iterations, not within "
            f"tolerance={tolerance:.1g}; raise the tolerance or the temperature."
        )
    return log_plan


def _iterate(log_plan: Tensor, tolerance: float, limit: int) -> tuple[Tensor, float]:
    """Improve a plan whose columns sum to 1 until its rows do too; return it and how far off they are."""
    for iteration in range(limit):
        log_rows = log_plan.logsumexp(-1, keepdim=True)
        error = float(log_rows.abs().max())
        if error <= tolerance:
            break
        if error < 1 and iteration % 2:
            plan = log_plan.exp()
            step = _solve_laplacian(plan @ plan.mT, 1 - plan.sum(-1, keepdim=True)).clamp(-1, 1)
        else:
            step = -log_rows
        log_plan = _normalize(log_plan + step, -2)
    return log_plan, error


def _normalize(log_plan: Tensor, dim: int) -> Tensor:
    return log_plan - log_plan.logsumexp(dim, keepdim=True)


def _solve_laplacian(weights: Tensor, right: Tensor) -> Tensor:
    """Solve ``(diag(W 1) - W) x = right`` for symmetric weights, up to a constant.

    The diagonal is summed from the other entries: as a difference it would drown where a plan is almost hard.
    """
    laplacian = -weights
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    diagonal.copy_(_RIDGE - laplacian.sum(-1))
    return torch.linalg.solve(laplacian, right)
