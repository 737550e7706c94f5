"""The epochs of a curve fit that several processes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modeconn.curves.step import BLOCK
from modeconn.learning.epochs import Run
from modeconn.learning.shared_gradient import share_in_mean
from modeconn.network.batches import END
from modeconn.network.shares import is_shared_out, share_of
from modeconn.tools.processes import joined
from modeconn.tools.rng import reseed, seed_of

_UNREAD: Any = object()


class SharedRun(Run):
    """Fits a curve with one batch and one t of each process in every step.

    A step moves the control points along the mean of the processes' gradients, each weighed by what its batch counts,
    as one process would with as many batches. Each process has the next t of the one sequence of all t, so those of one
    step lie in different parts of [0, 1]. What batches are made of is read by one process only; a process whose batches
    are used up goes along without one until the others' are.

    Before gradients are summed, the processes exchange a few numbers: what their batches count, whether they had one,
    whether the first one wants to save the run, whether any was interrupted. So all of them save and end at one step.
    Norm layers see the batch of their own process. Dropout and attacks draw other numbers in each process.

    Args:
        step: Takes the steps, see `Run`, and so for all that is not named here.
        loader: Batches; of a loader that can be shared out the whole, otherwise those of this process.
        loss: What the steps lower.
        seed: For t, and for the streams of random numbers.
        sharded: Whether the loader yields other examples in each process, as its user says.
        settings: Of a `Run`.
    """

    grace = 5.0  # launchers pass on the Ctrl-C that a terminal has sent to all

    def __init__(self, step: Any, loader: Any, loss: Any, *, seed: int, sharded: bool, **settings: Any) -> None:
        self._them = joined()
        share = share_of(loader, self._them, sharded=sharded)
        super().__init__(step, share, loss, seed=seed, **settings)
        self._is_shared_out = is_shared_out(loader, sharded=sharded)
        self._begin_streams()
        lengths = self._them.each(lambda: self._progress.batches_per_epoch)
        self._progress.batches_per_epoch = max(lengths) if all(lengths) else None

    def _begin_streams(self, *place: int) -> None:
        """Let the model, and a loader of its own, draw other numbers in each process."""
        if self._them.is_first and not place:
            return
        if self._is_shared_out:
            torch.default_generator.manual_seed(seed_of(self._seed, 4, self._them.rank, *place))
            self._data_stream = torch.get_rng_state()
        reseed(seed_of(self._seed, 1, self._them.rank, *place), self._device)
        self._epoch_start = self._states()

    def _train_batches(self, iterator: Iterator[Any]) -> None:
        while self._share_batch(iterator):
            pass

    def _share_batch(self, iterator: Iterator[Any]) -> bool:
        """Train on one batch of each process; whether any had one."""
        batch = _UNREAD
        for _ in range(self._loss.num_replays):
            batch, wishes = self._share_step(iterator, batch)
            if wishes is None:
                return False
        self._last_batch = self._last_batch if batch is END else batch
        self._progress.batch += 1
        if any(wishes):
            self._save()
        if wishes[1]:
            raise KeyboardInterrupt
        return True

    def _share_step(self, iterator: Iterator[Any], batch: Any) -> tuple[Any, tuple[bool, bool] | None]:
        """Take one step with the others; return the batch, and whether to save the run and to end it."""
        progress, found = self._progress, {"batch": batch}
        if progress.step % BLOCK == 0:
            self._read_losses()
        t, weights = self._position(progress.drawn + self._them.rank)

        def differentiate() -> list[float]:
            found["batch"] = self._fetch(iterator) if batch is _UNREAD else batch
            if found["batch"] is END:
                self._step.gradient.zero_()
                counts = 0.0
            else:
                found["loss"] = self._step.differentiate(found["batch"], weights, self._loss.at(progress.epoch))
                loss, weight = self._loss.weigh(found["batch"], found["loss"])
                self._pending.append((t, loss, weight))
                counts = self._loss.count(weight)
            saves = self._them.is_first and self._file.is_due(progress.batch + 1)
            return [counts, found["batch"] is not END, saves, self._interrupted]

        def summed(numbers: Tensor) -> Tensor | None:
            share = share_in_mean(numbers[:, 0], numbers[:, 1], self._them.rank)
            return None if share is None else self._step.gradient.mul_(share)

        _, had_one, saves, interrupted, *_ = self._them.numbers(differentiate, summed).unbind(1)
        if not had_one.any():
            return END, None
        self._recipe.set_learning_rate(self._step.optimizer, progress.fractional_epoch)
        self._step.update()
        if "loss" in found:
            self._tell_of_step(t, found["loss"])
        progress.step += 1
        progress.drawn += self._them.size
        return found["batch"], (bool(saves.any()), bool(interrupted.any()))

    def _pending_numbers(self) -> list[tuple[float, float, float]]:
        parts = self._them.each(super()._pending_numbers)
        return [numbers for part in parts for numbers in part]

    def _catch_up(self, iterator: Iterator[Any]) -> bool:
        return all(self._them.each(lambda: Run._catch_up(self, iterator)))

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned; streams of other processes than those that saved it begin anew."""
        super().load_state(tensors, about)
        if self._saved_by != self._them.size:
            self._begin_streams(self._them.size, self._progress.step)
