"""The permutation step of PAM as its authors took it: doubly stochastic matrices, projected and sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from modeconn.matching.birkhoff import draws
from modeconn.matching.soft import SoftPermutation
from modeconn.refinement.relabelled import Relabelled
from modeconn.refinement.sinkhorn_step import SoftPath
from modeconn.tools.checks import check_at_least, check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown

_TOLERANCE = 1e-5
_SMALLEST = 5e-4
_MAX_TURNS = 1000  # Most iterations of a projection; 10 to 50 are usual.


@dataclass(frozen=True)
class RelaxedStep(Shown):
    r"""Projected gradient descent over doubly stochastic matrices, rounded by sampling (Tatro et al., 2020).

    Plain gradient steps on the loss at one batch each, the proximal step
    :math:`P \leftarrow (P + \tfrac{\eta}{\nu} P_k) / (1 + \tfrac{\eta}{\nu})`, and the projection onto doubly
    stochastic matrices. The result is decomposed into permutations (Birkhoff and von Neumann); of samples from the
    largest of them, the assignment of largest weight, and the start, the one of lowest exact loss is kept. Where the
    paper ends 20 alternating projections beside the set, this is the projection itself. The baseline for the other
    steps.

    Args:
        num_steps: Gradient steps; the paper makes 20 epochs of them.
        learning_rate: Of these steps, halved ``num_halvings`` times on the way.
        num_halvings: How many times the learning rate is halved, evenly spread over the steps.
        nu: Proximal weight.
        num_samples: Permutations drawn.
        num_parts: Parts of the decomposition to draw from, the largest ones.
        penalty: Strength of :math:`\sum P^{3/4}`, which is added to the loss. It is least where P is a permutation; the
            paper's code has it, switched off.
        seed: For the draws.

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439

    Raises:
        ValueError: If a setting is not positive, or the penalty is negative.
    """

    num_steps: int = 300
    learning_rate: float = 0.05
    num_halvings: int = 0
    nu: float = 1000.0
    num_samples: int = 32
    num_parts: int = 11
    penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_steps", "num_halvings", "num_samples", "num_parts", "seed")
        check_positive(self, "num_steps", "learning_rate", "nu", "num_samples", "num_parts")
        check_at_least(self, 0, "num_halvings", "penalty")
        if math.isinf(self.penalty):
            raise ValueError(f"penalty must be finite, got penalty={self.penalty!r}.")

    def __call__(self, b: Relabelled) -> None:
        """Relabel b further, in place."""
        if not b.spec.groups:
            return
        first = {
            name: m.to(b.space.device, b.space.wide_dtype).contiguous()
            for name, m in SoftPermutation.of(b.spec.identity()).matrices.items()
        }
        matrices = {name: nn.Parameter(matrix.clone()) for name, matrix in first.items()}
        path, start = SoftPath(b), b.permutation
        for step in range(self.num_steps):
            rate = self.learning_rate * 0.5 ** (step * (self.num_halvings + 1) // self.num_steps)
            path.weights.backward(matrices, path.next_gradient)
            with torch.no_grad():
                for name, matrix in matrices.items():
                    moved = matrix - rate * (matrix.grad + self.penalty * _slope(matrix))
                    moved = (moved + rate / self.nu * first[name]) / (1 + rate / self.nu)
                    matrix.copy_(project(moved))
                    matrix.grad = None
        path.offer(path.weights.round(matrices))
        drawn = draws(b.spec, matrices, self.num_parts, torch.Generator().manual_seed(self.seed))
        for permutation in islice(drawn, self.num_samples):
            b.replace(permutation @ start)


def _slope(matrix: Tensor) -> Tensor:
    """Return the gradient of the sum of ``matrix ** 0.75``, as it is at 5e-4 where entries are smaller."""
    return 0.75 * matrix.clamp(min=_SMALLEST) ** -0.25  # it is infinite at 0, which projections leave many entries at


def project(x: Tensor) -> Tensor:
    r"""Return the nearest doubly stochastic matrices to ``x (..., n, n)``; rows sum to 1 within 1e-5.

    That is 1e-5 of the largest entry, if it is above 1.

    The nearest is :math:`\max(x + u 1^T + 1 v^T, 0)`, with u and v such that rows and columns sum to 1. Each is found
    exactly while the other stays, by turns: ascent of the dual problem in blocks.
    """
    v, tolerance = torch.zeros_like(x[..., :1, :]), _TOLERANCE * max(1.0, float(x.abs().max()))
    for _ in range(_MAX_TURNS):
        u = _shift_to_sum_one(x + v)
        v = _shift_to_sum_one((x + u).mT).mT
        found = (x + u + v).clamp(min=0)
        if float((found.sum(-1) - 1).abs().max()) < tolerance:
            break
    return found


def _shift_to_sum_one(x: Tensor) -> Tensor:
    """Return what to add to each row so that its positive part sums to 1, ``(..., n, 1)``."""
    largest_first = x.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    shifts = (1 - largest_first.cumsum(-1)) / counts  # if so many entries stay positive
    positive = (largest_first + shifts > 0).sum(-1, keepdim=True).clamp(min=1)  # rounding may hide that one is
    return shifts.gather(-1, positive - 1)
