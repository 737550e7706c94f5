"""Hooks into what takes long: what callbacks are told, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from modeconn.tools.processes import OtherProcessError, joined
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn


@dataclass(frozen=True)
class RunBegin:
    """A run that begins anew, not one that goes on from a checkpoint.

    Args:
        num_epochs: Epochs of the whole run.
    """

    num_epochs: int


@dataclass(frozen=True)
class StepEnd:
    """A step of training.

    Args:
        epoch: Finished epochs.
        step: Which step of the run, from 0.
        t: Position on the curve, in [0, 1]; None where one network is trained.
        loss: The training loss, a scalar on the device; to read it there is to wait for the device.
    """

    epoch: int
    step: int
    t: float | None
    loss: Tensor


@dataclass(frozen=True)
class EpochEnd:
    """An epoch of training: along a curve, or of one network. Exactly one of ``connection`` and ``model`` is there.

    Args:
        epoch: Finished epochs, from 1.
        num_epochs: Epochs of the whole run.
        loss: Mean training loss of the epoch.
        seconds: Time of training so far.
        connection: Called without arguments it returns the `modeconn.Connection` as it is now, a copy; None where one
            network is trained.
        model: Called without arguments it returns the network as it is now, a copy in eval mode; None where a curve is
            trained.
        training: Beside ``model``, data and loss of the run, a `modeconn.TrainingData`; a connection has its own.
        values: What callbacks measured after this epoch, by name; add to it what others should see, numbers under any
            name but "epoch", "loss" and "seconds". A callback with ``reads_values`` finds all of it.
    """

    epoch: int
    num_epochs: int
    loss: float
    seconds: float
    connection: Callable[[], Any] | None = None
    model: Callable[[], Any] | None = None
    training: Any = None
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MoveEnd:
    """A relabelling that `modeconn.PAM` tried.

    Args:
        epoch: The epoch before which it was tried.
        num_tried: Relabellings tried in this step in the permutation, this one included.
        num_planned: How many are planned so far; 0 if that is not known.
        num_accepted: How many were kept.
        loss: The loss along the curve on the sample, now.
    """

    epoch: int
    num_tried: int
    num_planned: int
    num_accepted: int
    loss: float


@dataclass(frozen=True)
class PointEnd:
    """A network on a curve that was measured.

    Args:
        t: Its position, in [0, 1].
        num_measured: Networks measured, this one included.
        num_points: Networks to measure.
    """

    t: float
    num_measured: int
    num_points: int


class Callback(Shown):
    """What is told how a run goes on; inherit from it, or write a class with some of its methods.

    Callbacks see what happens and change nothing: random states are as before afterwards, and a run with callbacks ends
    with the same bits as one without. What `state` returns is kept in the checkpoint of the run, if there is one.

    If a callback raises an exception in `after_epoch`, the run ends with it, and the checkpoint holds the finished
    epoch with the states that all callbacks had before it. Where the run goes on, all of them are told of that epoch
    again, of curves and networks alike; what they measured in it the first time counts for nothing.

    Attributes:
        reads_values: Whether it reads what others measured. Such callbacks are told after all others; among themselves,
            and the others among themselves, they are told in the order of the list.
    """

    reads_values: ClassVar[bool] = False

    def check_trained(self, kind: Literal["curve", "network"]) -> None:
        """Raise a ValueError if the callback is not for a run that trains this; called before any work."""

    def measured_names(self, kind: Literal["curve", "network"]) -> Sequence[str] | None:
        """Return the names of all that it may add to ``event.values`` in such a run; None if it does not say."""
        return None

    def check_values(self, names: Sequence[str], *, are_all: bool) -> None:
        """Raise a ValueError if the callback waits for a value that there will not be; called before any work.

        Args:
            names: What the callbacks of the run say they measure.
            are_all: Whether nothing else will be measured, since each of them says it or hears of no epoch.
        """

    def before_run(self, event: RunBegin) -> None:
        """Forget what an earlier run left; not called where a run goes on."""

    def after_step(self, event: StepEnd) -> None:
        """Take note of a step of training."""

    def after_epoch(self, event: EpochEnd) -> bool | None:
        """Take note of an epoch; True ends the run here."""

    def after_move(self, event: MoveEnd) -> None:
        """Take note of a relabelling that was tried."""

    def after_point(self, event: PointEnd) -> None:
        """Take note of a network that was measured."""

    def state(self) -> dict[str, Any]:
        """Return what the callback must know to go on after an interruption, as JSON can hold it."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


_OF_EVERY_EPOCH = ("epoch", "loss", "seconds")
_MOMENTS = tuple(name for name in vars(Callback) if name.startswith(("before_", "after_")))


class Callbacks:
    """Several callbacks, told one after another.

    Args:
        callbacks: Objects with at least one of the methods of `Callback`.
        device: Where random numbers are drawn.
        trained: What the run trains, "curve" or "network"; None if it trains nothing.

    Attributes:
        untold: The loss of a finished epoch of which callbacks have yet to be told, since one of them failed in it;
            None if there is none.
        is_stopped: Whether a callback wanted the run to end.

    Raises:
        ValueError: If one of them is a class, has none of the methods, is not for what is trained, or waits for a value
            that none of them measures.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] = (),
        device: torch.device | str = "cpu",
        trained: Literal["curve", "network"] | None = None,
    ) -> None:
        if not isinstance(callbacks, Sequence):
            raise ValueError(f"callbacks must be a list of callbacks, got callbacks={callbacks!r}.")
        for one in callbacks:
            if isinstance(one, type) or not any(callable(getattr(one, moment, None)) for moment in _MOMENTS):
                raise ValueError(f"a callback must be an object with one of {', '.join(_MOMENTS)}, got {one!r}.")
            if trained is not None and hasattr(one, "check_trained"):
                one.check_trained(trained)
        told = sorted(callbacks, key=lambda one: bool(getattr(one, "reads_values", False)))
        self._by_moment = {moment: [one for one in told if _has_own(one, moment)] for moment in _MOMENTS}
        if trained is not None:
            self._check_values(trained)
        self._device = torch.device(device)
        self._all = list(callbacks)
        self.untold: float | None = None
        self.is_stopped = False
        self._before: list[Any] = []  # what callbacks knew before the epoch of which they have yet to be told
        self._new: list[Any] = []  # those that were not there before a run was interrupted

    def _check_values(self, trained: Literal["curve", "network"]) -> None:
        told = self._by_moment["after_epoch"]
        said = [one.measured_names(trained) if hasattr(one, "measured_names") else None for one in told]
        names = [name for own in said if own is not None for name in own]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two callbacks measure {twice!r}, and one would hide the other: give them names, such as "
                f"Validation(loader, name='second')."
            )
        for one in told:
            if hasattr(one, "check_values"):
                one.check_values(names, are_all=None not in said)

    def begin_run(self, num_epochs: int, *, is_new: bool) -> None:
        """Tell callbacks that a run begins; where it goes on, those alone that were not there before."""
        for one in self._by_moment["before_run"]:
            if is_new or any(one is other for other in self._new):
                with seeded(0, self._device):
                    one.before_run(RunBegin(num_epochs))

    def hear(self, moment: str) -> bool:
        """Whether any callback is to be told of a moment, such as "after_step"."""
        return bool(self._by_moment[moment])

    def tell(self, moment: str, event: Any) -> bool:
        """Tell all callbacks of a moment; whether one of them wants the run to end."""
        if not self._by_moment[moment]:
            return False
        with seeded(0, self._device):
            answers = [getattr(one, moment)(event) for one in self._by_moment[moment]]
        return any(map(_is_true, answers))

    def end_epoch(self, event: EpochEnd) -> bool:
        """Tell callbacks of an epoch, in all processes that share the run; whether any here was to be told.

        Then `is_stopped` says whether one of them, in any process, wants the run to end. What fails in one process is
        raised in all, and `state` is that before, with the epoch as one that is left to be told.

        Raises:
            ValueError: If what a callback measured is no number, or has a name that is taken.
        """
        is_heard = self.hear("after_epoch")
        if is_heard or joined().size > 1:  # in which others may have callbacks
            self._before, self.untold = copy.deepcopy(self._known()), event.loss
            self.is_stopped = _tell_in_all(lambda: self._tell_of_epoch(event))
        self.untold = None
        return is_heard

    def _tell_of_epoch(self, event: EpochEnd) -> bool:
        is_over = False
        with seeded(0, self._device):
            for one in self._by_moment["after_epoch"]:
                is_over |= _is_true(one.after_epoch(event))
                for name, value in event.values.items():  # before the next one reads them
                    event.values[name] = _number_of(name, value)
        return is_over

    def _known(self) -> list[Any]:
        return [[_name(one), one.state() if hasattr(one, "state") else {}] for one in self._all]

    own = ("callbacks",)  # each of several processes may have others

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of all callbacks and whether they ended the run, as a part of it."""
        known = self._known() if self.untold is None else self._before
        return {}, {"callbacks": known, "untold": self.untold, "is_stopped": self.is_stopped}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned to the next callback of the same class; others begin anew, with a warning.

        Files of older versions may know of nothing here.
        """
        self.untold, self.is_stopped = about.get("untold"), about.get("is_stopped", False)
        left, new = list(about.get("callbacks", [])), []
        for one in self._all:
            known = next((pair for pair in left if pair[0] == _name(one)), None)
            if known is not None:
                left.remove(known)
                if hasattr(one, "load_state"):
                    one.load_state(known[1])
                continue
            self._new.append(one)
            if hasattr(one, "state") and one.state():
                new.append(_name(one))
        gone = [name for name, state in left if state]
        if gone or new:
            warn(
                f"the run goes on with other callbacks: what {', '.join(gone) or 'none'} knew is lost, and "
                f"{', '.join(new) or 'none'} begin anew."
            )
        self._before = copy.deepcopy(self._known())


def _is_true(answer: Any) -> bool:
    """Whether a callback answered True, be it Python's, numpy's or torch's."""
    is_truth = isinstance(answer, (bool, np.bool_)) or (isinstance(answer, Tensor) and answer.dtype is torch.bool)
    return is_truth and bool(answer)


def _tell_in_all(tell: Callable[[], bool]) -> bool:
    """Tell callbacks in all processes that share a run; whether one of them, in any process, wants it to end.

    What fails in one process is raised in all, once all have told theirs, so that they can save the run together.
    """
    failed: list[BaseException] = []

    def told() -> tuple[bool, str | None]:
        try:
            return tell(), None
        except BaseException as error:
            failed.append(error)
            return False, repr(error)

    them = joined()
    answers = them.each(told)
    if failed:
        raise failed[0]
    for rank, (_, why) in enumerate(answers):
        if why is not None:
            raise OtherProcessError(f"process {rank} of {them.size} failed: {why}")
    return any(is_over for is_over, _ in answers)


def _number_of(name: str, value: Any) -> float:
    """Return a value that a callback measured as a number, which files can hold.

    Raises:
        ValueError: If it is none, or has the name of something that is known of every epoch.
    """
    if name in _OF_EVERY_EPOCH:
        raise ValueError(
            f"event.values[{name!r}] has the name of what is known of every epoch ({', '.join(_OF_EVERY_EPOCH)}): give "
            f"it another name, such as 'my {name}'."
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"event.values[{name!r}] must be a number, got {value!r:.80}.") from None


def _name(callback: Any) -> str:
    return type(callback).__qualname__


def _has_own(callback: Any, moment: str) -> bool:
    """Whether a callback does something at a moment, and not merely inherits nothing."""
    method = getattr(callback, moment, None)
    return callable(method) and getattr(type(callback), moment, None) is not getattr(Callback, moment)
