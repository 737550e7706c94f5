"""PAM on all of a small data set: no step in P or in the curve raises the objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.curves.loss import CurveLoss, straight
from modeconn.curves.step import CurveStep
from modeconn.learning.checkpoint import RunFile, State, moved_tensors
from modeconn.learning.history import History, keep_values
from modeconn.network.batches import batches, to_device
from modeconn.network.loss import TrainingData
from modeconn.network.shares import is_shared_out
from modeconn.refinement.pam import PAM, improve_permutation, is_finished, objective_of
from modeconn.symmetry import Permutation
from modeconn.tools.callbacks import Callbacks, EpochEnd
from modeconn.tools.processes import joined
from modeconn.tools.rng import seeded

_SUFFICIENT = 1e-4  # the share of the linear decrease that a step must reach (Armijo)
_SMALLEST = 1e-12


class Descent:
    """Alternates the step in P and gradient descent on the curve, on all data at a fixed grid of positions.

    Args:
        pam: The settings.
        permutation: How b was relabelled at the start.
        step: Holds control points, which are changed, and module; its optimizer is not used.
        training: Loader and loss.
        file: Where the run saves itself, after every step.
        seed: Of the data's order and augmentation, so that a run that goes on has the data that it began with.
        callbacks: What is told of every move that is tried, and of every step of gradient descent as an epoch.
        connection: Returns the connection as it is now, for callbacks.
        progress: Whether to show a progress bar of the moves.

    Attributes:
        permutation: How b is relabelled now.
        history: As loss the objective, proximal term included, after each step of gradient descent.
    """

    def __init__(
        self,
        pam: PAM,
        permutation: Permutation,
        step: CurveStep,
        training: TrainingData,
        file: RunFile,
        *,
        seed: int,
        callbacks: Callbacks | None = None,
        connection: Callable[[], Any] | None = None,
        progress: bool = False,
    ) -> None:
        self._callbacks, self._progress, self._connection = callbacks or Callbacks(), progress, connection
        self.permutation, self.history = permutation, History()
        self._pam, self._step, self._file = pam, step, file
        self._points, self._curve = step.control_points, step.curve
        with seeded(int(np.random.SeedSequence([seed, 3]).generate_state(1)[0]), self._points.device):
            data = list(batches(training.loader, self._points.device))
        if is_shared_out(training.loader, sharded=training.sharded):
            parts = joined().each(lambda: data)
            data = [to_device(batch, self._points.device) for part in parts for batch in part]
        grid = torch.linspace(0, 1, pam.num_points, dtype=torch.float64).tolist()
        sample = [(t, batch) for t in grid for batch in data]
        self._loss = CurveLoss(step.workspace, self._curve, self._points[0], objective_of(training), sample)
        self._trained = step.workspace.space.trainable
        self._bend = self._held = self._points[1:-1] - self._line  # now, and at the start of the turn
        self._rate, self._started = 1.0, time.perf_counter()

    @property
    def _line(self) -> Tensor:
        return straight(self._curve, self._points[0], self._points[-1])

    def run(self) -> History:
        """Take all turns, from where the run was saved, one step of gradient descent for each epoch."""
        num_steps = self._step.recipe.epochs
        self._callbacks.begin_run(num_steps, is_new=not self._file.resume(self, self._callbacks))
        self._started = time.perf_counter() - self.history.seconds
        if self._callbacks.untold is not None:
            self._tell()
        if self._callbacks.is_stopped:
            return self._finished()
        history, pam = self.history, self._pam
        for iteration in range(pam.iterations):
            if iteration == len(history.turns):
                self._take_turn()
            if iteration + 1 == len(history.turns) and is_finished(pam, history.turns):
                break
            value = None
            for _ in range(len(history.loss), math.ceil((iteration + 1) * num_steps / pam.iterations)):
                value = self._descend(value)
                if self._callbacks.is_stopped:
                    return self._finished()
        return self._finished()

    def _finished(self) -> History:
        return replace(self.history, seconds=time.perf_counter() - self._started)

    def _tell(self) -> None:
        """Tell callbacks of a step of gradient descent, and save the run."""
        loss, seconds = self.history.loss, time.perf_counter() - self._started
        event = EpochEnd(len(loss), self._step.recipe.epochs, loss[-1], seconds, self._connection)
        try:
            if self._callbacks.end_epoch(event):
                keep_values(self.history.values, len(loss), event.values)
        finally:  # an exception in a callback must not lose the step
            self._save()

    def _take_turn(self) -> None:
        history = self.history
        how = {"epoch": len(history.loss), "callbacks": self._callbacks, "progress": self._progress}
        found = improve_permutation(self._pam, self._step, self._loss, self.permutation, **how)
        self.permutation, turn = found
        history.turns.append(turn)
        self._bend = self._held = self._points[1:-1] - self._line
        self._rate = 1.0
        self._save()

    def _descend(self, value: float | None) -> float:
        """Take a step on the curve, from where the objective is ``value``, if known; return what it is then."""
        _, _, slope = self._loss.gradient(self._points[-1], self._bend)
        slope = slope * self._trained + (self._bend - self._held) / self._pam.nu_curve
        start = self._objective(self._bend) if value is None else value
        self._bend, value, self._rate = _descend_once(self._objective, self._bend, slope, start, self._rate)
        self._points[1:-1] = self._line + self._bend
        self.history.loss.append(value)
        self._tell()
        return value

    def _objective(self, bend: Tensor) -> float:
        return self._loss.value(self._points[-1], bend) + _proximal(bend, self._held, self._pam.nu_curve)

    def _save(self) -> None:
        self._file.save(self, self._callbacks)

    def state(self) -> State:
        """Return all that changes from step to step, as tensors and as JSON can hold it."""
        tensors = {"control_points": self._points, "bend": self._bend, "held": self._held}
        history = {"loss": self.history.loss, "turns": self.history.turns, "values": self.history.values}
        about = {**history, "seconds": time.perf_counter() - self._started, "rate": self._rate}
        return {**tensors, **moved_tensors(self.permutation)}, about

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned; a run begins with the permutation of its checkpoint."""
        self._points.copy_(tensors["control_points"])
        self._bend, self._held = (tensors[name].to(self._points.device) for name in ("bend", "held"))
        self.history = History(about["loss"], [], about["seconds"], about["turns"], about["values"])
        self._rate = about["rate"]


def _proximal(bend: Tensor, held: Tensor, nu: float) -> float:
    return float((bend - held).square().sum(dtype=torch.float64)) / (2 * nu)


def _descend_once(
    objective: Callable[[Tensor], float], x: Tensor, gradient: Tensor, start: float, rate: float
) -> tuple[Tensor, float, float]:
    """Step down the gradient, halving the rate until the objective falls enough.

    Returns:
        The new x, the objective there, and the rate to try next.
    """
    slope, first = float(gradient.square().sum(dtype=torch.float64)), rate
    while rate > _SMALLEST:
        candidate = x - rate * gradient
        value = objective(candidate)
        if value <= start - _SUFFICIENT * rate * slope:
            return candidate, value, 2 * rate
        rate /= 2
    return x, start, first  # No step lowers the objective by more than rounding.
