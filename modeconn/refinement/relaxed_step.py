"""The permutation step of PAM as its authors took it: doubly stochastic matrices, projected and sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from modeconn.matching.assignment import match_units
from modeconn.matching.soft import SoftPermutation
from modeconn.refinement.relabelled import Relabelled
from modeconn.refinement.sinkhorn_step import SoftPath
from modeconn.symmetry.spec import Permutation, PermutationSpec
from modeconn.tools.checks import check_at_least, check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown

_TOLERANCE = 1e-5
_MAX_TURNS = 1000  # Most iterations of a projection; 10 to 50 are usual.
_SMALLEST = 5e-4  # Smaller entries are ignored in a decomposition.


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
        seed: For the draws.

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439

    Raises:
        ValueError: If a setting is not positive.
    """

    num_steps: int = 300
    learning_rate: float = 0.05
    num_halvings: int = 0
    nu: float = 1000.0
    num_samples: int = 32
    num_parts: int = 11
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_steps", "num_halvings", "num_samples", "num_parts", "seed")
        check_positive(self, "num_steps", "learning_rate", "nu", "num_samples", "num_parts")
        check_at_least(self, 0, "num_halvings")

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
                    moved = matrix - rate * matrix.grad
                    moved = (moved + rate / self.nu * first[name]) / (1 + rate / self.nu)
                    matrix.copy_(project(moved))
                    matrix.grad = None
        path.offer(path.weights.round(matrices))
        generator = torch.Generator().manual_seed(self.seed)
        parts = {name: _decompose_all(m.detach().double().cpu(), self.num_parts) for name, m in matrices.items()}
        for _ in range(self.num_samples):
            b.replace(_draw(b.spec, parts, generator) @ start)


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
    positive = (largest_first + shifts > 0).sum(-1, keepdim=True)
    return shifts.gather(-1, positive - 1)


def decompose(matrix: Tensor, num_parts: int) -> list[tuple[float, Tensor]]:
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


def _decompose_all(matrices: Tensor, num_parts: int) -> dict[tuple[int, ...], list[tuple[float, Tensor]]]:
    """Decompose each matrix of a group, by place and source of the blocks around it."""
    blocks = matrices.shape[:-2]
    return {index: decompose(matrices[index], num_parts) for index in product(*map(range, blocks))}


def _draw(
    spec: PermutationSpec,
    parts: Mapping[str, Mapping[tuple[int, ...], list[tuple[float, Tensor]]]],
    generator: torch.Generator,
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
