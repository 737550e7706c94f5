"""What learned matchings minimise over the weights of b, and the best permutation that they met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from modeconn.curves import Curve, Line
from modeconn.curves.loss import CurveLoss
from modeconn.curves.step import stratified_positions
from modeconn.learning.step_loss import supervised
from modeconn.network.batch_norm import calibration_batches
from modeconn.network.batches import check_loader, endless_batches
from modeconn.network.loss import LossFn
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.symmetry.permutation import Permutation
from modeconn.symmetry.spec import PermutationSpec

_POSITIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Objective(Protocol):
    """What is minimised over b's weights ``(P,)``, and over ``offsets`` that are learned along, ``(0, P)`` if none."""

    offsets: nn.Parameter

    def value(self, theta_b: Tensor) -> float:
        """Return the objective on fixed data."""
        ...

    def gradient(self, theta_b: Tensor) -> Tensor:
        """Return its gradient on the next data."""
        ...


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
        path: "line"; "midpoint", the line at t = 1/2 alone; or a curve, its inner control points `offsets` away from
            the line.
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
        *,
        path: Literal["line", "midpoint"] | Curve,
        num_examples: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        check_loader(loader)
        workspace = Workspace(model_a)
        workspace.model.requires_grad_(True)
        device, theta_a = workspace.space.device, workspace.theta.clone()
        curve, middle_only = path if isinstance(path, Curve) else Line(), path == "midpoint"
        shape = curve.num_control_points - 2, len(theta_a)
        self.offsets = nn.Parameter(theta_a.new_zeros(shape, dtype=workspace.space.wide_dtype))
        self._along = partial(CurveLoss, workspace, curve, theta_a)
        self._forward = supervised(loss_fn)
        self._batches = endless_batches(loader, device)
        self._batches_per_step = batches_per_step
        self._draws = repeat(0.5) if middle_only else _stratified(seed)
        sample = calibration_batches(loader, device, limit=num_examples, seed=seed)
        positions = (0.5,) if middle_only else _POSITIONS
        places = [(t, batch) for t in positions for batch in sample]
        self._fixed = self._along(supervised(loss_fn, check=True), places)

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
        permutation: The best, at first the start.
        history: The value of the best at the start and after each offer.
    """

    def __init__(
        self, spec: PermutationSpec, space: WeightSpace, theta_b: Tensor, objective: Objective, start: Permutation
    ) -> None:
        self._space, self._weights_b, self._objective = space, space.unflatten(theta_b), objective
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
        best = self._value(self.permutation) if self._objective.offsets.numel() else self.history[-1]
        value = best if permutation == self.permutation else self._value(permutation)
        if value < best:
            self.permutation = permutation
        self.history.append(min(value, best))

    def _value(self, permutation: Permutation) -> float:
        write(permutation.relabel(self._weights_b), self._theta, self._space)
        return self._objective.value(self._theta)


@torch.no_grad()
def write(tensors: Mapping[str, Tensor], theta: Tensor, space: WeightSpace) -> None:
    """Write named weights into their places in ``theta (P,)``."""
    for name, view in space.unflatten(theta).items():
        view.copy_(tensors[name])


def evenly(rounds: int, steps: int) -> set[int]:
    """Return the steps, of 1 to ``steps``, after which one of ``rounds`` looks is due; the last is one of them.

    Example:
        >>> sorted(evenly(3, 10))
        [3, 7, 10]
    """
    return {round(steps * k / rounds) for k in range(1, rounds + 1)} - {0}


def check_objective(objective: Any, *names: str) -> None:
    """Raise unless an objective is a curve of fixed ends or one of the names."""
    if not isinstance(objective, Curve) and objective not in names:
        raise ValueError(f"objective must be {', '.join(map(repr, names))} or a curve, got objective={objective!r}.")
    if isinstance(objective, Curve) and objective.free_ends:
        raise ValueError(f"objective must be a curve with fixed ends, but {objective!r} frees its ends.")


def _stratified(seed: int) -> Iterator[float]:
    block = 0
    while True:
        yield from stratified_positions(seed, block).tolist()
        block += 1
