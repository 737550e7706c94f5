"""The epochs of a curve fit: data and randomness in order, a history, and a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modeconn.curves.step import BLOCK, CurveStep, stratified_positions
from modeconn.learning.checkpoint import Resumable, RunFile, State, processes_of, warn_of_own_generator
from modeconn.learning.history import History, keep_values
from modeconn.learning.parts import mean_of_epoch, pack_rng, unpack_rng
from modeconn.learning.step_loss import StepLoss
from modeconn.network.batches import END, batches, check_length, checksum
from modeconn.network.shares import begin_epoch
from modeconn.network.weights import are_finite
from modeconn.tools.callbacks import Callbacks, EpochEnd, StepEnd
from modeconn.tools.door import check_settings
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import rng_state, set_rng_state
from modeconn.tools.warn import warn

_LOGGER = logging.getLogger(__name__)

NUM_BINS = 10
"""Bins of t in the history."""


@dataclass
class _Progress:
    """How far a run has come, and the losses of the running epoch by bin of t, summed over what counts."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    drawn: int = 0  # positions t; more than steps where several processes take a step together
    batches_per_epoch: int | None = None
    loss_sums: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    counts: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    loss: list[float] = field(default_factory=list)
    loss_by_t: list[list[float | None]] = field(default_factory=list)
    seconds: float = 0.0
    values: list[dict[str, float]] = field(default_factory=list)

    @property
    def fractional_epoch(self) -> float:
        return self.epoch + (min(self.batch / self.batches_per_epoch, 1.0) if self.batches_per_epoch else 0.0)

    def add(self, t: float, loss: float, weight: float) -> None:
        index = int(t * NUM_BINS)
        self.loss_sums[index] += loss * weight
        self.counts[index] += weight

    def start_epoch_anew(self) -> None:
        self.batch, self.loss_sums, self.counts = 0, [0.0] * NUM_BINS, [0.0] * NUM_BINS

    def end_epoch(self) -> None:
        self.loss.append(mean_of_epoch(sum(self.loss_sums), sum(self.counts)))
        sums = zip(self.loss_sums, self.counts, strict=True)
        self.loss_by_t.append([loss / count if count else None for loss, count in sums])
        self.batches_per_epoch = self.batch
        self.epoch += 1
        self.start_epoch_anew()


class BetweenEpochs(Resumable, Protocol):
    """What changes a run between its epochs, as `PAM` does.

    Attributes:
        turns: What it did each time.
        is_finished: Whether the run ends here.
    """

    turns: list[dict[str, Any]]
    is_finished: bool

    def before_epoch(self, epoch: int) -> None:
        """Do what is due before an epoch."""
        ...


class Run:
    """Fits a curve, epoch by epoch, within one stretch of `modeconn.tools.rng.seeded`.

    Loader and model draw from two streams of torch's CPU generator, exchanged around every fetch. So the batches of
    an epoch follow from the random state at its start, whatever the model draws in between, and a run is taken up
    inside an epoch by starting it from that state and leaving out the batches already seen.

    Args:
        step: Takes the steps by its recipe; its control points are learned in place.
        loader: Batches.
        loss: What the steps lower.
        seed: For t and the model's stream.
        file: Where the run saves itself, and goes on from.
        between: What changes the relabelling of b between epochs, or None.
        callbacks: What is told of steps and epochs.
        connection: Returns the connection as it is now, for callbacks.
    """

    def __init__(
        self,
        step: CurveStep,
        loader: Iterable[Any],
        loss: StepLoss,
        *,
        seed: int,
        file: RunFile,
        between: BetweenEpochs | None = None,
        callbacks: Callbacks | None = None,
        connection: Callable[[], Any] | None = None,
    ) -> None:
        self._callbacks, self._connection = callbacks or Callbacks(), connection
        self._step, self._loader, self._recipe, self._loss = step, loader, step.recipe, loss
        self._seed, self._file, self._between = seed, file, between
        self._device = step.control_points.device
        self._progress = _Progress()
        with contextlib.suppress(TypeError):  # unknown for a loader without a length until its first epoch is over
            self._progress.batches_per_epoch = len(loader)

        self._data_stream = torch.get_rng_state()
        torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        self._epoch_start = self._states()
        self._saved_by = joined().size  # processes
        self._seen: int | None = None  # checksum of the batch before the checkpoint, while its epoch is taken up

        self._block: tuple[int, list[float], list[list[float]]] | None = None
        self._pending: list[tuple[float, Tensor, Tensor | float]] = []
        self._last_batch: Any = None
        self._started = time.perf_counter()
        self._waiting = self._interrupted = False
        self._interrupted_at = 0.0

    def train(self, *, progress: bool = False) -> History:
        """Train to the end, from where the run was saved if it was, and return the history.

        Args:
            progress: Whether to show a progress bar.

        Raises:
            FloatingPointError: If loss or weights stop being finite.
            KeyboardInterrupt: After Ctrl-C, when the step is done and a checkpoint, if there are any, written.
        """
        self._callbacks.begin_run(self._recipe.epochs, is_new=not self._file.resume(*self._parts))
        self._started = time.perf_counter() - self._progress.seconds
        bar = progress_bar(show=progress, total=self._recipe.epochs, initial=self._progress.epoch, unit="epoch")
        with bar, self._interrupts_between_steps():
            if self._callbacks.untold is not None:
                self._tell_of_epoch()
            while self._progress.epoch < self._recipe.epochs and not self._callbacks.is_stopped:
                if self._between and self._progress.batch == 0:
                    self._between.before_epoch(self._progress.epoch)
                    if self._between.is_finished:
                        break
                self._train_epoch()
                bar.update()
                bar.set_postfix(loss=f"{self._progress.loss[-1]:.4g}")
            if self._interrupted:
                raise KeyboardInterrupt
        turns = self._between.turns if self._between else []
        done = self._progress
        return History(done.loss, done.loss_by_t, done.seconds, turns, done.values, joined().size)

    @property
    def _parts(self) -> tuple[Resumable, ...]:
        return self._step, self._loss, *([self._between] if self._between else []), self._callbacks, self

    def _train_epoch(self) -> None:
        self._train_batches(self._start_epoch())
        self._read_losses()
        check_length(self._progress.batch, self._progress.batches_per_epoch or self._progress.batch)
        self._progress.end_epoch()
        self._epoch_start = self._states()
        self._tell_of_epoch()
        _LOGGER.info("epoch %d: training loss %.4f", self._progress.epoch, self._progress.loss[-1])

    def _tell_of_epoch(self) -> None:
        done = self._progress
        done.seconds = time.perf_counter() - self._started
        event = EpochEnd(done.epoch, self._recipe.epochs, done.loss[-1], done.seconds, self._connection)
        try:
            if self._callbacks.end_epoch(event):
                keep_values(done.values, done.epoch, event.values)
        finally:  # an exception in a callback must not lose the epoch
            self._save()

    def _train_batches(self, iterator: Iterator[Any]) -> None:
        """Train on the batches of an epoch."""
        while (batch := self._next(iterator)) is not END:
            for _ in range(self._loss.num_replays):
                self._take_step(batch)
            self._last_batch = batch
            self._progress.batch += 1
            if self._file.is_due(self._progress.batch):
                self._save()

    def _take_step(self, batch: Any) -> None:
        progress = self._progress
        if progress.step % BLOCK == 0:
            self._read_losses()
        self._recipe.set_learning_rate(self._step.optimizer, progress.fractional_epoch)
        t, weights = self._position(progress.drawn)
        loss = self._step(batch, weights, self._loss.at(progress.epoch))
        self._pending.append((t, *self._loss.weigh(batch, loss)))
        self._tell_of_step(t, loss)
        progress.step += 1
        progress.drawn += 1

    def _tell_of_step(self, t: float, loss: Tensor) -> None:
        if self._callbacks.hear("after_step"):
            event = StepEnd(self._progress.epoch, self._progress.step, t, loss.detach().clone())
            self._callbacks.tell("after_step", event)

    def _position(self, number: int) -> tuple[float, list[float]]:
        """Return one of all t of the run, and the basis weights there."""
        block, place = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            positions = stratified_positions(self._seed, block)
            self._block = block, positions.tolist(), self._step.curve.basis(positions).tolist()
        return self._block[1][place], self._block[2][place]

    def _read_losses(self) -> None:
        """Move pending losses to the history, all at once: reading each would make an accelerator wait every step."""
        pending = self._pending_numbers()
        if not pending:
            return
        for t, loss, weight in pending:
            if not math.isfinite(loss):
                raise FloatingPointError(self._lost(f"the training loss became {loss}", t))
            self._progress.add(t, loss, weight)
        if not are_finite(self._step.control_points):
            raise FloatingPointError(self._lost("the control points stopped being finite", pending[-1][0]))

    def _pending_numbers(self) -> list[tuple[float, float, float]]:
        """Return t, loss and weight of the steps since this was called before."""
        if not self._pending:
            return []
        positions, losses, weights = zip(*self._pending, strict=True)
        self._pending.clear()
        on_device = [torch.as_tensor(weight, device=losses[0].device) for weight in weights]
        numbers = (torch.stack(losses).tolist(), torch.stack(on_device).tolist())
        return list(zip(positions, *numbers, strict=True))

    def _lost(self, what: str, t: float) -> str:
        where = f"in epoch {self._progress.epoch} at t={t:.4f}"
        return f"{what} {where}; try a lower learning rate.{self._file}"

    # -- randomness and data

    own = ("rng_", "last_batch")

    def _fetch(self, iterator: Iterator[Any]) -> Any:
        """Return the next batch, drawn from the loader's stream, or `END`."""
        model_stream = torch.get_rng_state()
        torch.set_rng_state(self._data_stream)
        try:
            batch = next(iterator, END)
            self._data_stream = torch.get_rng_state()
        finally:
            torch.set_rng_state(model_stream)
        return batch

    def _start_epoch(self) -> Iterator[Any]:
        begin_epoch(self._loader, self._progress.epoch)
        iterator = batches(self._loader, self._device)
        is_same = self._saved_by == joined().size
        if self._progress.batch and is_same and self._catch_up(iterator):
            return iterator
        if self._progress.batch:
            self._warn_of_another_epoch(is_same)
            self._progress.start_epoch_anew()
            iterator = batches(self._loader, self._device)
        self._epoch_start = self._states()
        return iterator

    def _warn_of_another_epoch(self, is_same: bool) -> None:
        why = (
            "the loader's order does not follow from torch's random state: "
            if is_same
            else "other processes read other batches: "
        )
        warn(
            f"{why}the run was interrupted after batch {self._progress.batch} of epoch {self._progress.epoch}, and now "
            f"that batch is another one. The epoch starts anew, from the weights of the checkpoint, and the run will "
            f"not end with the same bits."
        )

    def _catch_up(self, iterator: Iterator[Any]) -> bool:
        """Leave out the batches seen before the checkpoint; whether the last of them is the one it was."""
        now = self._states()
        self._set_states(self._epoch_start)
        batch = None
        for _ in range(self._progress.batch):
            fetched = self._fetch(iterator)
            batch = batch if fetched is END else fetched
        self._last_batch = batch
        self._set_states(now)
        return checksum(batch) == self._seen

    def _states(self) -> dict[str, Any]:
        return {**rng_state(self._device), "data": self._data_stream}

    def _set_states(self, states: dict[str, Any]) -> None:
        set_rng_state(states, self._device)
        self._data_stream = states["data"]

    # -- interruptions

    grace = 0.0
    """For how many seconds a second Ctrl-C is taken for the first."""

    @contextlib.contextmanager
    def _interrupts_between_steps(self) -> Iterator[None]:
        """Let a first Ctrl-C wait until the run stands between two steps and can be saved; a second acts at once."""
        handler = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: Any) -> None:
            now = time.monotonic()
            if self._waiting or (self._interrupted and now - self._interrupted_at >= self.grace):
                signal.default_int_handler(number, frame)
            if not self._interrupted:
                self._interrupted, self._interrupted_at = True, now

        in_main_thread = threading.current_thread() is threading.main_thread()
        if not self._file.is_kept or handler is not signal.default_int_handler or not in_main_thread:
            yield
            return
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _next(self, iterator: Iterator[Any]) -> Any:
        """Fetch the next batch; here, between two steps, an interrupted run saves itself."""
        self._waiting = True
        try:
            if self._interrupted:
                raise KeyboardInterrupt
            return self._fetch(iterator)
        except KeyboardInterrupt:
            self._waiting = False
            self._save()
            raise
        finally:
            self._waiting = False

    # -- checkpoints

    def _save(self) -> None:
        self._read_losses()
        self._progress.seconds = time.perf_counter() - self._started
        self._file.save(*self._parts)

    def state(self) -> State:
        """Return how far the run has come, and the state of all generators, now and at the start of the epoch."""
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {
            "progress": asdict(self._progress),
            "last_batch": checksum(self._last_batch) if self._progress.batch else None,
        }
        for moment, states in {"start": self._epoch_start, "now": self._states()}.items():
            rng_tensors, about[f"rng_{moment}"] = pack_rng(states, f"rng_{moment}.")
            tensors |= rng_tensors
        return tensors, about

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        known, fresh = dict(about["progress"]), self._progress.batches_per_epoch
        self._callbacks.is_stopped |= known.pop("is_stopped", False)  # where older files say it
        self._progress = _Progress(**{"drawn": known["step"], **known})  # older files do not say what was drawn
        check_settings(self._progress)
        self._epoch_start = unpack_rng(tensors, about["rng_start"], "rng_start.")
        at_start = self._progress.batch == 0
        self._set_states(self._epoch_start if at_start else unpack_rng(tensors, about["rng_now"], "rng_now."))
        self._seen, self._saved_by = about["last_batch"], processes_of(about)
        if self._saved_by != joined().size:
            self._progress.batches_per_epoch = fresh
        if at_start and self._progress.epoch < self._recipe.epochs:
            warn_of_own_generator(self._loader)
