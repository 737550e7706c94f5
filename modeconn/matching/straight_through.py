"""Git Re-Basin's third algorithm: learn the permutation through the task's loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from modeconn.curves import Curve
from modeconn.matching.learned import Incumbent, PathLoss, check_objective, evenly, write
from modeconn.matching.method import Match, Start, check_data, check_start, starting_permutation
from modeconn.matching.weight_matching import WeightMatching
from modeconn.network.copies import copy_of
from modeconn.network.loss import LossFn, cross_entropy
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.checks import check_integers, check_positive
from modeconn.tools.rng import seeded


@dataclass(frozen=True)
class StraightThrough:
    r"""Move free weights until matching b's weights to them gives a low loss on the line (Ainsworth et al., 2023).

    Weights :math:`\hat\theta` that begin as a's stand for the relabelled b. At each step b is matched to them,
    :math:`P = \operatorname{argmax}_P \langle \hat\theta, P \theta_b \rangle` by one sweep of `WeightMatching` from the
    permutation before, and they take an Adam step along the gradient of the loss at a random point of the line from a
    to :math:`P \theta_b`, as if they were that end themselves. Of the permutations met, the best by the objective on a
    fixed sample of the data is the result; never one worse than the start. Where a curve is learned along, a
    permutation is compared with the best before it on the curve as it is bent at that time.

    Args:
        start: A relabelling, or the method that finds it. Default: b as it is.
        objective: "line", the task's loss at random points of the line; "midpoint", in the middle between the networks;
            or a curve, such as ``Bezier(2)``, at random points of it, its inner control points learned along.
        steps: Gradient steps.
        learning_rate: Adam's, of the free weights.
        curve_learning_rate: Adam's, of the inner control points of a curve.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        batches_per_step: How many batches of the loader, each at a point of its own, make one gradient.
        num_examples: How many examples permutations are compared on.
        rounds: How many times the present permutation is compared with the best.
        seed: Of batch order, augmentation, points on the line and the order of groups.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836

    Raises:
        ValueError: If a setting is out of range.
    """

    start: Start = None
    objective: Literal["line", "midpoint"] | Curve = "line"
    steps: int = 300
    learning_rate: float = 1e-2
    curve_learning_rate: float = 1e-3
    loss_fn: LossFn = cross_entropy
    batches_per_step: int = 1
    num_examples: int = 2_048
    rounds: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_start(self.start)
        check_integers(self, "steps", "batches_per_step", "num_examples", "rounds", "seed")
        check_objective(self.objective, "line", "midpoint")
        check_positive(
            self, "steps", "learning_rate", "curve_learning_rate", "batches_per_step", "num_examples", "rounds"
        )

    @property
    def needs_data(self) -> str:
        """Why."""
        return (
            "StraightThrough learns through the task's loss, so it needs data: pass loader=, or use WeightMatching()."
        )

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
    ) -> Match:
        """Return the relabelling of b; ``loader`` yields training data.

        Raises:
            ValueError: If data is missing, or the loss at the start is not finite.
        """
        check_data(self, loader)
        space = WeightSpace(model_a)
        theta_b = space.flatten(model_b, name="b")
        free, wide_b = Workspace(_in_single_precision(model_a)), _in_single_precision(model_b)
        with seeded(self.seed, space.device):
            loss = PathLoss(
                model_a,
                loader,
                self.loss_fn,
                path=self.objective,
                num_examples=self.num_examples,
                batches_per_step=self.batches_per_step,
                seed=self.seed,
            )
            optimizer = torch.optim.Adam([free.theta], lr=self.learning_rate)
            optimizer.add_param_group({"params": [loss.offsets], "lr": self.curve_learning_rate})
            permutation = starting_permutation(self.start, spec, model_a, model_b, loader)
            incumbent = Incumbent(spec, space, theta_b, loss, permutation)
            looks, theta = evenly(self.rounds, self.steps), torch.empty_like(theta_b)
            for step in range(1, self.steps + 1):
                one_sweep = WeightMatching(start=permutation, max_sweeps=1, seed=self.seed + step)
                permutation = one_sweep.match(spec, free.model, wide_b).permutation
                if step in looks:
                    incumbent.offer(permutation)
                write(permutation.relabel(space.unflatten(theta_b)), theta, space)
                free.theta.grad = loss.gradient(theta).to(free.theta)
                optimizer.step()
        return Match(incumbent.permutation, history=tuple(incumbent.history))


def _in_single_precision(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are of at least single precision: others do not take in small steps."""
    wide = copy_of(model)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return wide
