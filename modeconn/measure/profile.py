"""Loss, accuracy and other metrics of all networks along a curve."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeconn.measure.along import AlongCurve, Quantity
from modeconn.measure.meter import Measured, Meter
from modeconn.measure.metrics import higher_is_better
from modeconn.tools.callbacks import Callbacks, PointEnd
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import reseed
from modeconn.tools.warn import warn

QUANTITIES = {
    "loss": Quantity("{:.4f}", higher_is_better=False, unit="mean per example"),
    "accuracy": Quantity("{:.2%}", higher_is_better=True, unit="%"),
    "error": Quantity("{:.2%}", higher_is_better=False, unit="%"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Profile(AlongCurve):
    r"""Loss, accuracy and other metrics along a curve.

    Values at all points, ends included, are those of networks whose batch norm was recalibrated in the same way.

    Args:
        t: Positions, from 0 to 1, rising; this and all other tensors float64 on the CPU.
        loss: Mean loss, ``(N,)``.
        accuracy: Fraction of right answers, ``(N,)``, or None where it is not certain what a right one is.
        arc_length: Length of the curve from 0 to each position, ``(N,)``, in the norm of weight space.
        own_loss: Loss of both ends with the statistics they came with, ``(2,)``.
        own_accuracy: Accuracy of both ends with the statistics they came with, ``(2,)``, or None.
        num_examples: How many examples were evaluated at each point.
        seconds: How long all that took.
        metrics: Values of other metrics by name, ``(N,)`` each.
        own_metrics: The same of both ends with the statistics they came with, ``(2,)`` each.
        higher_is_better: By name of a metric, whether high values are good; one left out has no barrier.
        statistics: With which statistics of norm layers networks were measured, but for ``own_...``; empty for networks
            that have none.

    Example:
        >>> t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        >>> Profile(t, loss=1 - t / 2 + (t == 0.5), accuracy=0.5 + t / 4, arc_length=t).barrier
        1.0
    """

    t: Tensor
    loss: Tensor
    accuracy: Tensor | None
    arc_length: Tensor | None
    own_loss: Tensor | None = None
    own_accuracy: Tensor | None = None
    num_examples: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    own_metrics: Mapping[str, Tensor] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    statistics: str = ""

    @property
    def values(self) -> dict[str, Tensor]:
        """Loss, where there are classes accuracy and error, and every metric, by name, ``(N,)`` each."""
        found = {"loss": self.loss, "accuracy": self.accuracy, "error": self.error, **self.metrics}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def own(self) -> dict[str, Tensor]:
        """The same of both ends with the statistics they came with, ``(2,)`` each, as far as they were measured."""
        error = None if self.own_accuracy is None else 1 - self.own_accuracy
        found = {"loss": self.own_loss, "accuracy": self.own_accuracy, "error": error, **self.own_metrics}
        return {name: value for name, value in found.items() if value is not None}

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is written, and which way it gets worse."""
        return QUANTITIES.get(name) or Quantity("{:.4g}", self.higher_is_better.get(name))

    @property
    def error(self) -> Tensor | None:
        """Fraction of wrong answers, ``(N,)``."""
        return None if self.accuracy is None else 1 - self.accuracy

    @property
    def barrier(self) -> float:
        r""":math:`\max_t L(t) - [(1-t) L(0) + t L(1)]`, in units of the loss; 0 or more, since ends count."""
        return self.barrier_of("loss")

    @property
    def accuracy_drop(self) -> float | None:
        r""":math:`\max_t [(1-t) A(0) + t A(1)] - A(t)`, a fraction; the barrier in terms of accuracy."""
        return None if self.accuracy is None else self.barrier_of("accuracy")

    @property
    def min_accuracy(self) -> float | None:
        """The lowest accuracy on the curve."""
        return None if self.accuracy is None else float(self.accuracy.min())

    @property
    def mean_accuracy(self) -> float | None:
        """The mean accuracy over t."""
        return None if self.accuracy is None else self.mean(self.accuracy)

    @property
    def arc_mean_accuracy(self) -> float | None:
        """The mean accuracy over arc length."""
        return None if self.accuracy is None else self.arc_mean(self.accuracy)

    def _for_readers(self) -> dict[str, Any]:
        return {"barrier": self.barrier, "accuracy_drop": self.accuracy_drop, **super()._for_readers()}

    def _shown(self) -> list[str]:
        return [name for name in self.values if name != "error"]  # error is 1 - accuracy, so one of the two is enough


class Networks(Protocol):
    """One network that can be moved along a curve."""

    @property
    def ends_have_their_own(self) -> bool:
        """Whether both ends came with other statistics than those they have when the network is moved there."""
        ...

    @property
    def statistics(self) -> str:
        """Which statistics norm layers have, empty for none."""
        ...

    def __call__(self, t: float) -> nn.Module:
        """Return the network at ``t``; the next call may change it."""
        ...

    def as_it_came(self, end: int) -> nn.Module:
        """Return the network at one end, 0 or 1, with its own statistics; the next call may change it."""
        ...


def profile_along(
    networks: Networks,
    meter: Meter,
    t: Sequence[float],
    arc_length: Tensor | None,
    *,
    started: float,
    device: torch.device,
    callbacks: Callbacks,
    progress: bool,
) -> Profile:
    """Measure the networks at the positions ``t``, then both ends as they came, if these are among the positions.

    Several processes share them.

    Args:
        networks: What is measured.
        meter: A new one.
        t: In [0, 1], rising.
        arc_length: Of the curve up to each position, ``(N,)``; None for one network.
        started: When the work began, by `time.perf_counter`.
        device: Where random numbers are drawn, within a stretch of `modeconn.tools.rng.seeded`.
        callbacks: What is told of every point.
        progress: Whether to show a progress bar.
    """
    for end, position in (("a", 0.0), ("b", 1.0)):
        if end in meter.ends:
            meter.compare_with(end, networks(position))
    count, own = len(t), [0, len(t) - 1]
    has_ends = t[0] == 0 and t[-1] == 1
    to_measure: list[tuple[float, bool]] = [(position, False) for position in t]
    if has_ends and networks.ends_have_their_own:
        own = [count, count + 1]
        to_measure += [(0, True), (1, True)]
    them = joined()

    def mine() -> Measured | None:
        bar = progress_bar(them.mine(to_measure), show=progress, desc="evaluate")
        for number, (position, as_it_came) in enumerate(bar):
            reseed(0, device)  # what a network draws does not depend on which others are measured
            meter.measure(networks.as_it_came(int(position)) if as_it_came else networks(position))
            if not as_it_came:
                callbacks.tell("after_point", PointEnd(position, number * them.size + them.rank + 1, len(t)))
        return meter.results() if len(them.mine(to_measure)) else None

    found = Measured.joined([part for part in them.each(mine) if part is not None])
    for name, values in found.metrics.items():
        if not bool(values[:count].isfinite().all()):
            warn(f"the metric {name!r} is NaN or infinite at some positions: its table and figures leave these empty.")
    lost = [position for position, value in zip(t, found.loss.tolist(), strict=False) if not math.isfinite(value)]
    if lost:
        warn(
            f"the loss is NaN or infinite at {len(lost)} of {count} positions, the first t={lost[0]:.4g}. Look for "
            f"values in the data that are not finite, whose accuracies mean nothing either, or batches without a loss."
        )
    return Profile(
        t=torch.tensor(t, dtype=torch.float64),
        loss=found.loss[:count],
        accuracy=None if found.accuracy is None else found.accuracy[:count],
        arc_length=arc_length,
        own_loss=found.loss[own] if has_ends else None,
        own_accuracy=found.accuracy[own] if has_ends and found.accuracy is not None else None,
        num_examples=found.num_examples,
        seconds=time.perf_counter() - started,
        metrics={name: values[:count] for name, values in found.metrics.items()},
        own_metrics={name: values[own] for name, values in found.metrics.items()} if has_ends else {},
        higher_is_better=higher_is_better(meter.metrics),
        statistics=networks.statistics,
    )
