"""MNIST and Fashion-MNIST: files of the IDX format, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from modeconn.data.files import LARGEST, check_part, find_file
from modeconn.tools.door import shortened

Part = tuple[Tensor, Tensor]
_UNSIGNED_BYTES = 8
_NUM_CLASSES = 10


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
        path, labels_path = (
            find_file(data_set, root, ("", *folders), _file_names(f"{prefix}-{kind}", num_dims))
            for kind, num_dims in (("images", 3), ("labels", 1))
        )
        images, labels = read_idx(path, 3), read_idx(labels_path, 1).long()
        check_part(labels_path, images, labels, _NUM_CLASSES)
        return images.unsqueeze(1), labels

    return part("train"), part("t10k")


def _file_names(stem: str, num_dims: int) -> list[str]:
    return [f"{stem}{mark}idx{num_dims}-ubyte{ending}" for mark in "-." for ending in ("", ".gz")]


def read_idx(path: str | os.PathLike[str], num_dims: int) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file, plain or compressed with gzip.
        num_dims: How many dimensions its array has to have.

    Raises:
        ValueError: If it is truncated, compressed wrongly, or holds something else.
    """
    try:
        with _opened(Path(path)) as file:
            header = file.read(4 + 4 * num_dims)
            zeros, kind, dims = struct.unpack_from(">HBB", header)
            if (zeros, kind, dims) != (0, _UNSIGNED_BYTES, num_dims):
                raise ValueError(
                    f"{path} is no IDX file of unsigned bytes in {num_dims} dimensions: it begins with "
                    f"{header[:4].hex()}."
                )
            shape = struct.unpack_from(f">{num_dims}I", header, 4)
            expected = math.prod(shape)
            if expected > LARGEST:
                raise ValueError(f"{path} is damaged: an array of shape {shape} would take {expected} bytes.")
            content = file.read(expected + 1)  # one more, to notice that there is more
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is damaged or no IDX file ({shortened(error, 600)}).") from None
    if len(content) != expected:
        held = f"{len(content)} bytes" if len(content) < expected else "more bytes than that"
        raise ValueError(f"{path} is damaged: an array of shape {shape} takes {expected} bytes, it holds {held}.")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if is_compressed else path.open("rb")
