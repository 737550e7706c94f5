"""The permutation step of PAM through soft permutations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.matching.learned import evenly, write
from modeconn.matching.sinkhorn import soft_matrices
from modeconn.matching.soft import SoftPermutation
from modeconn.refinement.relabelled import Relabelled
from modeconn.tools.checks import check_integers, check_positive


@dataclass(frozen=True)
class SinkhornStep:
    """Learn a soft permutation by gradient descent along the curve, from where b is, and round it.

    As `Sinkhorn` (Peña et al., 2023), on the sample and the curve of `PAM`: each gradient is that of one of its
    batches. Every few steps the matrices are rounded by assignment, and the result is kept if the exact loss falls.

    Args:
        steps: Gradient steps.
        strength: The logits begin as ``strength`` where a unit is, and 0 elsewhere.
        learning_rate: Adam's, of the logits.
        rounds: How many times the matrices are rounded and compared.

    References:
        Peña et al., 2023, https://arxiv.org/abs/2212.12042

    Raises:
        ValueError: If a setting is not positive.
    """

    steps: int = 300
    strength: float = 1.0
    learning_rate: float = 0.1
    rounds: int = 30

    def __post_init__(self) -> None:
        check_integers(self, "steps", "rounds")
        check_positive(self, "steps", "strength", "learning_rate", "rounds")

    def __call__(self, b: Relabelled) -> None:
        """Relabel b further, in place."""
        if not b.spec.groups:
            return
        hard = SoftPermutation.of(b.spec.identity()).matrices
        logits = {
            name: nn.Parameter(self.strength * matrix.to(b.space.device, b.space.wide_dtype))
            for name, matrix in hard.items()
        }
        optimizer = torch.optim.Adam(logits.values(), lr=self.learning_rate)
        path = SoftPath(b)
        looks = evenly(self.rounds, self.steps)
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            path.backward(soft_matrices(logits, 1.0), (step - 1) % len(b.loss))
            optimizer.step()
            if step in looks:
                path.offer(soft_matrices(logits, 1.0))


class SoftPath:
    """The loss of the curve as a function of soft permutations of b as it was at first."""

    def __init__(self, b: Relabelled) -> None:
        self._b, self._first = b, b.permutation
        self._theta_b = b.theta_b.clone()
        self._parameters = b.space.unflatten(self._theta_b)
        self._mixed = torch.empty_like(self._theta_b)

    def backward(self, matrices: Mapping[str, Tensor], place: int) -> None:
        """Add to the gradients of what ``matrices`` are made of that of the loss at one place of the sample."""
        b = self._b
        mixed = SoftPermutation(b.spec, matrices).relabel(self._parameters)
        write(mixed, self._mixed, b.space)
        _, gradient, _ = b.loss.gradient(self._mixed, b.bend, [place])
        moving = [name for name in mixed if mixed[name].requires_grad]
        slopes = b.space.unflatten(gradient)
        torch.autograd.backward([mixed[name] for name in moving], [slopes[name] for name in moving])

    def offer(self, matrices: Mapping[str, Tensor]) -> None:
        """Round by assignment; b keeps the result if its loss falls."""
        rounded = SoftPermutation(self._b.spec, {name: m.detach() for name, m in matrices.items()}).round()
        self._b.replace(rounded @ self._first)
