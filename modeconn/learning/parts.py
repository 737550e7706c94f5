"""Parts of which several kinds of runs are made, each with a state that a checkpoint keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.learning.checkpoint import State
from modeconn.network.batches import endless_batches
from modeconn.network.shares import numbered_passes
from modeconn.tools.callbacks import Callbacks, EpochEnd, StepEnd
from modeconn.tools.rng import rng_state, set_rng_state


class Count:
    """How much of a run is done.

    Args:
        name: What is counted, such as "epochs".
    """

    def __init__(self, name: str) -> None:
        self.value, self._name = 0, name

    def state(self) -> State:
        """Return the number."""
        return {}, {self._name: self.value}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.value = about[self._name]


def mean_of_epoch(total: float, count: float) -> float:
    """Return the mean loss of an epoch from the sum of all losses, each times what counts in it, and what counts.

    Raises:
        ValueError: If nothing counts.
    """
    if not count:
        raise ValueError("no target of the loader's batches counts: the loss ignores them all.")
    return total / count


class Epochs:
    """The epochs of a training run, and its callbacks, which are told of them.

    Several runs that follow one another, as cycles do, have one such part: to callbacks they are one run.

    Args:
        num_epochs: Of each run.
        callbacks: What is told; default nothing.
        num_runs: How many runs.

    Attributes:
        done: Finished epochs of the run at work.
    """

    own = Callbacks.own

    def __init__(self, num_epochs: int, callbacks: Callbacks | None = None, *, num_runs: int = 1) -> None:
        self._num_epochs, self._num_runs, self._callbacks = num_epochs, num_runs, callbacks or Callbacks()
        self.done, self._runs = 0, -1
        self._steps, self._seconds, self._started = 0, 0.0, time.perf_counter()

    @property
    def is_stopped(self) -> bool:
        """Whether a callback wanted the run to end."""
        return self._callbacks.is_stopped

    def begin_run(self, model: Callable[[], Any] | None = None, training: Any = None) -> None:
        """Stand at the beginning of the next run.

        Args:
            model: Returns a copy of the network as it is now, in eval mode.
            training: Data and loss, a `modeconn.TrainingData`.
        """
        self.done, self._model, self._training = 0, model, training
        self._runs += 1

    def go_on(self, *, is_new: bool) -> bool:
        """Begin to train: a run that is new, or one that was taken up; whether callbacks were told an epoch again."""
        self._started = time.perf_counter() - self._seconds
        self._callbacks.begin_run(self._num_runs * self._num_epochs, is_new=is_new and self._runs == 0)
        if self._callbacks.untold is None:
            return False
        self._tell(self._callbacks.untold)
        return True

    def end_step(self, loss: Tensor | None) -> None:
        """Note a step, and tell of its loss; None of a process that had no batch in it."""
        if loss is not None and self._callbacks.hear("after_step"):
            event = StepEnd(self._runs * self._num_epochs + self.done, self._steps, None, loss.detach().clone())
            self._callbacks.tell("after_step", event)
        self._steps += 1

    def end_epoch(self, loss: float) -> None:
        """Note an epoch, and tell of its loss. Where that fails, the state is that before, with all left to be told."""
        self.done += 1
        self._seconds = time.perf_counter() - self._started
        self._tell(loss)

    def _tell(self, loss: float) -> None:
        event = EpochEnd(
            self._runs * self._num_epochs + self.done,
            self._num_runs * self._num_epochs,
            loss,
            self._seconds,
            model=self._model,
            training=self._training,
        )
        self._callbacks.end_epoch(event)

    def state(self) -> State:
        """Return how much is done, and what callbacks keep."""
        tensors, about = self._callbacks.state()
        return tensors, {"epochs": self.done, "num_steps": self._steps, "seconds": self._seconds, **about}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned; files of older versions say nothing but the number of epochs."""
        self.done, self._steps, self._seconds = about["epochs"], about.get("num_steps", 0), about.get("seconds", 0.0)
        self._callbacks.load_state(tensors, about)


class Randomness:
    """The global random state inside of a run.

    Args:
        device: Where random numbers are drawn, beside the CPU.
    """

    own = ("rng",)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state(self) -> State:
        """Return the state of all generators."""
        tensors, about = pack_rng(rng_state(self._device), "rng.")
        return tensors, {"rng": about}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        set_rng_state(unpack_rng(tensors, about["rng"], "rng."), self._device)


class BatchStream:
    """Batches of a loader, pass after pass, drawn under a random state of their own: the rest of a run moves no order.

    To come back to its place after an interruption it reads again, from the beginning, as many batches as were read.

    Args:
        loader: Any re-iterable of batches.
        device: Where they go, and whose random state the loader may draw from.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._device, self._random = device, rng_state(device)
        self._batches, self._count = endless_batches(numbered_passes(loader), device), 0

    def __next__(self) -> Any:
        outside = rng_state(self._device)
        set_rng_state(self._random, self._device)
        try:
            batch = next(self._batches)
            self._random = rng_state(self._device)
        finally:
            set_rng_state(outside, self._device)
        self._count += 1
        return batch

    def state(self) -> State:
        """Return how many batches were read."""
        return {}, {"batches": self._count}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned, in a stream that is at its beginning."""
        for _ in range(about["batches"]):
            next(self)


class Learned:
    """The tensors that training changes, as a part of a run.

    Args:
        tensors: Parameters and buffers by name.
        optimizer: What it remembers.
        scaler: Of the gradients, for float16; None if there is none.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._tensors, self._optimizer, self._scaler = tensors, optimizer, scaler

    def state(self) -> State:
        """Return all that changes from step to step."""
        tensors, about = pack_optimizer(self._optimizer)
        own = {f"model.{name}": tensor.detach() for name, tensor in self._tensors.items()}
        return {**own, **tensors}, {**about, "scaler": self._scaler.state_dict() if self._scaler else None}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[f"model.{name}"])
        load_optimizer(self._optimizer, tensors, about)
        if self._scaler is not None:
            self._scaler.load_state_dict(about["scaler"])


def pack_rng(state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a state of `modeconn.tools.rng.rng_state` into tensors, their names beginning with ``prefix``, and JSON."""
    tensors = {f"{prefix}{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    numpy_state = json.loads(json.dumps(state["numpy"], default=np.ndarray.tolist))
    return tensors, {"numpy": numpy_state, "python": state["python"]}


def unpack_rng(tensors: Mapping[str, Tensor], about: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Invert `pack_rng`."""
    version, internal, gauss = about["python"]
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {**state, "numpy": about["numpy"], "python": (version, tuple(internal), gauss)}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> State:
    """Return what an optimizer remembers from step to step."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                others.setdefault(str(number), {})[name] = value
    return tensors, {"optimizer": others}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Let a new optimizer of the same parameters take up where `pack_optimizer` was."""
    state = {int(number): dict(values) for number, values in about["optimizer"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
