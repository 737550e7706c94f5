"""Compute with models in files, one tensor of each at a time."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from modeconn.tensor_files.reading import TensorFiles, in_dtype, widened
from modeconn.tensor_files.writing import SHARD_BYTES, check_target, write
from modeconn.tools.door import checked
from modeconn.tools.warn import warn

_CHUNK = 1 << 20  # entries that are computed at a time


@checked
def interpolate(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    t: float = 0.5,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write the network at a point of the straight line between two models in files, as they are.

    Tensors of floating point and complex ones are ``(1 - t) a + t b``, computed in single precision at least; all
    others are those of a, with a warning where b has others. No more is in memory than a tensor of each model and what
    becomes of both.
    Networks that were trained apart should be aligned first.

    Args:
        a: The model at t=0: a safetensors file, a folder of shards, or a state dict of ``torch.save``.
        b: The model at t=1, of the same names and shapes.
        out: A file that ends in ``.safetensors``, or a folder, which also gets a's configuration and tokenizer.
        t: Position; outside of [0, 1] the line is extended.
        dtype: What tensors of floating point are written in; default: as they are in a.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show a progress bar.

    Returns:
        Where it was written.

    Raises:
        ValueError: If the models differ in names or shapes: all that differ are named; if a tensor is complex in one of
            them alone; or a file is damaged.
        OSError: If a file is missing, or ``out`` cannot be written or exists.

    Warns:
        UserWarning: If there are running statistics, of batch norm say, which belong to neither network in between.
    """
    check_target(out, overwrite=overwrite, read=(a, b))
    first, second = TensorFiles(a), TensorFiles(b)
    first.check_like(second)
    if t not in (0, 1):
        first.warn_of_statistics("interpolated")
    entries = in_dtype(first.entries, dtype)
    kept: list[str] = []

    def make(name: str) -> Tensor:
        x, y = first.read(name), second.read(name)
        if x.is_complex() != y.is_complex():
            raise ValueError(
                f"{name!r} is complex in one of the models alone: there is nothing between {x.dtype} and {y.dtype}."
            )
        if not (x.is_floating_point() or x.is_complex()):
            if not torch.equal(x, y):
                kept.append(name)
            return x
        return _between(x, y, t, entries[name].dtype)

    written = write(
        out,
        entries,
        make,
        shard_bytes=shard_bytes,
        like=first,
        overwrite=overwrite,
        progress=progress,
    )
    if kept:
        warn(f"{len(kept)} tensors of whole numbers differ, such as {kept[0]!r}: those of a were written.")
    return written


def _between(x: Tensor, y: Tensor, t: float, dtype: torch.dtype) -> Tensor:
    """Return ``(1 - t) x + t y`` in a type, computed in single precision at least, a part at a time."""
    wide = torch.promote_types(widened(x.dtype), widened(y.dtype))
    found = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    parts = (tensor.reshape(-1).split(_CHUNK) for tensor in (found, x, y))
    for out, ours, theirs in zip(*parts, strict=True):
        out.copy_(torch.lerp(ours.to(wide), theirs.to(wide), t))
    return found
