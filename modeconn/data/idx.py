"""MNIST and Fashion-MNIST: files of the IDX format, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeconn.data.files import find_file

Part = tuple[Tensor, Tensor]
_UNSIGNED_BYTES = 8


def read_mnist_files(data_set: str, root: str | os.PathLike[str] | None, folders: Sequence[str]) -> tuple[Part, Part]:
    """Return uint8 images ``(N, 1, H, W)`` and int64 classes ``(N,)``, for training, then for testing.

    Args:
        data_set: Name of the data set, for messages.
        root: The folder that holds the four files, or one of ``folders`` that holds them.
        folders: Usual names of folders below ``root``.

    Raises:
        FileNotFoundError: If one of the four files is not found.
        ValueError: If one is damaged.
    """

    def part(prefix: str) -> Part:
        images, labels = (
            read_idx(find_file(data_set, root, ("", *folders), _file_names(f"{prefix}-{kind}", num_dims)))
            for kind, num_dims in (("images", 3), ("labels", 1))
        )
        return images.unsqueeze(1), labels.long()

    return part("train"), part("t10k")


def _file_names(stem: str, num_dims: int) -> list[str]:
    return [f"{stem}{mark}idx{num_dims}-ubyte{ending}" for mark in "-." for ending in ("", ".gz")]


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Raises:
        ValueError: If it is truncated, compressed wrongly, or holds something else.
    """
    try:
        content = _read_bytes(Path(path))
        zeros, kind, num_dims = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_dims}I", content, 4)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is damaged or no IDX file ({error}).") from None
    if zeros != 0 or kind != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it begins with {content[:4].hex()}.")

    start = 4 + 4 * num_dims
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(content) - start} bytes for an array of shape {shape}.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
