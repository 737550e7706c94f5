"""The permutation step of PAM through soft permutations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from modeconn.matching.learned import SoftWeights, learn_softly, logits_of
from modeconn.refinement.relabelled import Relabelled
from modeconn.symmetry.spec import Permutation
from modeconn.tools.checks import check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown


@dataclass(frozen=True)
class SinkhornStep(Shown):
    """Learn a soft permutation by gradient descent along the curve, from where b is, and round it.

    As `Sinkhorn` (Peña et al., 2023), on the sample and the curve of `PAM`: each gradient is that of one of its
    batches. Every few steps the matrices are rounded by assignment, and the result is kept if the exact loss falls.

    Args:
        num_steps: Gradient steps.
        strength: The logits begin as ``strength`` where a unit is, and 0 elsewhere.
        learning_rate: Adam's, of the logits.
        num_rounds: How many times the matrices are rounded and compared.

    References:
        Peña et al., 2023, https://arxiv.org/abs/2212.12042

    Raises:
        ValueError: If a setting is not positive.
    """

    num_steps: int = 300
    strength: float = 1.0
    learning_rate: float = 0.1
    num_rounds: int = 30

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_steps", "num_rounds")
        check_positive(self, "num_steps", "strength", "learning_rate", "num_rounds")

    def __call__(self, b: Relabelled) -> None:
        """Relabel b further, in place."""
        if not b.spec.groups:
            return
        logits, path = logits_of(b.spec.identity(), self.strength, b.space), SoftPath(b)
        learn_softly(
            path.weights,
            logits,
            torch.optim.Adam(logits.values(), lr=self.learning_rate),
            path.next_gradient,
            path.offer,
            num_steps=self.num_steps,
            num_rounds=self.num_rounds,
            temperature=lambda step: 1.0,
        )


class SoftPath:
    """The loss of the curve as a function of soft permutations of b as it was at first.

    Attributes:
        weights: What the permutations mix: b as it was at first.
    """

    def __init__(self, b: Relabelled) -> None:
        self._b, self._first = b, b.permutation
        self.weights = SoftWeights(b.spec, b.space, b.theta_b.clone())
        self._places = cycle(range(len(b.loss)))

    def next_gradient(self, theta_b: Tensor) -> Tensor:
        """Return the gradient with respect to b's weights at the next place of the sample, one after the other."""
        _, gradient, _ = self._b.loss.gradient(theta_b, self._b.bend, [next(self._places)])
        return gradient

    def offer(self, permutation: Permutation) -> None:
        """Relabel b as it was at first; the result is kept if the loss falls."""
        self._b.replace(permutation @ self._first)
