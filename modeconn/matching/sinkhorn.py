"""Sinkhorn re-basin: learn a soft permutation by gradient descent, then round it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeconn.curves import Curve
from modeconn.matching.learned import Distance, Incumbent, Objective, PathLoss, check_objective, evenly, write
from modeconn.matching.method import Match, Start, check_data, check_start, starting_permutation
from modeconn.matching.sinkhorn_operator import sinkhorn
from modeconn.matching.soft import SoftPermutation
from modeconn.network.loss import LossFn, cross_entropy
from modeconn.network.weights import WeightSpace
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.checks import check_integers, check_positive
from modeconn.tools.rng import seeded


@dataclass(frozen=True)
class Sinkhorn:
    r"""Minimise an objective of the relabelled b over soft permutations (Peña et al., 2023).

    Each group has a matrix of logits; `sinkhorn` of the logits over a temperature is the soft permutation that mixes
    b's units, and Adam follows the gradient of the objective. Every few steps the matrices are rounded by assignment.
    The best of these permutations by the objective itself, not relaxed, on a fixed sample of the data, and never one
    worse than the start, is the result. Where a curve is learned along, a permutation is compared with the best before
    it on the curve as it is bent at that time.

    Args:
        start: A relabelling, or the method that finds it. Default: b as it is.
        objective: "midpoint", the task's loss in the middle between the networks; "line", at random points of the line;
            a curve, such as ``Bezier(2)``, at random points of it, its inner control points learned along; or
            "weights", the squared distance between the networks, without data.
        strength: The logits begin as ``strength`` where the start puts a unit, and 0 elsewhere. The weaker, the less
            the result depends on the start. (MLP 64-32-32-32-10 on digits, 16 pairs, weight matching first: barrier
            0.081 at the start; 0.010, 0.011, 0.011, 0.015, 0.022 with strength 0.5, 1, 2, 3, 5 at the midpoint, and
            0.023, 0.028, 0.031, 0.033, 0.038 on the line.)
        steps: Gradient steps.
        learning_rate: Adam's, of the logits.
        temperature: What logits are divided by.
        final_temperature: If given, the temperature falls geometrically from ``temperature`` to it.
        curve_learning_rate: Adam's, of the inner control points of a curve.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        batches_per_step: How many batches of the loader, each at a point of its own, make one gradient.
        num_examples: How many examples the rounded permutations are compared on.
        rounds: How many times the matrices are rounded and compared.
        seed: Of batch order, augmentation and points on the line.

    References:
        Mena et al., 2018, https://arxiv.org/abs/1802.08665; Peña et al., 2023, https://arxiv.org/abs/2212.12042

    Raises:
        ValueError: If a setting is out of range.
    """

    start: Start = None
    objective: Literal["midpoint", "line", "weights"] | Curve = "midpoint"
    strength: float = 1.0
    steps: int = 300
    learning_rate: float = 0.1
    temperature: float = 1.0
    final_temperature: float | None = None
    curve_learning_rate: float = 1e-3
    loss_fn: LossFn = cross_entropy
    batches_per_step: int = 1
    num_examples: int = 2_048
    rounds: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_start(self.start)
        check_integers(self, "steps", "batches_per_step", "num_examples", "rounds", "seed")
        check_objective(self.objective, "midpoint", "line", "weights")
        positive = ["steps", "learning_rate", "temperature", "curve_learning_rate", "batches_per_step", "num_examples"]
        check_positive(self, *positive, "rounds", *["final_temperature"] * (self.final_temperature is not None))

    @property
    def needs_data(self) -> str | None:
        """Why, or None if it does not."""
        if self.objective == "weights":
            return None
        return (
            f"Sinkhorn(objective={self.objective!r}) learns through the task's loss, so it needs data: pass loader=, "
            f"or use Sinkhorn(objective='weights')."
        )

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> Match:
        """Return the relabelling of b; ``loader`` yields training data, for all objectives but "weights".

        Raises:
            ValueError: If data is missing, or the loss at the start is not finite.
        """
        check_data(self, loader)
        space = WeightSpace(model_a)
        theta_b = space.flatten(model_b, name="b")
        with seeded(self.seed, space.device):
            objective = self._objective(space, model_a, loader)
            start = starting_permutation(self.start, spec, model_a, model_b, loader)
            if not spec.groups:
                return Match(start)
            incumbent = Incumbent(spec, space, theta_b, objective, start)
            self._learn(spec, space, theta_b, objective, incumbent)
        return Match(incumbent.permutation, history=tuple(incumbent.history))

    def _objective(self, space: WeightSpace, model_a: nn.Module, loader: Iterable[Any] | None) -> Objective:
        if self.objective == "weights":
            return Distance(space.flatten(model_a))
        return PathLoss(
            model_a,
            loader,
            self.loss_fn,
            path=self.objective,
            num_examples=self.num_examples,
            batches_per_step=self.batches_per_step,
            seed=self.seed,
        )

    def _learn(
        self, spec: PermutationSpec, space: WeightSpace, theta_b: Tensor, objective: Objective, incumbent: Incumbent
    ) -> None:
        hard = SoftPermutation.of(incumbent.permutation).matrices
        logits = {
            name: nn.Parameter(self.strength * matrix.to(space.device, space.wide_dtype))
            for name, matrix in hard.items()
        }
        optimizer = torch.optim.Adam(logits.values(), lr=self.learning_rate)
        optimizer.add_param_group({"params": [objective.offsets], "lr": self.curve_learning_rate})
        weights_b, theta = space.unflatten(theta_b), torch.empty_like(theta_b)
        looks = evenly(self.rounds, self.steps)
        for step in range(1, self.steps + 1):
            temperature = self._temperature(step)
            soft = SoftPermutation(spec, soft_matrices(logits, temperature))
            mixed = soft.relabel(weights_b)
            write(mixed, theta, space)
            gradient = space.unflatten(objective.gradient(theta))
            optimizer.zero_grad()
            moving = [name for name in mixed if mixed[name].requires_grad]
            torch.autograd.backward([mixed[n] for n in moving], [gradient[n] for n in moving])
            optimizer.step()
            if step in looks:
                incumbent.offer(SoftPermutation(spec, soft_matrices(logits, temperature)).round())

    def _temperature(self, step: int) -> float:
        if self.final_temperature is None:
            return self.temperature
        return self.temperature * (self.final_temperature / self.temperature) ** ((step - 1) / max(self.steps - 1, 1))


def soft_matrices(logits: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Return the doubly stochastic matrices of all logits, those of one size together."""
    matrices: dict[str, Tensor] = {}
    for size in {tensor.shape[-1] for tensor in logits.values()}:
        chosen = {name: tensor for name, tensor in logits.items() if tensor.shape[-1] == size}
        flat = [tensor.reshape(-1, size, size) for tensor in chosen.values()]
        parts = sinkhorn(torch.cat(flat) / temperature).split([len(part) for part in flat])
        matrices |= {name: part.view_as(logits[name]) for name, part in zip(chosen, parts, strict=True)}
    return matrices
