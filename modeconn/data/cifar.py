"""CIFAR-10 and CIFAR-100 in the "python" layout (Krizhevsky, 2009), read without running what a pickle asks for.

The files are pickles, and a pickle may call any function. `read_pickle` therefore admits the four names that those
files hold, and puts harmless stand-ins of its own in their place: not even NumPy's own reconstruction sees the file.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from modeconn.data.files import check_part, find_file
from modeconn.tools.door import shortened

Part = tuple[Tensor, Tensor]
_IMAGE_SHAPE = (3, 32, 32)
_NUMBERING = ("PUT", "BINPUT", "LONG_BINPUT")


def read_cifar10(root: str | os.PathLike[str] | None) -> tuple[Part, Part]:
    """Return uint8 images ``(N, 3, 32, 32)`` and int64 classes ``(N,)``, of 50,000 training and 10,000 test images.

    Raises:
        FileNotFoundError: If a file is in neither ``root`` nor ``root/cifar-10-batches-py``.
        ValueError: If a file is damaged, or is a pickle that holds anything else.
    """
    train = [f"data_batch_{batch}" for batch in range(1, 6)]
    files = (train, ["test_batch"])
    parts = [_read_part("cifar10", root, "cifar-10-batches-py", names, "labels", 10) for names in files]
    return parts[0], parts[1]


def read_cifar100(root: str | os.PathLike[str] | None) -> tuple[Part, Part]:
    """Return the images and their 100 fine classes; otherwise like `read_cifar10`, from ``cifar-100-python``."""
    files = (["train"], ["test"])
    parts = [_read_part("cifar100", root, "cifar-100-python", names, "fine_labels", 100) for names in files]
    return parts[0], parts[1]


def _read_part(
    data_set: str,
    root: str | os.PathLike[str] | None,
    folder: str,
    names: Sequence[str],
    labels_key: str,
    num_classes: int,
) -> Part:
    paths = [find_file(data_set, root, ("", folder), (name,)) for name in names]
    images, labels = zip(*(_read_batch(path, labels_key, num_classes) for path in paths), strict=True)
    return torch.cat(images), torch.cat(labels)


def _read_batch(path: Path, labels_key: str, num_classes: int) -> Part:
    content = read_pickle(path)
    try:
        images = torch.from_numpy(content["data"].reshape(-1, *_IMAGE_SHAPE))
        if not all(type(label) is int for label in content[labels_key]):
            raise TypeError
        labels = torch.tensor(content[labels_key], dtype=torch.int64)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise ValueError(f"{path} is no CIFAR file: it lacks images of 3x32x32 pixels or {labels_key!r}.") from None
    check_part(path, images, labels, num_classes)
    return images, labels


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a pickled dictionary of numbers, strings, lists and uint8 arrays; nothing in the file is ever called.

    Returns:
        The dictionary; keys are strings, byte strings are left as they are.

    Raises:
        ValueError: If the file is damaged, or names a function or class that no CIFAR file holds.
    """
    with open(path, "rb") as file:
        try:
            _check_numbers(file)
            content = _CifarUnpickler(file, encoding="bytes").load()
            return {_text(key): _array(value) for key, value in content.items()}
        except _ForbiddenNameError as error:
            raise ValueError(
                f"{path} asks for {shortened(error, 600)}, which no CIFAR file holds; it was not read any further."
            ) from None
        except Exception as error:  # a damaged pickle fails in any way whatever
            raise ValueError(
                f"{path} is damaged or no CIFAR file ({type(error).__name__}: {shortened(error, 600)})."
            ) from None


def _check_numbers(file: BinaryIO) -> None:
    """Raise if a pickle numbers its objects so high that memory for all below is taken; leave the file at its start."""
    size = os.fstat(file.fileno()).st_size
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _NUMBERING and argument > size:
            raise ValueError(f"it numbers an object {argument}, more than it has bytes")
    file.seek(0)


class _ForbiddenNameError(Exception):
    pass


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _ForbiddenNameError(f"{module}.{name}") from None


class _Uint8:
    """Stands for ``numpy.dtype("u1")``."""

    def __init__(self, code: bytes | str, *_: Any) -> None:
        if _text(code) != "u1":
            raise ValueError(f"arrays must be of uint8, got {_text(code)!r}")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like mean nothing for single bytes."""


class _Array:
    """Stands for a ``numpy.ndarray``."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Uint8):
            raise ValueError("arrays must be of uint8")
        # A copy, because PyTorch wants memory that may be written to.
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C").copy()


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Stand for ``_codecs.encode``, with which Python 3 writes byte strings for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"byte strings must be written as latin1, got {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Uint8,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,  # the module's name in NumPy 2
    ("_codecs", "encode"): _latin1_bytes,
}


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _array(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value
