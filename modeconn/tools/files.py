"""Files that survive: tensors with a JSON description, written all or not at all, read without running code."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        about: What else belongs to it, as Python's JSON can hold it; numbers need not be finite.

    Raises:
        OSError: If the file cannot be written; ``path`` is untouched.
    """
    path = Path(path)
    metadata = {_KEY: json.dumps({"kind": kind, **about})}  # with NaN and Infinity, which Python reads back
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
    with path.open("rb") as file:  # opened first, so that a missing file raises Python's own error
        start = file.read(2)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except safetensors.SafetensorError as error:
        # Checked only after safetensors failed: a valid header may begin with the same bytes.
        if start.startswith(_PICKLES):
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


def write_text(text: str, path: str | os.PathLike[str] | None) -> str:
    """Write a text to ``path``, unless that is None; return the text."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
