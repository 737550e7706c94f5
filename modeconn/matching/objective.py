"""What learned matchings minimise over the weights of b, and the best permutation that they met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeconn.batch_norm import calibration_batches, norm_layers
from modeconn.curve_step import stratified_positions
from modeconn.curves import Curve, Line
from modeconn.loaders import batches, check_loader
from modeconn.loss import LossFn, check_targets
from modeconn.symmetry.permutation import Permutation
from modeconn.symmetry.spec import PermutationSpec
from modeconn.weights import WeightSpace, Workspace

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

    The path is the straight line, or a curve whose control points are those of the line and what is added to them:
    :math:`\theta(t) = (1-t)\,\theta_a + t\,\theta_b + \sum_k B_k(t)\,\phi_k`. Norm layers use the statistics of the
    batch, dropout is off, and nothing of the caller's models changes. To be used inside one seeded stretch of random
    numbers, from which the loader draws.

    Args:
        model_a: Network a.
        loader: Training data, ``(inputs, targets)`` batches.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        curve: The path; its inner control points are `offsets` away from the line.
        middle_only: Use the point t = 1/2 alone.
        num_examples: How many examples `value` is measured on, the same at every point and every call.
        batches_per_step: How many batches, each at its own t, make one gradient.
        seed: Of the positions t.

    Attributes:
        offsets: :math:`\phi`, ``(K - 2, P)``, 0 at first, with a gradient after `gradient`.
    """

    def __init__(
        self,
        model_a: nn.Module,
        loader: Iterable[Any],
        loss_fn: LossFn,
        *,
        curve: Curve | None = None,
        middle_only: bool = False,
        num_examples: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        check_loader(loader)
        self._workspace = Workspace(model_a)
        self._workspace.model.requires_grad_(True).eval()
        for layer in norm_layers(model_a):
            self._workspace.model.get_submodule(layer).train()
        self.space = self._workspace.space
        self._theta_a = self._workspace.theta.clone()
        self._curve = Line() if curve is None else curve
        self.offsets = nn.Parameter(self._theta_a.new_zeros(self._curve.num_control_points - 2, len(self._theta_a)))
        self._loss_fn = loss_fn
        self._sample = calibration_batches(loader, self.space.device, limit=num_examples, seed=seed)
        self._batches = _forever(loader, self.space.device)
        self._batches_per_step = batches_per_step
        self._positions = (0.5,) if middle_only else _POSITIONS
        self._draws = _middle() if middle_only else _stratified(seed)
        self._checked = False

    @torch.no_grad()
    def value(self, theta_b: Tensor) -> float:
        """Return the mean loss over fixed positions and examples for b's weights ``theta_b (P,)``."""
        total = self._theta_a.new_zeros((), dtype=torch.float64)
        for t in self._positions:
            self._go_to(theta_b, t)
            for inputs, targets in self._sample:
                total += self._loss(inputs, targets) * len(targets)
        count = sum(len(targets) for _, targets in self._sample)
        return float(total) / (count * len(self._positions))

    def gradient(self, theta_b: Tensor) -> Tensor:
        """Return the gradient ``(P,)`` for b's weights over the next batches, each at its own random position."""
        total = torch.zeros_like(theta_b)
        self.offsets.grad = torch.zeros_like(self.offsets)
        for _ in range(self._batches_per_step):
            basis, share_of_b = self._go_to(theta_b, next(self._draws))
            self._workspace.zero_grad()
            self._loss(*next(self._batches)).backward()
            gradient = self._workspace.gather_grad()
            total.add_(gradient, alpha=share_of_b / self._batches_per_step)
            for offset_grad, weight in zip(self.offsets.grad, basis[1:-1], strict=True):
                offset_grad.add_(gradient, alpha=weight / self._batches_per_step)
        return total

    @torch.no_grad()
    def _go_to(self, theta_b: Tensor, t: float) -> tuple[list[float], float]:
        """Bring the network to position t; return the weights of the control points there, and that of b."""
        basis = self._curve.basis(t)
        share_of_b = float(basis @ torch.linspace(0, 1, len(basis), dtype=basis.dtype))
        torch.lerp(self._theta_a, theta_b, share_of_b, out=self._workspace.theta)
        for offset, weight in zip(self.offsets, basis[1:-1].tolist(), strict=True):
            self._workspace.theta.add_(offset, alpha=weight)
        return basis.tolist(), share_of_b

    def _loss(self, inputs: Any, targets: Tensor) -> Tensor:
        outputs = self._workspace.model(inputs)
        if not self._checked:
            check_targets(outputs, targets)
            self._checked = True
        return self._loss_fn(outputs, targets)


class Incumbent:
    """The best permutation offered so far.

    Attributes:
        permutation: The best, at first the start.
        history: The value of the best after each offer.
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
        known = permutation == self.permutation and not self._objective.offsets.numel()
        value = self.history[-1] if known else self._value(permutation)
        if value < self.history[-1]:
            self.permutation = permutation
        self.history.append(min(value, self.history[-1]))

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


def check_positive(settings: Any, *names: str) -> None:
    """Raise unless the named fields are positive."""
    for name in names:
        value = getattr(settings, name)
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {name}={value}.")


def _forever(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    while True:
        yield from batches(loader, device)


def _middle() -> Iterator[float]:
    while True:
        yield 0.5


def _stratified(seed: int) -> Iterator[float]:
    block = 0
    while True:
        yield from stratified_positions(seed, block).tolist()
        block += 1
