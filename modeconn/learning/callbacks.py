"""Callbacks that come along: validation, early stopping, networks of past epochs, and records for other programs."""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from modeconn.measure.along import chosen_positions
from modeconn.measure.measurable import Measurable
from modeconn.measure.one_network import evaluate, metrics_of_one
from modeconn.network.batches import check_rereadable
from modeconn.network.saving import save
from modeconn.tools import provenance
from modeconn.tools.callbacks import Callback, EpochEnd, MoveEnd, PointEnd, RunBegin, StepEnd
from modeconn.tools.checks import there_are
from modeconn.tools.door import check_arguments, looked_at
from modeconn.tools.processes import joined
from modeconn.tools.warn import warn
from modeconn.tools.writing import check_writable, made_folder, write_text

__all__ = [
    "CSVLog",
    "Callback",
    "EarlyStopping",
    "EpochEnd",
    "KeepEpochs",
    "MoveEnd",
    "PointEnd",
    "RunBegin",
    "StepEnd",
    "TensorBoardLog",
    "Validation",
]


class Validation(Callback):
    """Measures what is trained after epochs, on data that nothing is trained on.

    Of a curve, the networks at chosen positions, as `Connection.evaluate` does: batch norm is recalibrated on the
    training data. Of one network, itself as it is, as `modeconn.evaluate` does: batch norm has its running statistics,
    with which it would be used, unless there is ``recalibrate``. After training against an adversary
    `modeconn.models.train` recalibrates on clean data; ``recalibrate=`` shows what the network is worth after that.

    Args:
        loader: Validation data.
        t: Positions on the curve in [0, 1], rising; default 0.5. Not for one network.
        every: Measure after epochs that it divides, and after the last.
        name: What names of values begin with; a second one in a run needs another, such as "test".
        settings: Of `Connection.evaluate`, such as ``recalibrate`` or ``metrics``; for one network those that
            `modeconn.evaluate` has too. The loss is that of the run by default.

    Attributes:
        values: One mapping for each measurement: "epoch", and by name "validation loss, t=0.5" and so on; of one
            network "validation loss" and so on, with ``name`` in front. Positions have at most 12 digits: "t=0.3".

    Raises:
        ValueError: If a setting is out of range or unknown; at the begin of a run, if it is not for what is trained.
    """

    @looked_at
    def __init__(
        self,
        loader: Iterable[Any],
        t: Sequence[float] | None = None,
        *,
        every: int = 1,
        name: str = "validation",
        **settings: Any,
    ) -> None:
        _check_every(every)
        if not name.strip():
            raise ValueError(f"name must be a word, got name={name!r}.")
        _check_evaluation(loader, t, settings)
        self._loader, self._every, self._name, self._settings = loader, every, name, settings
        self._t = None if t is None else chosen_positions(t, 2)
        self.values: list[dict[str, float]] = []

    def check_trained(self, kind: Literal["curve", "network"]) -> None:
        """Raise a ValueError if there are positions, or settings for a curve, where one network is trained."""
        if kind != "network":
            return
        if self._t is not None:
            raise ValueError(
                f"t are positions on a curve, and here one network is trained: leave it out of Validation, got "
                f"t={self._t}."
            )
        try:
            bound = inspect.signature(evaluate).bind(None, self._loader, **self._settings)
        except TypeError as error:
            raise ValueError(
                f"where one network is trained, Validation takes the settings of modeconn.evaluate: {error}."
            ) from None
        del bound.arguments["model"]
        check_arguments(evaluate, bound)
        metrics_of_one(self._settings.get("metrics"))

    @property
    def _positions(self) -> list[float]:
        return [0.5] if self._t is None else self._t

    def _places(self, kind: Literal["curve", "network"]) -> list[str]:
        """Return how names end, one for each network that is measured."""
        return [""] if kind == "network" else [f", t={t:.12g}" for t in self._positions]

    def measured_names(self, kind: Literal["curve", "network"]) -> list[str]:
        """Return the names of all values; accuracy is one where there are classes."""
        names = ("loss", "accuracy", *(self._settings.get("metrics") or ()))
        return [f"{self._name} {name}{place}" for place in self._places(kind) for name in names]

    def before_run(self, event: RunBegin) -> None:
        """Forget the measurements of an earlier run."""
        self.values = []

    def after_epoch(self, event: EpochEnd) -> None:
        """Measure, in the epochs that ``every`` chooses."""
        if event.epoch % self._every and event.epoch < event.num_epochs:
            return
        if event.model is None:
            profile = event.connection().evaluate(self._loader, t=self._positions, **self._settings)
            places = self._places("curve")
        else:
            run = event.training
            own = {} if "loss_fn" in self._settings else {"loss_fn": run.loss_fn, "forward": run.forward}
            profile = evaluate(event.model(), self._loader, **{**own, **self._settings})
            places = self._places("network")
        found = {
            f"{self._name} {name}{place}": float(value)
            for name, values in profile.values.items()
            for place, value in zip(places, values, strict=True)
            if name != "error"
        }
        self.values.append({"epoch": event.epoch, **found})
        event.values.update(found)

    def state(self) -> dict[str, Any]:
        """Return all measurements."""
        return {"values": self.values}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.values = list(state["values"])


def _check_every(every: int) -> None:
    """Raise a ValueError unless something can be done after every so many epochs."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got every={every}.")


def _check_evaluation(loader: Any, t: Sequence[float] | None, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for settings that `Connection.evaluate` does not take, before a run that would end on them."""
    check_rereadable(loader)
    try:
        bound = inspect.signature(Measurable.evaluate).bind(None, loader, t=t, **settings)
    except TypeError as error:
        raise ValueError(f"Validation takes the settings of Connection.evaluate: {error}.") from None
    check_arguments(Measurable.evaluate, bound)


class _MeasuresNothing(Callback):
    """A callback that adds nothing to what was measured."""

    def measured_names(self, kind: Literal["curve", "network"]) -> tuple[str, ...]:
        """Return no name."""
        return ()


class EarlyStopping(_MeasuresNothing):
    """Ends a run when a value has not become better for some epochs.

    Args:
        monitor: "loss", the training loss, or the name of a value that another callback measures, such as "validation
            loss, t=0.5" of `Validation` along a curve, or "validation loss" of one for a network.
        patience: Measurements without a better value after which the run ends, at least 1.
        higher_is_better: Whether high values are good.
        margin: By how much a value must be better to count.

    Raises:
        ValueError: If a setting is out of range; at the begin of a run, if all its callbacks say what they measure and
            the value is none of that.

    Warns:
        UserWarning: In a run with callbacks that do not say what they measure, after the first epoch in which there
            are values and this is none of them; and at the end of a run in which there was no such value.
    """

    reads_values = True

    @looked_at
    def __init__(
        self, monitor: str = "loss", *, patience: int = 5, higher_is_better: bool = False, margin: float = 0.0
    ) -> None:
        if patience < 1 or not 0 <= margin < math.inf:
            raise ValueError(
                f"patience must be at least 1 and margin finite, at least 0, got patience={patience}, margin={margin}."
            )
        self.monitor, self.patience, self.higher_is_better, self.margin = monitor, patience, higher_is_better, margin
        self._is_expected = False
        self._forget()

    def _forget(self) -> None:
        self.best, self.num_worse, self._was_measured, self._has_warned = math.inf, 0, False, False

    def check_values(self, names: Sequence[str], *, are_all: bool) -> None:
        """Raise a ValueError if the value that is watched will never be measured."""
        self._is_expected = self.monitor in ("loss", *names)
        if are_all and not self._is_expected:
            raise ValueError(
                f"EarlyStopping would watch {self.monitor!r}, which no callback of this run measures; "
                f"{there_are(map(repr, ('loss', *names)))}. Pass one of these as monitor, or add the callback that "
                f"measures it."
            )

    def before_run(self, event: RunBegin) -> None:
        """Forget the best value of an earlier run."""
        self._forget()

    def after_epoch(self, event: EpochEnd) -> bool:
        """Compare the value with the best so far."""
        known = {"loss": event.loss, **event.values}
        if self.monitor not in known:  # as in epochs without a measurement
            self._warn_of_missing(event, known)
            return False
        self._was_measured = True
        value = -known[self.monitor] if self.higher_is_better else known[self.monitor]
        if value < self.best - self.margin:
            self.best, self.num_worse = value, 0
        else:
            self.num_worse += 1
        return self.num_worse >= self.patience

    def _warn_of_missing(self, event: EpochEnd, known: Iterable[str]) -> None:
        """Warn as soon as the value seems never to come, and where it never came; raising would lose the run."""
        if self._was_measured:
            return
        there = there_are(map(repr, known))
        if event.epoch == event.num_epochs:
            warn(f"EarlyStopping watched {self.monitor!r}, which was never measured; {there}.")
        elif event.values and not self._is_expected and not self._has_warned:
            self._has_warned = True
            warn(
                f"EarlyStopping watches {self.monitor!r}, which was not measured after epoch {event.epoch}; {there}. "
                f"If it never is, the run goes on to its last epoch, {event.num_epochs}."
            )

    def state(self) -> dict[str, Any]:
        """Return the best value, and how often no better one came since."""
        return {"best": self.best, "num_worse": self.num_worse, "was_measured": self._was_measured}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best, self.num_worse, self._was_measured = state["best"], state["num_worse"], state["was_measured"]


class KeepEpochs(_MeasuresNothing):
    """Keeps what is trained as it is after epochs, in a folder: ``epoch_10.safetensors`` and so on.

    A network is written as `modeconn.models.save` does, a connection as `Connection.save` does, each all or nothing.
    Files of these names are replaced, others in the folder stay; a run that goes on from a checkpoint adds to them.

    Args:
        folder: Made if it is not there.
        every: Keep it after every so many epochs.

    Raises:
        ValueError: If ``every`` is not positive.
        OSError: If the folder cannot be made, or nothing can be written to it.
    """

    @looked_at
    def __init__(self, folder: str | os.PathLike[str], *, every: int = 1) -> None:
        _check_every(every)
        self._folder, self._every = made_folder(folder), every

    def after_epoch(self, event: EpochEnd) -> None:
        """Write a file, in the epochs that ``every`` chooses."""
        if event.epoch % self._every or not joined().is_first:
            return
        path = self._folder / f"epoch_{event.epoch}.safetensors"
        kept = event.connection() if event.model is None else event.model()
        provenance.keep(kept, provenance.now())
        if event.model is None:
            kept.save(path)
        else:
            save(kept, path)


class CSVLog(_MeasuresNothing):
    """Writes loss, seconds and what other callbacks measured into a CSV file, a row an epoch.

    Args:
        path: The file; a run that goes on from a checkpoint goes on in it, a new run begins it anew.

    Raises:
        OSError: If it cannot be written.
    """

    reads_values = True

    @looked_at
    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_writable(path)
        self._path, self._rows = Path(path), []  # type: ignore[var-annotated]

    def before_run(self, event: RunBegin) -> None:
        """Forget the rows of an earlier run."""
        self._rows = []

    def after_epoch(self, event: EpochEnd) -> None:
        """Write all rows; a name that comes later has empty cells before."""
        self._rows.append({"epoch": event.epoch, "loss": event.loss, "seconds": event.seconds, **event.values})
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        if joined().is_first:
            write_text(file.getvalue(), self._path)

    def state(self) -> dict[str, Any]:
        """Return all rows."""
        return {"rows": self._rows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._rows = list(state["rows"])


class TensorBoardLog(_MeasuresNothing):
    """Hands loss and what other callbacks measured to a writer with ``add_scalar(name, value, step)``.

    Args:
        writer: Such as `torch.utils.tensorboard.SummaryWriter`.
    """

    reads_values = True

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise ValueError(f"writer must have add_scalar(name, value, step), got {writer!r}.")
        self._writer = writer

    def after_epoch(self, event: EpochEnd) -> None:
        """Hand over all values."""
        for name, value in {"loss": event.loss, **event.values}.items() if joined().is_first else ():
            self._writer.add_scalar(name, value, event.epoch)
