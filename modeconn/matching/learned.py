"""What learned matchings share: what they minimise over the weights of b, and the best permutation that they met."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from modeconn.curves import Curve, Line
from modeconn.curves.loss import CurveLoss
from modeconn.curves.step import stratified_positions
from modeconn.matching.method import Match, Start, check_data, check_start, starting_permutation
from modeconn.matching.sinkhorn_operator import soft_matrices
from modeconn.matching.soft import SoftPermutation
from modeconn.matching.turned import TurnedWeights
from modeconn.network.batch_norm import calibration_batches
from modeconn.network.batches import check_loader, endless_batches, first_batch, inputs_of
from modeconn.network.loss import Forward, LossFn, cross_entropy, loss_alone, supervised
from modeconn.network.weights import WeightSpace, Workspace, pull_back, write_weights
from modeconn.symmetry.graph import InputMismatch
from modeconn.symmetry.invertible import duals_of
from modeconn.symmetry.spec import Permutation, PermutationSpec
from modeconn.tools.checks import check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.progress import passing_bar
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn

_POSITIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
_BANDS = {"midpoint": (0.5, 0.5), "middle": (0.4, 0.6)}
"""Parts of the line that an objective is about."""


class Target(Protocol):
    """What is minimised over b's weights ``(P,)``, and over ``offsets`` that are learned along, ``(0, P)`` if none."""

    offsets: nn.Parameter

    def value(self, theta_b: Tensor) -> float:
        """Return the value on fixed data."""
        ...

    def gradient(self, theta_b: Tensor) -> Tensor:
        """Return its gradient on the next data."""
        ...


@dataclass(frozen=True)
class LearnedMatching(Shown, ABC):
    """A way to match that follows the gradient of an objective: settings, data, and the best permutation kept.

    A subclass says what it moves in `_learn`. Its own settings come after these.
    """

    start: Start = None
    objective: Literal["midpoint", "middle", "line", "weights"] | Curve = "midpoint"
    num_steps: int = 300
    learning_rate: float = 0.1
    curve_learning_rate: float = 1e-3
    rotation_learning_rate: float = 6e-3
    loss_fn: LossFn = cross_entropy
    batches_per_step: int = 1
    num_examples: int = 2_048
    num_rounds: int = 30
    seed: int = 0
    forward: Forward | None = None
    invertible: bool = False

    objectives: ClassVar[tuple[str, ...]] = ("midpoint", "middle", "line")

    def __post_init__(self) -> None:
        check_settings(self)
        check_start(self.start)
        check_integers(self, "num_steps", "batches_per_step", "num_examples", "num_rounds", "seed")
        self._check_objective()
        check_positive(self, "num_steps", "learning_rate", "curve_learning_rate", "rotation_learning_rate")
        check_positive(self, "batches_per_step", "num_examples", "num_rounds")

    def _check_objective(self) -> None:
        """Raise unless the objective is a curve of fixed ends or one of the names."""
        objective = self.objective
        if not isinstance(objective, Curve) and objective not in self.objectives:
            raise ValueError(
                f"objective must be {', '.join(map(repr, self.objectives))} or a curve, got objective={objective!r}."
            )
        if isinstance(objective, Curve) and objective.free_ends:
            raise ValueError(f"objective must be a curve with fixed ends, but {objective!r} frees an end.")
        if self.invertible and objective == "weights":
            raise ValueError(
                "invertible=True is learned through the loss: maps that are not orthogonal change how long weights "
                "are, so objective='weights' says nothing of them. Pass objective='middle'."
            )

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> Match:
        """Return the relabelling of b; ``loader`` yields training data, for all objectives but "weights".

        Raises:
            ValueError: If data is missing, or the loss at the start is not finite.
        """
        check_data(self, loader)
        if self.invertible and not spec.has_rotations:
            raise ValueError(
                "invertible=True maps units inside of heads, but the spec has no group that rotates. Pass "
                "symmetries='orthogonal', or leave it out."
            )
        space = WeightSpace(model_a)
        theta_b = space.flatten(model_b, name="b")
        with seeded(self.seed, space.device):
            target = self._target(space, model_a, loader)
            start = starting_permutation(self.start, spec, model_a, model_b, loader)
            if not spec.groups:
                return Match(start)
            incumbent = Incumbent(spec, space, theta_b, target, start)
            if spec.has_rotations:
                self._learn_rotations(target, incumbent, self._duals(spec, model_a, loader))
            else:
                self._learn(model_a, model_b, target, incumbent)
        return Match(incumbent.permutation, history=tuple(incumbent.history))

    def _target(self, space: WeightSpace, model_a: nn.Module, loader: Iterable[Any] | None) -> Target:
        if self.objective == "weights":
            return Distance(space.flatten(model_a))
        return PathLoss(
            model_a,
            loader,
            self.loss_fn,
            self.forward,
            path=self.objective,
            num_examples=self.num_examples,
            batches_per_step=self.batches_per_step,
            seed=self.seed,
        )

    @abstractmethod
    def _learn(self, model_a: nn.Module, model_b: nn.Module, target: Target, incumbent: Incumbent) -> None:
        """Take all steps, offering permutations to the incumbent on the way."""

    def _duals(self, spec: PermutationSpec, model: nn.Module, loader: Iterable[Any] | None) -> dict[str, Tensor]:
        """Return the groups that any invertible map may act on, if that is asked for."""
        if not self.invertible:
            return {}
        try:
            found = duals_of(spec, model, inputs_of(first_batch(loader)))
        except InputMismatch:
            raise ValueError(
                "invertible=True runs the model on the inputs of the first batch, but the batches of this loader are "
                "something else, which forward= reads. Leave invertible= out."
            ) from None
        if not found:
            warn("invertible=True has no effect: no group of this spec may be mapped by any invertible matrix.")
        return found

    def _learn_rotations(self, target: Target, incumbent: Incumbent, duals: Mapping[str, Tensor]) -> None:
        """Turn b's units from the start, offering where they are to the incumbent on the way."""
        turned = TurnedWeights(incumbent.spec, incumbent.space, incumbent.theta_b, incumbent.permutation, duals)
        optimizer = self._adam(turned.parameters, target, learning_rate=self.rotation_learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        looks = evenly(self.num_rounds, self.num_steps)
        for step in passing_bar(range(1, self.num_steps + 1), desc="learning rotations", unit="step"):
            optimizer.zero_grad()
            turned.backward(target.gradient)
            optimizer.step()
            schedule.step()
            if step in looks:
                incumbent.offer(turned.relabelling())

    def _adam(
        self, parameters: Iterable[Tensor], target: Target, *, learning_rate: float | None = None
    ) -> torch.optim.Optimizer:
        """Return Adam for what is learned and for the control points of a curve that is learned along."""
        optimizer = torch.optim.Adam(parameters, lr=learning_rate or self.learning_rate)
        optimizer.add_param_group({"params": [target.offsets], "lr": self.curve_learning_rate})
        return optimizer


class Distance:
    """Half the squared distance between the networks."""

    def __init__(self, theta_a: Tensor) -> None:
        self._theta_a = theta_a
        self.offsets = nn.Parameter(theta_a.new_zeros(0, len(theta_a)))

    def value(self, theta_b: Tensor) -> float:
        """Return the distance's half square."""
        return float((theta_b - self._theta_a).double().square().sum() / 2)

    def gradient(self, theta_b: Tensor) -> Tensor:
        """Return its gradient for b's weights."""
        return theta_b - self._theta_a


class PathLoss:
    r"""The loss at points of a path from a to b, as a function of the weights of b.

    The path is the straight line, or a curve that is bent by `offsets`, see `CurveLoss`. To be used inside one seeded
    stretch of random numbers, from which the loader draws. Nothing of the caller's models changes.

    Args:
        model_a: Network a.
        loader: Training data, ``(inputs, targets)`` batches.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place.
        path: "line"; "midpoint", the line at t = 1/2 alone; "middle", the line between 0.4 and 0.6; or a curve, its
            inner control points `offsets` away from the line.
        num_examples: How many examples `value` is measured on, the same at every point and every call.
        batches_per_step: How many batches, each at its own t, make one gradient.
        seed: Of the positions t.

    Attributes:
        offsets: ``(K - 2, P)``, 0 at first, with a gradient after `gradient`.
    """

    def __init__(
        self,
        model_a: nn.Module,
        loader: Iterable[Any],
        loss_fn: LossFn,
        forward: Forward | None = None,
        *,
        path: Literal["line", "middle", "midpoint"] | Curve,
        num_examples: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        check_loader(loader) if forward is None else first_batch(loader)
        workspace = Workspace(model_a)
        workspace.model.requires_grad_(True)
        device, theta_a = workspace.space.device, workspace.theta.clone()
        curve = path if isinstance(path, Curve) else Line()
        first, last = _BANDS.get(path, (0.0, 1.0)) if isinstance(path, str) else (0.0, 1.0)
        shape = curve.num_control_points - 2, len(theta_a)
        self.offsets = nn.Parameter(theta_a.new_zeros(shape, dtype=workspace.space.wide_dtype))
        self._along = partial(CurveLoss, workspace, curve, theta_a)
        self._forward = supervised(loss_fn) if forward is None else loss_alone(forward)
        self._batches = endless_batches(loader, device)
        self._batches_per_step = batches_per_step
        self._draws = (first + (last - first) * t for t in _stratified(seed))
        sample = calibration_batches(loader, device, limit=num_examples, seed=seed)
        positions = sorted({first + (last - first) * t for t in _POSITIONS})
        places = [(t, batch) for t in positions for batch in sample]
        looked_at = supervised(loss_fn, check=True) if forward is None else self._forward
        self._fixed = self._along(looked_at, places)

    def value(self, theta_b: Tensor) -> float:
        """Return the mean loss over fixed positions and examples for b's weights ``theta_b (P,)``."""
        return self._fixed.value(theta_b, self.offsets)

    def gradient(self, theta_b: Tensor) -> Tensor:
        """Return the gradient ``(P,)`` for b's weights over the next batches, each at its own random position."""
        places = [(next(self._draws), next(self._batches)) for _ in range(self._batches_per_step)]
        _, towards_b, self.offsets.grad = self._along(self._forward, places).gradient(theta_b, self.offsets.detach())
        return towards_b


class Incumbent:
    """The best permutation offered so far.

    While a curve is learned along, values of different times are those of different curves: an offer is then compared
    with the best so far on the curve as it is bent now.

    Attributes:
        spec: The groups.
        space: The weight space of the networks.
        theta_b: b as it is, ``(P,)``.
        permutation: The best, at first the start.
        history: The value of the best at the start and after each offer.
    """

    def __init__(
        self, spec: PermutationSpec, space: WeightSpace, theta_b: Tensor, target: Target, start: Permutation
    ) -> None:
        self.spec, self.space, self.theta_b = spec, space, theta_b
        self._weights_b, self._target = space.unflatten(theta_b), target
        self._theta = torch.empty_like(theta_b)
        self.permutation = start
        self.history = [self._value(start)]
        if not math.isfinite(self.history[0]):
            raise ValueError(
                f"the objective at the start is {self.history[0]}; check the endpoints' weights and the loader's "
                f"inputs for values that are not finite."
            )

    def offer(self, permutation: Permutation) -> None:
        """Keep a permutation if it is better."""
        best = self._value(self.permutation) if self._target.offsets.numel() else self.history[-1]
        value = best if permutation == self.permutation else self._value(permutation)
        if value < best:
            self.permutation = permutation
        self.history.append(value if value < best else best)  # a value that is NaN is no better

    def _value(self, permutation: Permutation) -> float:
        write_weights(permutation.relabel(self._weights_b), self._theta, self.space)
        return self._target.value(self._theta)


class SoftWeights:
    """The weights of b mixed by soft permutations, and gradients pulled back to the matrices.

    Args:
        spec: The groups.
        space: The weight space of the networks.
        theta_b: b, ``(P,)``.
    """

    def __init__(self, spec: PermutationSpec, space: WeightSpace, theta_b: Tensor) -> None:
        self._spec, self._space = spec, space
        self._weights_b, self._mixed = space.unflatten(theta_b), torch.empty_like(theta_b)

    def backward(self, matrices: Mapping[str, Tensor], gradient: Callable[[Tensor], Tensor]) -> None:
        """Add to the gradients of what ``matrices`` are made of; ``gradient`` is called with the mixed weights."""
        mixed = SoftPermutation(self._spec, matrices).relabel(self._weights_b)
        write_weights(mixed, self._mixed, self._space)
        pull_back(mixed, self._space.unflatten(gradient(self._mixed)))

    def round(self, matrices: Mapping[str, Tensor]) -> Permutation:
        """Return the permutation of largest total weight."""
        return SoftPermutation(self._spec, {name: matrix.detach() for name, matrix in matrices.items()}).round()


def learn_softly(
    weights: SoftWeights,
    logits: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[Tensor], Tensor],
    offer: Callable[[Permutation], object],
    *,
    num_steps: int,
    num_rounds: int,
    temperature: Callable[[int], float],
) -> None:
    """Move the logits of soft permutations down a gradient, rounding them on the way (Peña et al., 2023).

    Args:
        weights: What the permutations mix.
        logits: From `logits_of`.
        optimizer: Of the logits.
        gradient: Returns that of the loss with respect to b's weights, at each step.
        offer: Is called with the rounded permutation, evenly often.
        num_steps: How many steps.
        num_rounds: How many times the matrices are rounded.
        temperature: What logits are divided by, from the number of the step, which counts from 1.
    """
    looks = evenly(num_rounds, num_steps)
    for step in passing_bar(range(1, num_steps + 1), desc="soft matching", unit="step"):
        optimizer.zero_grad()
        weights.backward(soft_matrices(logits, temperature(step)), gradient)
        optimizer.step()
        if step in looks:
            offer(weights.round(soft_matrices(logits, temperature(step))))


def logits_of(permutation: Permutation, strength: float, space: WeightSpace) -> dict[str, nn.Parameter]:
    """Return logits by group: ``strength`` where a permutation puts a unit, and 0 elsewhere."""
    hard = SoftPermutation.of(permutation).matrices
    return {name: nn.Parameter(strength * matrix.to(space.device, space.wide_dtype)) for name, matrix in hard.items()}


def evenly(num_rounds: int, num_steps: int) -> set[int]:
    """Return the steps, of 1 to ``num_steps``, after which one of ``num_rounds`` looks is due; the last is one.

    Example:
        >>> sorted(evenly(3, 10))
        [3, 7, 10]
    """
    return {round(num_steps * k / num_rounds) for k in range(1, num_rounds + 1)} - {0}


def _stratified(seed: int) -> Iterator[float]:
    block = 0
    while True:
        yield from stratified_positions(seed, block).tolist()
        block += 1
