"""Git Re-Basin's third algorithm: learn the permutation through the task's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from modeconn.curves import Curve
from modeconn.matching.learned import Incumbent, LearnedMatching, Target, evenly
from modeconn.matching.weight_matching import WeightMatching
from modeconn.network.copies import copy_of
from modeconn.network.weights import Workspace, write_weights
from modeconn.tools.progress import passing_bar


@dataclass(frozen=True)
class StraightThrough(LearnedMatching):
    r"""Move free weights until matching b's weights to them gives a low loss on the line (Ainsworth et al., 2023).

    Weights :math:`\hat\theta` that begin as a's stand for the relabelled b. At each step b is matched to them,
    :math:`P = \operatorname{argmax}_P \langle \hat\theta, P \theta_b \rangle` by one sweep of `WeightMatching` from the
    permutation before, and they take an Adam step along the gradient of the loss at a random point of the line from a
    to :math:`P \theta_b`, as if they were that end themselves. Of the permutations met, the best by the objective on a
    fixed sample of the data is the result; never one worse than the start. Where a curve is learned along, a
    permutation is compared with the best before it on the curve as it is bent at that time.

    Where units may be rotated (`modeconn.discover` with ``symmetries="orthogonal"``) the rotations alone are learned,
    from the start's, as :math:`\exp(Z - Z^T) G_0` with Adam and half a cosine of its rate down to nothing (Theus et
    al., 2025); groups that permute stay as the start has them, so begin at ``start=WeightMatching()``.

    Args:
        start: A relabelling, or the method that finds it. Default: b as it is.
        objective: "line", the task's loss at random points of the line; "middle", between 0.4 and 0.6; "midpoint", in
            the middle between the networks; or a curve, such as ``Bezier(2)``, at random points of it, its inner
            control points learned along.
        num_steps: Gradient steps.
        learning_rate: Adam's, of the free weights.
        curve_learning_rate: Adam's, of the inner control points of a curve.
        rotation_learning_rate: Adam's, of rotations.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        batches_per_step: How many batches of the loader, each at a point of its own, make one gradient.
        num_examples: How many examples permutations are compared on.
        num_rounds: How many times the present permutation is compared with the best.
        seed: Of batch order, augmentation, points on the line and the order of groups.
        forward: ``forward(model, batch) -> loss`` in place of ``loss_fn``.
        invertible: Where units rotate inside of heads, map them by any invertible matrix instead, and those that they
            meet by its inverse transposed; the result is a `modeconn.Invertible`.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836; Theus et al., 2025, https://arxiv.org/abs/2506.22712

    Raises:
        ValueError: If a setting is out of range.
    """

    objective: Literal["line", "middle", "midpoint"] | Curve = "line"
    learning_rate: float = 1e-2

    objectives: ClassVar[tuple[str, ...]] = ("line", "middle", "midpoint")

    @property
    def needs_data(self) -> str:
        """The message shown where no loader is given."""
        return (
            "StraightThrough learns through the task's loss, so it needs data: pass loader=, or use WeightMatching()."
        )

    def _learn(self, model_a: nn.Module, model_b: nn.Module, target: Target, incumbent: Incumbent) -> None:
        free, wide_b = Workspace(_in_single_precision(model_a)), _in_single_precision(model_b)
        optimizer = self._adam([free.theta], target)
        spec, space, theta_b = incumbent.spec, incumbent.space, incumbent.theta_b
        permutation, theta = incumbent.permutation, torch.empty_like(theta_b)
        looks = evenly(self.num_rounds, self.num_steps)
        for step in passing_bar(range(1, self.num_steps + 1), desc="straight-through matching", unit="step"):
            one_sweep = WeightMatching(start=permutation, num_sweeps=1, seed=self.seed + step)
            permutation = one_sweep.match(spec, free.model, wide_b).permutation
            if step in looks:
                incumbent.offer(permutation)
            write_weights(permutation.relabel(space.unflatten(theta_b)), theta, space)
            free.theta.grad = target.gradient(theta).to(free.theta)
            optimizer.step()


def _in_single_precision(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are of at least single precision: others do not take in small steps."""
    wide = copy_of(model)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return wide
