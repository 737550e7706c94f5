"""Runs that survive: what a run is made of, and the one file that it saves itself to and goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.network.batches import checksum, described, first_batch
from modeconn.network.shares import is_shared_out
from modeconn.symmetry.relabelling import MOVED, Relabelling, pack, unpack
from modeconn.tools import files, provenance
from modeconn.tools.door import check_settings, shortened
from modeconn.tools.processes import joined
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn
from modeconn.tools.writing import check_writable, held

FIT, TRAINING = "checkpoint of fit_curve", "checkpoint of models.train"
ALIGNER = "checkpoint of DeepAlign.fit"
"""The kinds of runs that save themselves."""

_FORMAT = 2
_OF_DATA = ("the first batch of loader", "the number of batches of loader")
"""What files say of the data of a run, under these names."""
_PROCESSES = "processes"
"""Where a file holds what each process has of its own, but for the first."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""All that changes in a part of a run: as tensors, and as JSON can hold it."""


class Resumable(Protocol):
    """A part of a run that can be taken up where it was.

    A part may have an attribute ``own``: how names of its state begin of which each of several processes has its own.
    """

    def state(self) -> State:
        """Return all that changes from step to step; no other part of the run uses these names."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned, from what all parts of the run returned, tensors on the CPU."""
        ...


@dataclass(frozen=True)
class Checkpoint(Shown):
    """Where and how often a long run saves itself. It saves after every epoch, and inside epochs if you say so.

    Args:
        path: The file; if it exists, a run of the same settings goes on from it.
        every_batches: Save also after so many batches.
        every_seconds: Save also after so many seconds.

    Raises:
        ValueError: If an interval is not positive.
    """

    path: str | os.PathLike[str]
    every_batches: int | None = None
    every_seconds: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("every_batches", "every_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {name}={value}.")

    def is_due(self, batch: int, last_saved: float) -> bool:
        """Whether to save inside an epoch after ``batch`` batches of it; ``last_saved`` is a `time.monotonic`."""
        by_batches = self.every_batches is not None and batch % self.every_batches == 0
        return by_batches or (self.every_seconds is not None and time.monotonic() - last_saved >= self.every_seconds)


class RunFile(contextlib.AbstractContextManager["RunFile"]):
    """The file of one run: read when the run begins, written as it goes on, held against other runs until its end.

    A context manager, which lets the file go. A run that is not kept has one too, which holds nothing and writes
    nothing. Of several processes the first one reads and writes, for all.

    Args:
        checkpoint: Where and how often to save; None for a run that is not kept.
        settings: Returns what makes the run what it is, under the names its caller knows; not called if there is no
            file to compare with or to write.
        device: Where the run computes.
        kind: What the file says it is.
        loader: The data of the run, None for a run without.
        sharded: Whether the loader yields other examples in each process.

    Attributes:
        saved: What the file held, or None.

    Raises:
        ValueError: If the file belongs to another run.
        OSError: If it cannot be written, or another run holds it.

    Warns:
        UserWarning: If the first batch is another one than when the run began.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | Checkpoint | None,
        settings: Callable[[], dict[str, Any]],
        device: torch.device,
        *,
        kind: str = FIT,
        loader: Any = None,
        sharded: bool = False,
    ) -> None:
        self._them = joined()
        is_path = checkpoint is not None and not isinstance(checkpoint, Checkpoint)
        checkpoint = Checkpoint(checkpoint) if is_path else checkpoint
        self._checkpoint, self._device, self._kind = checkpoint, device, kind
        self._tensors: dict[str, Tensor] = {}
        self._about: dict[str, Any] = {}
        self._last_saved = time.monotonic()
        self.saved: State | None = None
        self._until_end = contextlib.ExitStack()
        if checkpoint is None:
            return

        def open_file() -> State | None:
            check_writable(checkpoint.path)
            with contextlib.ExitStack() as stack:
                stack.enter_context(held(checkpoint.path))
                self._read(checkpoint, settings, loader, is_whole=not is_shared_out(loader, sharded=sharded))
                self._until_end = stack.pop_all()
            return self.saved

        self.saved = self._them.first(open_file)

    def __exit__(self, *_: Any) -> None:
        self._until_end.close()

    def _read(
        self, checkpoint: Checkpoint, settings: Callable[[], dict[str, Any]], loader: Any, *, is_whole: bool
    ) -> None:
        device = self._device
        about_data, first = ({}, None) if loader is None or not is_whole else _identified(loader, device)
        self._about = {"format": _FORMAT, "settings": {**settings(), **about_data}, "first": first, **pack(None)[1]}
        self._about |= {provenance.ATTRIBUTE: provenance.now()}
        if not Path(checkpoint.path).exists():
            return
        with files.opened(checkpoint.path, self._kind) as self.saved:
            _, about = self.saved
            _check_settings(checkpoint.path, {"format": about.get("format")}, {"format": _FORMAT})
            saved, own = about["settings"], self._about["settings"]
            knows_data = (_OF_DATA[0] in saved) == (_OF_DATA[0] in own)
            if not knows_data:  # one of both runs read a share of data of which it did not know the whole
                saved, own = ({k: v for k, v in one.items() if k not in _OF_DATA} for one in (saved, own))
            _check_settings(checkpoint.path, saved, own)
            _warn_about_environment(about["environment"], environment(device))
            if knows_data and first != about["first"]:
                warn(
                    f"the first batch of loader is another one than when the run of {os.fspath(checkpoint.path)!r} "
                    f"began: other data, or an order that does not follow from torch's random state. The run goes on "
                    f"with it."
                )

    def relabelling(self, model: nn.Module) -> Relabelling | None:
        """Return how b was relabelled when the run was saved; None if it was not, or nothing is saved.

        Raises:
            ValueError: If the file is damaged: what it holds is no relabelling of ``model``.
        """
        if self.saved is None or self._checkpoint is None:
            return None
        with files.taken_from(self._checkpoint.path):
            found = unpack(*self.saved, MOVED)
            if found is not None:
                found.spec.check_model(model)
        return found

    def keep(self, relabelling: Relabelling | None) -> None:
        """Let every checkpoint hold how b was relabelled at the start."""
        self._tensors, about = pack(relabelling, MOVED)
        self._about |= about

    def is_due(self, batch: int) -> bool:
        """Whether to save inside an epoch, after ``batch`` batches of it."""
        return self._checkpoint is not None and self._checkpoint.is_due(batch, self._last_saved)

    def save(self, *parts: Resumable) -> None:
        """Write the state of all parts of the run."""
        if self._checkpoint is None:
            return
        tensors, about = dict(self._tensors), {**self._about, "environment": environment(self._device)}
        own_tensors: dict[str, Tensor] = {}
        own_about: dict[str, Any] = {}
        for part in parts:
            part_tensors, part_about = part.state()
            tensors |= part_tensors
            about |= part_about
            beginnings = getattr(part, "own", ())
            own_tensors |= {name: tensor.cpu() for name, tensor in part_tensors.items() if name.startswith(beginnings)}
            own_about |= {name: value for name, value in part_about.items() if name.startswith(beginnings)}
        if self._them.size > 1:
            others = self._them.each(lambda: None if self._them.is_first else (own_tensors, own_about))
            for rank, (part_tensors, _) in enumerate(others[1:], 1):
                tensors |= {f"{_process(rank)}{name}": tensor for name, tensor in part_tensors.items()}
            about[_PROCESSES] = [None, *(part_about for _, part_about in others[1:])]
        self._them.first(partial(files.write, self._checkpoint.path, self._kind, tensors, about))
        self._last_saved = time.monotonic()

    def resume(self, *parts: Resumable) -> bool:
        """Take all parts of the run to where they were saved; whether anything was."""
        if self.saved is None or self._checkpoint is None:
            return False
        with files.taken_from(self._checkpoint.path):
            saved = self._saved_here()
            for part in parts:
                tensors, about = part.state()
                check_alike(tensors, saved[0])
                _check_kinds(about, saved[1])
                part.load_state(*saved)
        return True

    def _saved_here(self) -> State:
        """Return what the file held, with what is this process's own."""
        tensors, about = self.saved
        before, now = processes_of(about), self._them.size
        if self.is_of_others:
            warn(
                f"the run was interrupted with {_counted(before)} and goes on with {_counted(now)}: it will not end "
                f"with the same bits as an uninterrupted one."
            )
        elif not self._them.is_first:
            mark = _process(self._them.rank)
            own = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
            return {**tensors, **own}, {**about, **about[_PROCESSES][self._them.rank]}
        return tensors, about

    @property
    def is_of_others(self) -> bool:
        """Whether another number of processes saved the run."""
        return self.saved is not None and processes_of(self.saved[1]) != self._them.size

    @property
    def is_kept(self) -> bool:
        """Whether the run saves itself."""
        return self._checkpoint is not None

    def __str__(self) -> str:
        """Say where the run is kept, for a message about its end."""
        return (
            "" if self._checkpoint is None else f" The last good checkpoint is kept in {str(self._checkpoint.path)!r}."
        )


def processes_of(about: Mapping[str, Any]) -> int:
    """Return how many processes the run had when it saved itself."""
    return len(about.get(_PROCESSES, [None]))


def _process(rank: int) -> str:
    """Return how names of tensors begin that are the own ones of a process, but for the first."""
    return f"process {rank}."


def _counted(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def check_alike(fresh: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise unless tensors that were saved are of the shapes and types of those of a run that begins, and finite."""
    for name, tensor in fresh.items():
        if name.startswith("rng"):  # which follows from the device
            continue
        found = saved[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(
                f"{name!r} is {found.dtype} of {tuple(found.shape)}, not {tensor.dtype} of {tuple(tensor.shape)}"
            )
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{name!r} is not finite")


def _check_kinds(fresh: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise unless what was saved beside tensors is of the kinds that it has when a run begins.

    What is missing is of an older version; a part that cannot do without it fails when it takes it up.
    """
    for name, value in fresh.items():
        if name not in saved:
            continue
        kinds = {_kind(value), _kind(saved[name])} - {"nothing"}
        if len(kinds) > 1:
            raise TypeError(f"{name!r} is {_kind(saved[name])}, not {_kind(value)}")
        if isinstance(value, Mapping) and isinstance(saved[name], Mapping):
            _check_kinds(value, saved[name])


def _kind(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    names = {
        type(None): "nothing",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        str: "text",
        bool: "true or false",
    }
    return names.get(type(value), type(value).__name__)


def _identified(loader: Any, device: torch.device) -> tuple[dict[str, Any], int | None]:
    """Return what tells one loader from another, and a checksum of its first batch, if that is always the same."""
    sums = set()
    for _ in range(2):
        with seeded(0, device):
            first = first_batch(loader)
        sums.add(checksum(first))
    found = {_OF_DATA[0]: described(first)}
    with contextlib.suppress(TypeError):
        found[_OF_DATA[1]] = len(loader)
    return found, sums.pop() if len(sums) == 1 else None


def has_own_generator(loader: Any) -> bool:
    """Whether a DataLoader, or its sampler, does not draw from the global generator."""
    return any(getattr(part, "generator", None) is not None for part in (loader, getattr(loader, "sampler", None)))


def warn_of_own_generator(loader: Any) -> None:
    """Warn, where a run goes on, if the order of its data cannot be what it would have been."""
    if has_own_generator(loader):
        warn(
            "the loader draws from a generator of its own, which no checkpoint holds: the run will not end with the "
            "same bits as an uninterrupted one."
        )


def run_file(
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
    settings: Callable[[], dict[str, Any]],
    device: torch.device,
    kind: str,
    loader: Any,
    *,
    sharded: bool = False,
) -> RunFile:
    """Return the file of a run that saves itself at fixed moments.

    Raises:
        ValueError: If it is to be written at others, or belongs to another run.
        OSError: If it cannot be written.
    """
    if isinstance(checkpoint, Checkpoint) and (checkpoint.every_batches or checkpoint.every_seconds):
        raise ValueError(
            f"this run saves itself at its own moments, after each epoch or validation, got {checkpoint!r}. Pass the "
            f"path alone."
        )
    file = RunFile(checkpoint, settings, device, kind=kind, loader=loader, sharded=sharded)
    if file.saved is not None:
        warn_of_own_generator(loader)
    return file


def moved_tensors(relabelling: Relabelling) -> dict[str, Tensor]:
    """Return the tensors that stand for a relabelling in a checkpoint: they take the place of those of the start."""
    return pack(relabelling, MOVED)[0]


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a run depend on besides its settings."""
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _warn_about_environment(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn if a run goes on elsewhere than where it began: it will not end with the same bits."""
    changes = [
        f"{name} was {shortened(saved.get(name))} and is {value}"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if changes:
        warn(
            f"the run was interrupted under other conditions ({'; '.join(changes)}); it goes on, but will not end with "
            f"the same bits as an uninterrupted one."
        )


def _check_settings(path: str | os.PathLike[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint belongs to the run at hand.

    Raises:
        ValueError: Naming the first setting that differs, and both values.
    """
    current = json.loads(json.dumps(current))
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"checkpoint {os.fspath(path)!r} is of another run: {name} is {shortened(saved.get(name))} in it and "
                f"{shortened(current.get(name))} here. "
                f"Pass another path, or delete the file to start anew."
            )
