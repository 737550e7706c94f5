"""How to train: epochs, optimizer, learning-rate schedule, weight decay, precision. Shared by endpoints and curves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Schedule = Callable[[float, int], float]
"""``schedule(epoch, epochs)`` is the factor on the optimizer's own rate; ``epoch`` counts from 0, with fractions."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Return what forward passes run in: ``torch.autocast`` to ``dtype``, or nothing if that is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def constant(epoch: float, epochs: int) -> float:
    """Keep the optimizer's learning rate."""
    return 1.0


def piecewise_linear(epoch: float, epochs: int) -> float:
    """Full rate for half of the epochs, then a line down to 1% at 90% of them (Garipov et al., 2018).

    Stepped once an epoch, as in the paper.

    Example:
        >>> [round(piecewise_linear(epoch, 10), 3) for epoch in (0, 5, 7, 9)]
        [1.0, 1.0, 0.505, 0.01]
    """
    progress = math.floor(epoch) / epochs
    return 1.0 - 0.99 * min(max((progress - 0.5) / 0.4, 0.0), 1.0)


def halving(epoch: float, epochs: int, *, every: int = 20, decay: float = 0.9996) -> float:
    """Halve the rate every ``every`` epochs and multiply it by ``decay`` each epoch (Tatro et al., 2020).

    Example:
        >>> halving(40, 250, decay=1.0)
        0.25
    """
    epoch = math.floor(epoch)
    return 0.5 ** (epoch // every) * decay**epoch


def one_cycle(epoch: float, epochs: int, *, warmup: float = 0.3, start: float = 1 / 25, end: float = 4e-6) -> float:
    """Rise from ``start`` to 1 in the first ``warmup`` share of training, then fall to ``end``; both along a cosine.

    The factor changes at every step. It is ``torch.optim.lr_scheduler.OneCycleLR`` without its cycling of momentum.
    """
    progress = min(max(epoch / epochs, 0.0), 1.0)
    if progress < warmup:
        low, high, share = start, 1.0, progress / warmup
    else:
        low, high, share = 1.0, end, (progress - warmup) / (1.0 - warmup)
    return high + (low - high) * (1.0 + math.cos(math.pi * share)) / 2.0


def cosine(epoch: float, epochs: int) -> float:
    """Fall from 1 to 0 along half a cosine, step by step: a cycle of snapshot ensembles (Huang et al., 2017).

    Example:
        >>> [round(cosine(epoch, 4), 2) for epoch in (0, 2, 4)]
        [1.0, 0.5, 0.0]
    """
    return (1.0 + math.cos(math.pi * min(max(epoch / epochs, 0.0), 1.0))) / 2.0


def triangular(epoch: float, epochs: int, *, low: float = 0.01) -> float:
    """Rise from ``low`` to 1 along a line and fall back: a cycle of fast geometric ensembling (Garipov et al., 2018).

    Example:
        >>> [triangular(epoch, 4, low=0.5) for epoch in (0, 1, 2, 3, 4)]
        [0.5, 0.75, 1.0, 0.75, 0.5]
    """
    progress = min(max(epoch / epochs, 0.0), 1.0)
    return 1.0 - (1.0 - low) * abs(1.0 - 2.0 * progress)


# fused: one pass over memory where the default takes five on a CPU; 8 ms in place of 40 for 15 million weights
_NESTEROV_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True)


@dataclass(frozen=True)
class Recipe(Shown):
    """The settings of one training run, of an endpoint or of a curve.

    Args:
        epochs: Passes over the loader, at least 1.
        optimizer: Called with the parameters, returns any ``torch.optim`` optimizer. Default: SGD with learning rate
            0.1 and Nesterov momentum 0.9.
        schedule: Factor on the learning rate, from the (fractional) epoch and the number of epochs:
            `piecewise_linear`, `halving`, `one_cycle`, `constant`, or your own function.
        weight_decay: Strength of the penalty ``weight_decay / 2 * ||w||^2``; on a curve ``w`` are the interpolated
            weights ``w(t)``, never the control points (Garipov et al., 2018).
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run the forward pass under autocast, None for the
            model's own precision. With float16 the loss is scaled by a `torch.amp.GradScaler`.
        compile: Run the model through ``torch.compile``.
        offload: Keep what moves a curve, its gradient and the optimizer's state in the memory of the CPU, so that
            a device needs them not; for curves alone.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> round(Recipe(epochs=10).learning_rate_factor(epoch=9), 3)
        0.01
    """

    epochs: int = 30
    optimizer: OptimizerFactory = _NESTEROV_SGD
    schedule: Schedule = piecewise_linear
    weight_decay: float = 5e-4
    autocast: torch.dtype | None = None
    compile: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        for name, example in (("optimizer", "partial(torch.optim.Adam, lr=1e-3)"), ("schedule", "modeconn.one_cycle")):
            if not callable(value := getattr(self, name)):
                raise ValueError(f"{name} must be a function, such as {example}, got {name}={value!r:.80}.")
        check_settings(self)
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got epochs={self.epochs}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, 0 or more, got weight_decay={self.weight_decay}.")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got autocast={self.autocast}.")

    def check_not_offloaded(self) -> None:
        """Raise a ValueError if a network is to be trained with what is for curves alone."""
        if self.offload:
            raise ValueError("Recipe(offload=True) is for curves: networks are trained where they are. Leave it out.")

    def make_optimizer(self, parameters: Iterable[Tensor], *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """Build the optimizer; its groups remember their full learning rate as ``initial_lr``."""
        try:
            optimizer = self.optimizer(parameters, weight_decay=weight_decay)
        except TypeError as error:
            raise ValueError(
                f"the recipe's optimizer cannot be made: {error}. It is called with the parameters and weight_decay=, "
                f"such as functools.partial(torch.optim.Adam, lr=1e-3)."
            ) from error
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def learning_rate_factor(self, epoch: float) -> float:
        """Return the schedule's factor at a (fractional) epoch."""
        return self.schedule(epoch, self.epochs)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Set every group of ``optimizer`` to its full rate times the schedule's factor."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.learning_rate_factor(epoch)
