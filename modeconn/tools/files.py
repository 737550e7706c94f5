"""Files that survive: tensors with a JSON description, written all or not at all, read without running code."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

_KEY = "modeconn"
_PICKLES = (b"PK", b"\x80")  # a zip of torch.save, a bare pickle


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file in one step: whoever reads ``path``, at any time, finds the old file or the new one.

    The file is written beside ``path`` under the ending ``.tmp``, synced, renamed, and its folder synced, so that a
    process killed (or a machine that fails) at any moment loses at most the new file.

    Args:
        path: The file; its folder must exist.
        kind: What the file is, as `read` asks for it.
        tensors: Tensors on any device.
        about: What else belongs to it, as JSON can hold it.

    Raises:
        OSError: If the file cannot be written; ``path`` is untouched.
    """
    path = Path(path)
    metadata = {_KEY: json.dumps({"kind": kind, **about}, allow_nan=False)}
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        metadata,
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def read(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: the tensors, on the CPU, and the description.

    Args:
        path: The file.
        kind: What it has to be, or None for whatever it is; the description says it as "kind".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a pickle, which might run code, or truncated, or a file of another kind or program.
    """
    path = Path(path)
    with path.open("rb") as file:  # a missing file is named in Python's own words
        start = file.read(2)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except safetensors.SafetensorError as error:
        if start.startswith(_PICKLES):  # asked only now: the length of a good header may begin with the same bytes
            raise ValueError(
                f"{str(path)!r} is a pickle (a file of torch.save), which could run code when it is read. "
                f"Only safetensors files that modeconn wrote are read."
            ) from None
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file ({error}).") from error
    if _KEY not in metadata:
        raise ValueError(f"{str(path)!r} was not written by modeconn; it should be a {kind or 'file of it'}.")
    about = json.loads(metadata[_KEY])
    if kind is not None and about.get("kind") != kind:
        raise ValueError(f"{str(path)!r} is a {about.get('kind')}, not a {kind}.")
    return tensors, about


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written beside ``path``; nothing is left behind.

    Raises:
        OSError: Naming the folder and the reason.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        temporary = path.with_name(path.name + ".tmp")
        temporary.open("wb").close()
        temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OSError:
    return type(error)(
        f"cannot write {str(path)!r} ({error.strerror or error}). Choose a folder that can be written to."
    )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Checkpoint:
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
        for name in ("every_batches", "every_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {name}={value}.")

    def is_due(self, batch: int, last_saved: float) -> bool:
        """Whether to save inside an epoch after ``batch`` batches of it; ``last_saved`` is a `time.monotonic`."""
        by_batches = self.every_batches is not None and batch % self.every_batches == 0
        return by_batches or (self.every_seconds is not None and time.monotonic() - last_saved >= self.every_seconds)


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


def warn_about_environment(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn if a run goes on elsewhere than where it began: it will not end with the same bits."""
    changes = [
        f"{name} was {saved.get(name)} and is {value}" for name, value in current.items() if saved.get(name) != value
    ]
    if changes:
        warnings.warn(
            f"the run was interrupted under other conditions ({'; '.join(changes)}); it goes on, but will not end with "
            f"the same bits as an uninterrupted one.",
            stacklevel=4,
        )


def check_settings(path: str | os.PathLike[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint belongs to the run at hand.

    Raises:
        ValueError: Naming the first setting that differs, and both values.
    """
    current = json.loads(json.dumps(current))
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"checkpoint {os.fspath(path)!r} is of another run: {name} is {saved.get(name)} in it and "
                f"{current.get(name)} here. "
                f"Pass another path, or delete the file to start anew."
            )
