"""Sinkhorn re-basin: learn a soft permutation by gradient descent, then round it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from modeconn.matching.learned import Incumbent, LearnedMatching, SoftWeights, Target, learn_softly, logits_of
from modeconn.tools.checks import check_positive


@dataclass(frozen=True)
class Sinkhorn(LearnedMatching):
    r"""Minimise an objective of the relabelled b over soft permutations (Peña et al., 2023).

    Each group has a matrix of logits; `sinkhorn` of the logits over a temperature is the soft permutation that mixes
    b's units, and Adam follows the gradient of the objective. Every few steps the matrices are rounded by assignment.
    The best of these permutations by the objective itself, not relaxed, on a fixed sample of the data, and never one
    worse than the start, is the result. Where a curve is learned along, a permutation is compared with the best before
    it on the curve as it is bent at that time.

    Where units may be rotated (`modeconn.discover` with ``symmetries="orthogonal"``) the rotations alone are learned,
    from the start's, as :math:`\exp(Z - Z^T) G_0` with Adam and half a cosine of its rate down to nothing (Theus et
    al., 2025); groups that permute stay as the start has them, so begin at ``start=WeightMatching()``.

    Args:
        start: A relabelling, or the method that finds it. Default: b as it is.
        objective: "midpoint", the task's loss in the middle between the networks; "middle", at random points of the
            line between 0.4 and 0.6; "line", at random points of all of it; a curve, such as ``Bezier(2)``, at random
            points of it, its inner control points learned along; or "weights", the squared distance between the
            networks, without data.
        num_steps: Gradient steps.
        learning_rate: Adam's, of the logits.
        curve_learning_rate: Adam's, of the inner control points of a curve.
        rotation_learning_rate: Adam's, of rotations.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        batches_per_step: How many batches of the loader, each at a point of its own, make one gradient.
        num_examples: How many examples the rounded permutations are compared on.
        num_rounds: How many times the matrices are rounded and compared.
        seed: Of batch order, augmentation and points on the line.
        forward: ``forward(model, batch) -> loss`` in place of ``loss_fn``.
        invertible: Where units rotate inside of heads, map them by any invertible matrix instead, and those that they
            meet by its inverse transposed; the result is a `modeconn.Invertible`.
        strength: The logits begin as ``strength`` where the start puts a unit, and 0 elsewhere. The weaker, the less
            the result depends on the start. (MLP 64-32-32-32-10 on digits, 16 pairs, weight matching first: barrier
            0.081 at the start; 0.010, 0.011, 0.011, 0.015, 0.022 with strength 0.5, 1, 2, 3, 5 at the midpoint, and
            0.023, 0.028, 0.031, 0.033, 0.038 on the line.)
        temperature: What logits are divided by.
        final_temperature: If given, the temperature falls geometrically from ``temperature`` to it.

    References:
        Mena et al., 2018, https://arxiv.org/abs/1802.08665; Peña et al., 2023, https://arxiv.org/abs/2212.12042;
        Theus et al., 2025, https://arxiv.org/abs/2506.22712

    Raises:
        ValueError: If a setting is out of range.
    """

    strength: float = 1.0
    temperature: float = 1.0
    final_temperature: float | None = None

    objectives: ClassVar[tuple[str, ...]] = ("midpoint", "middle", "line", "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "temperature", *["final_temperature"] * (self.final_temperature is not None))

    @property
    def needs_data(self) -> str | None:
        """The message shown where no loader is given; None if the objective reads no data."""
        if self.objective == "weights":
            return None
        return (
            f"Sinkhorn(objective={self.objective!r}) learns through the task's loss, so it needs data: pass loader=, "
            f"or use Sinkhorn(objective='weights')."
        )

    def _learn(self, model_a: nn.Module, model_b: nn.Module, target: Target, incumbent: Incumbent) -> None:
        logits = logits_of(incumbent.permutation, self.strength, incumbent.space)
        learn_softly(
            SoftWeights(incumbent.spec, incumbent.space, incumbent.theta_b),
            logits,
            self._adam(logits.values(), target),
            target.gradient,
            incumbent.offer,
            num_steps=self.num_steps,
            num_rounds=self.num_rounds,
            temperature=self._temperature,
        )

    def _temperature(self, step: int) -> float:
        if self.final_temperature is None:
            return self.temperature
        share = (step - 1) / max(self.num_steps - 1, 1)
        return self.temperature * (self.final_temperature / self.temperature) ** share
