"""Loss and accuracy of one network, and of all networks along a curve."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeconn.network.batches import batches, num_examples
from modeconn.network.loss import LossFn, check_targets, is_classification, main_output
from modeconn.tools.table import html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Objective = Callable[[nn.Module, Any], Tensor]
"""``forward(model, batch) -> loss``, a mean over the examples of the batch."""

_KEPT_BYTES = 1 << 30


def fetch(loader: Iterable[Any], device: torch.device, *, limit: int = _KEPT_BYTES) -> Iterable[Any]:
    """Read a loader once and keep its batches on ``device``, to be used for every point of a curve.

    More than ``limit`` bytes are not kept: the loader is then read anew for every point.
    """
    kept, size = [], 0
    for batch in batches(loader, device):
        kept.append(batch)
        size += _num_bytes(batch)
        if size > limit:
            return _Reread(loader, device)
    return kept


@dataclass(frozen=True)
class _Reread:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Any:
        return batches(self.loader, self.device)


def _num_bytes(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.nbytes
    if isinstance(batch, dict):
        return sum(map(_num_bytes, batch.values()))
    return sum(map(_num_bytes, batch)) if isinstance(batch, (tuple, list)) else 0


class Meter:
    """Measures networks on the same data: mean loss per example and, for class targets, accuracy.

    Results stay on the device until they are read, so that measuring many networks does not wait for each.

    Args:
        data: Batches on the device of the networks, from `fetch`.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, for batches that are no ``(inputs, targets)``; there is
            then no accuracy.
    """

    def __init__(self, data: Iterable[Any], loss_fn: LossFn, forward: Objective | None = None) -> None:
        self._data = data
        self._loss_fn = loss_fn
        self._forward = forward
        self._checked = False
        self._totals: list[Tensor] = []
        self.num_examples = 0

    @torch.no_grad()
    def measure(self, model: nn.Module) -> None:
        """Measure one network, in the mode it is in."""
        totals, self.num_examples = [], 0
        for batch in self._data:
            size = num_examples(batch)
            totals.append(self._batch_means(model, batch) * size)  # by size: the last batch may be a small one
            self.num_examples += size
        self._totals.append(torch.stack(totals).sum(0) / self.num_examples)
        self._checked = True

    def results(self) -> tuple[Tensor, Tensor | None]:
        """Return loss and accuracy, each float64 ``(M,)`` on the CPU, of all networks measured so far."""
        loss, accuracy = torch.stack(self._totals).cpu().unbind(1)
        return loss, None if accuracy.isnan().all() else accuracy

    def _batch_means(self, model: nn.Module, batch: Any) -> Tensor:
        if self._forward is not None:
            loss = self._forward(model, batch).double()
            return torch.stack([loss, torch.full_like(loss, torch.nan)])
        inputs, targets = batch
        outputs = model(inputs)
        if not self._checked:
            check_targets(outputs, targets, self._loss_fn)
        loss = self._loss_fn(outputs, targets).double()
        if not is_classification(outputs, targets):
            return torch.stack([loss, torch.full_like(loss, torch.nan)])
        correct = main_output(outputs).argmax(1) == targets
        return torch.stack([loss, correct.double().mean()])


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
        own_accuracy: Their accuracy, likewise.
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
        text = json.dumps(record, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

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
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        if path is not None:
            Path(path).write_text(buffer.getvalue(), encoding="utf-8")
        return buffer.getvalue()

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the profile with matplotlib; see `modeconn.plot.profile`."""
        from modeconn import plot

        return plot.profile(self, ax=ax)

    def __repr__(self) -> str:
        title = f"Profile({len(self.t)} points, {self.num_examples} examples, {self.seconds:.1f} s)"
        rows = self._table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([title, *lines])

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        return html_table(header, rows)

    def _table(self) -> list[list[str]]:
        """One row for the loss and, if there is one, one for the accuracy; accuracies in percent."""
        header = ["", "t=0", "t=1", "min", "max", "mean", "arc mean", "barrier"]
        has_own = self.own_loss is not None
        if has_own:
            header[3:3] = ["own t=0", "own t=1"]
        rows = [header, self._row("loss", self.loss, self.own_loss, self.barrier, "{:.4f}")]
        if self.accuracy is not None:
            rows.append(self._row("accuracy", self.accuracy, self.own_accuracy, self.accuracy_drop, "{:.2%}"))
        return rows

    def _row(self, name: str, values: Tensor, own: Tensor | None, barrier: float, form: str) -> list[str]:
        own_ends = [] if own is None else own.tolist()
        numbers = [float(values[0]), float(values[-1]), *own_ends, *self.summary()[name].values(), barrier]
        return [name, *(form.format(number) for number in numbers)]

    def _between_ends(self, values: Tensor) -> Tensor:
        return (1 - self.t) * values[0] + self.t * values[-1]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
