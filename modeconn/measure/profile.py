"""Loss and accuracy of all networks along a curve."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from modeconn import plot
from modeconn.measure.meter import Meter
from modeconn.tools.files import write_text
from modeconn.tools.progress import progress_bar
from modeconn.tools.table import csv_table, html_table, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    r"""Loss and accuracy along a curve.

    Values at all points, ends included, are those of networks whose batch norm was recalibrated in the same way.

    Args:
        t: Positions, from 0 to 1, rising; this and all other tensors float64 on the CPU.
        loss: Mean loss per example, ``(N,)``.
        accuracy: Fraction of right answers, ``(N,)``, or None where targets are no classes.
        arc_length: Length of the curve from 0 to each position, ``(N,)``, in the norm of weight space.
        own_loss: Loss of both ends with the statistics they came with, ``(2,)``.
        own_accuracy: Accuracy of both ends with the statistics they came with, ``(2,)``, or None.
        num_examples: How many examples were evaluated at each point.
        seconds: How long all that took.

    Example:
        >>> t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        >>> Profile(t, loss=1 - t / 2 + (t == 0.5), accuracy=0.5 + t / 4, arc_length=t).barrier
        1.0
    """

    t: Tensor
    loss: Tensor
    accuracy: Tensor | None
    arc_length: Tensor
    own_loss: Tensor | None = None
    own_accuracy: Tensor | None = None
    num_examples: int = 0
    seconds: float = 0.0

    @property
    def error(self) -> Tensor | None:
        """Fraction of wrong answers, ``(N,)``."""
        return None if self.accuracy is None else 1 - self.accuracy

    @property
    def barrier(self) -> float:
        r""":math:`\max_t L(t) - [(1-t) L(0) + t L(1)]`, in units of the loss; 0 or more, since ends count."""
        return float((self.loss - self._between_ends(self.loss)).max())

    @property
    def accuracy_drop(self) -> float | None:
        r""":math:`\max_t [(1-t) A(0) + t A(1)] - A(t)`, a fraction; the barrier in terms of accuracy."""
        return None if self.accuracy is None else float((self._between_ends(self.accuracy) - self.accuracy).max())

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

    def mean(self, values: Tensor) -> float:
        """Return the mean of ``values (N,)`` over t, by trapezoids: the expectation that fitting minimises."""
        return float(torch.trapezoid(values, self.t))

    def arc_mean(self, values: Tensor) -> float:
        """Return the mean of ``values (N,)`` over arc length, by trapezoids, as Tatro et al. (2020) report it.

        A curve without length is one network: its mean over t.
        """
        length = float(self.arc_length[-1])
        return float(torch.trapezoid(values, self.arc_length)) / length if length else self.mean(values)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return minimum, maximum, mean over t and over arc length of loss, accuracy and error."""
        values = {"loss": self.loss, "accuracy": self.accuracy, "error": self.error}
        return {
            name: {
                "min": float(value.min()),
                "max": float(value.max()),
                "mean": self.mean(value),
                "arc_mean": self.arc_mean(value),
            }
            for name, value in values.items()
            if value is not None
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all fields and, for readers, the summary as JSON; also write it to ``path`` if given."""
        record = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        record |= {"barrier": self.barrier, "accuracy_drop": self.accuracy_drop, "summary": self.summary()}
        return write_text(json.dumps(record, indent=1), path)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Invert `to_json`."""
        record = json.loads(text)
        values = {field.name: record[field.name] for field in fields(cls)}
        tensors = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if isinstance(value, list)
        }
        return cls(**{**values, **tensors})

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one row for each point, as comma-separated values; also write it to ``path`` if given."""
        columns = {"t": self.t, "arc_length": self.arc_length, "loss": self.loss}
        if self.accuracy is not None:
            columns |= {"accuracy": self.accuracy, "error": self.error}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return write_text(csv_table(columns, rows), path)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the profile with matplotlib; see `modeconn.plot.profile`."""
        return plot.profile(self, ax=ax)

    def __repr__(self) -> str:
        title = f"Profile({len(self.t)} points, {self.num_examples} examples, {self.seconds:.1f} s)"
        return "\n".join([title, table(*self._table())])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header, and one row for the loss and, if there is one, one for the accuracy; accuracies in percent."""
        header = ["", "t=0", "t=1", "min", "max", "mean", "arc mean", "barrier"]
        has_own = self.own_loss is not None
        if has_own:
            header[3:3] = ["own t=0", "own t=1"]
        rows = [self._row("loss", self.loss, self.own_loss, self.barrier, "{:.4f}")]
        if self.accuracy is not None:
            rows.append(self._row("accuracy", self.accuracy, self.own_accuracy, self.accuracy_drop, "{:.2%}"))
        return header, rows

    def _row(self, name: str, values: Tensor, own: Tensor | None, barrier: float, form: str) -> list[str]:
        own_ends = [] if own is None else own.tolist()
        numbers = [float(values[0]), float(values[-1]), *own_ends, *self.summary()[name].values(), barrier]
        return [name, *(form.format(number) for number in numbers)]

    def _between_ends(self, values: Tensor) -> Tensor:
        return (1 - self.t) * values[0] + self.t * values[-1]


class Networks(Protocol):
    """One network that can be moved along a curve."""

    @property
    def ends_have_their_own(self) -> bool:
        """Whether both ends came with other statistics than those they have when the network is moved there."""
        ...

    def __call__(self, t: float) -> nn.Module:
        """Return the network at ``t``; the next call may change it."""
        ...

    def as_it_came(self, end: int) -> nn.Module:
        """Return the network at one end, 0 or 1, with its own statistics; the next call may change it."""
        ...


def profile_along(
    networks: Networks, meter: Meter, t: Sequence[float], arc_length: Tensor, *, started: float, progress: bool
) -> Profile:
    """Measure the networks at the positions ``t``, then both ends as they came.

    Args:
        networks: What is measured.
        meter: A new one.
        t: From 0 to 1, rising.
        arc_length: Of the curve up to each position, ``(N,)``.
        started: When the work began, by `time.perf_counter`.
        progress: Whether to show a progress bar.
    """
    for position in progress_bar(t, show=progress, desc="evaluate"):
        meter.measure(networks(position))
    count, own = len(t), [0, len(t) - 1]
    if networks.ends_have_their_own:
        own = [count, count + 1]
        for end in (0, 1):
            meter.measure(networks.as_it_came(end))
    loss, accuracy = meter.results()
    return Profile(
        t=torch.tensor(t, dtype=torch.float64),
        loss=loss[:count],
        accuracy=None if accuracy is None else accuracy[:count],
        arc_length=arc_length,
        own_loss=loss[own],
        own_accuracy=None if accuracy is None else accuracy[own],
        num_examples=meter.num_examples,
        seconds=time.perf_counter() - started,
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
