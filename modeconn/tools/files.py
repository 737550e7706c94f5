"""Files that survive: tensors with a JSON description, written all or not at all, read without running code."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from modeconn.tools.door import shortened
from modeconn.tools.writing import replacing

_KEY, _DIGEST = "modeconn", "modeconn.sha256"
ARCHITECTURE = "architecture of modeconn"
"""The entry in which files of tensors alone say how their model is built; `write` has it among other things."""
_TRIES = 100
_WAY_OUT = "Write it again, or take a copy."
_PICKLES = (b"PK", b"\x80")  # a zip of torch.save, a bare pickle


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file in one step: whoever reads ``path``, at any time, finds the old file or the new one.

    It holds a digest of the tensors and the description, which `read` compares.

    Args:
        path: The file; its folder must exist.
        kind: What the file is, as `read` asks for it.
        tensors: Tensors on any device.
        about: What else belongs to it, as Python's JSON can hold it; numbers need not be finite.

    Raises:
        OSError: If the file cannot be written; ``path`` is untouched.
    """
    tensors = {  # copied, since another thread may go on to change what its digest is of
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    text = json.dumps({"kind": kind, **about})  # with NaN and Infinity, which Python reads back
    metadata = {_KEY: text, _DIGEST: digest_of(tensors, text)}
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with replacing(path) as file:
        write_content(file, kinds, metadata, tensors.__getitem__)


def write_content(
    file: IO[bytes],
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str],
    make: Callable[[str], Tensor],
) -> None:
    """Write the length of a safetensors file's header, the header, and the values of one tensor after the other.

    The library of that name takes all tensors of a file at once, and copies them; here none is copied.

    Args:
        file: Where to write.
        kinds: Shape and type of each tensor.
        metadata: Texts for the header.
        make: Returns the tensor of a name, on the CPU.

    Raises:
        ValueError: If a tensor that was made is of another shape or type.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of_dtype(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # so that values are aligned
    file.write(len(content).to_bytes(8, "little") + content)
    for name, expected in kinds.items():
        _write_values(file, name, make(name), expected)


def _write_values(file: IO[bytes], name: str, tensor: Tensor, expected: tuple[tuple[int, ...], torch.dtype]) -> None:
    shape, dtype = expected
    if (tuple(tensor.shape), tensor.dtype) != expected:
        raise ValueError(f"{name!r} became {tensor.dtype} of {tuple(tensor.shape)}, not {dtype} of {shape}.")
    if tensor.numel():
        file.write(_bytes(tensor))


def read(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: the tensors, on the CPU, and the description.

    Args:
        path: The file.
        kind: What it has to be, or None for whatever it is; the description says it as "kind".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a pickle, which might run code, or damaged, or a file of another kind or program.
    """
    path = Path(path)
    check_regular(path)
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            tensors, metadata = _read(path)
        except ValueError:
            if before == _identity(path):
                raise
            continue
        if before == _identity(path):  # safetensors opens it twice, and another process may replace it in between
            break
    else:
        raise ValueError(f"{str(path)!r} is written all the time, faster than it can be read. Read it later.")
    if _KEY not in metadata:
        raise ValueError(f"{str(path)!r} was not written by modeconn; it should be a {kind or 'file of it'}.")
    about = _description(path, metadata[_KEY])
    if kind is not None and about["kind"] != kind:
        raise ValueError(f"{str(path)!r} is a {about['kind'][:60]}, not a {kind}.")
    # Files of older versions have no digest, but nothing else either: another name is that of a digest, damaged.
    is_as_written = set(metadata) == {_KEY} or metadata.get(_DIGEST) == digest_of(tensors, metadata[_KEY])
    if not is_as_written:
        raise ValueError(f"{str(path)!r} is damaged: its content is not what was written. {_WAY_OUT}")
    return tensors, about


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced."""
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(2)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, file.metadata() or {}
    except (safetensors.SafetensorError, RuntimeError, ValueError, OverflowError, OSError) as error:
        # Checked only after safetensors failed: a valid header may begin with the same bytes.
        if start.startswith(_PICKLES):
            raise ValueError(
                f"{str(path)!r} is a pickle (a file of torch.save), which could run code when it is read. "
                f"Only safetensors files that modeconn wrote are read."
            ) from None
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file ({shortened(error, 600)}).") from error


def dtype_named(name: str) -> torch.dtype:
    """Return the type that safetensors files call so."""
    kinds = {"F": "float", "I": "int", "U": "uint", "C": "complex"}
    known = {"BOOL": torch.bool, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    return known[name] if name in known else getattr(torch, kinds[name[0]] + name[1:])


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return what safetensors files call a type; inverts `dtype_named`."""
    known = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    if dtype in known:
        return known[dtype]
    text = str(dtype).removeprefix("torch.")
    kind = text.rstrip("0123456789")
    return {"float": "F", "int": "I", "uint": "U", "complex": "C"}[kind] + text[len(kind) :]


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError for devices and pipes; folders and missing files are errors of whoever opens them."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{str(path)!r} is a device or pipe, of which no file can be read.")


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that `write` wrote it; also for one that is no safetensors file, so that `read` judges it."""
    check_regular(path)
    found = metadata_of(path)
    return found is None or any(name.startswith(_KEY) for name in found)  # one of them may be damaged


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """Return the texts in the header of a safetensors file, without reading its tensors; None if it is no such file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, RuntimeError, ValueError, OverflowError, OSError):
        return None


def description(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what a file says of its content, without reading its tensors; None if it says nothing, or is no such file.

    Files of tensors that were written one by one say the kind, "model", and how the model is built.

    Raises:
        ValueError: If what it says is damaged.
    """
    metadata = metadata_of(path) or {}
    if _KEY in metadata:
        return _description(Path(path), metadata[_KEY])
    if ARCHITECTURE not in metadata:
        return None
    try:
        return {"kind": "model", "model": json.loads(metadata[ARCHITECTURE])}
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _description(path: Path, text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
        if isinstance(about, dict) and isinstance(about.get("kind"), str):
            return about
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{str(path)!r} is damaged: its description cannot be read. {_WAY_OUT}")


@contextmanager
def opened(path: str | os.PathLike[str], kind: str | None = None) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Give what `read` returns, and let what is made of it fail in one sentence.

    Raises:
        ValueError: As `read` does; and if an error in the block shows that the description is not what `write` was
            given: a name that is missing, a value of another type.
    """
    found = read(path, kind)
    try:
        yield found
    except ValueError as error:
        if os.fspath(path) in str(error):
            raise
        raise ValueError(f"{os.fspath(path)!r}: {shortened(error, 600)}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise damaged(path, error) from error


@contextmanager
def taken_from(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file is damaged if what was read from it cannot be taken up.

    Raises:
        ValueError: In place of whatever shows that a description is not what was written.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise damaged(path, error) from error


class NeedsModelError(ValueError):
    """A file is whole, but does not say enough to build its model."""


def damaged(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """Return the error that says of a file that its content does not fit together, or what it needs to be read."""
    if isinstance(error, NeedsModelError):
        return ValueError(f"{os.fspath(path)!r} does not say how to build its model: {error}")
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return ValueError(f"{os.fspath(path)!r} is damaged: what it says of itself does not fit ({what}). {_WAY_OUT}")


def _bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor on the CPU as bytes, without a copy if it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single value counts as contiguous whatever its stride is
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a SHA-256 of a text and of names, types, shapes and values of tensors on the CPU, by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(_bytes(tensor))
    return digest.hexdigest()
