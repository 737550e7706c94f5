"""Tiny ImageNet in its folder layout: JPEG images of 64x64 pixels in 200 classes."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from modeconn.data.files import find_file
from modeconn.tools.door import shortened

Part = tuple[Tensor, Tensor]
_SIDE, _LONGEST = 64, 200
NUM_CLASSES = 200


def read_tiny_imagenet(root: str | os.PathLike[str] | None) -> tuple[Part, Part]:
    """Return uint8 images ``(N, 3, 64, 64)`` and int64 classes, for training and for validation.

    The validation images serve as test set: the labels of the real one are not public. Classes are numbered in the
    order of ``wnids.txt``. Decoding 110,000 images takes about a minute, holding them 1.3 GB.

    Raises:
        FileNotFoundError: If ``wnids.txt`` or anything it leads to is missing.
        ValueError: If a file is damaged or of another kind.
        ImportError: If Pillow, which decodes JPEG, is not installed.
    """
    pillow = _import_pillow()
    base = find_file("tiny_imagenet", root, ("", "tiny-imagenet-200"), ("wnids.txt",)).parent
    class_of = _classes(base)
    train = [(path, index) for name, index in class_of.items() for path in _training_images(base, name)]
    return _read_part(pillow, train), _read_part(pillow, list(_annotated(base, class_of)))


def _classes(base: Path) -> dict[str, int]:
    """Return the number of each class by its name, which is the name of a folder."""
    names = _lines(base, "wnids.txt")
    for name in names:
        is_folder = Path(name).name == name and name.isprintable() and len(name) < _LONGEST
        if not is_folder or names.count(name) > 1 or len(names) > NUM_CLASSES:
            raise ValueError(
                f"{base / 'wnids.txt'} must name up to {NUM_CLASSES} folders, each once, got {len(names)}, among them "
                f"{name[:80]!r}."
            )
    return {name: index for index, name in enumerate(names)}


def _annotated(base: Path, class_of: dict[str, int]) -> Iterator[tuple[Path, int]]:
    for number, line in enumerate(_lines(base, "val/val_annotations.txt"), 1):
        file_name, name, *_ = [*line.split("\t"), "", ""]
        if name not in class_of or Path(file_name).name != file_name or len(file_name) > _LONGEST:
            raise ValueError(
                f"line {number} of {base / 'val' / 'val_annotations.txt'} must begin with the name of an image and "
                f"one of the {len(class_of)} classes, got {line[:80]!r}."
            )
        path = base / "val" / "images" / file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"line {number} of {base / 'val' / 'val_annotations.txt'} names an image that is not there: {path}."
            )
        yield path, class_of[name]


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("tiny_imagenet holds JPEG images, which need Pillow: pip install pillow.") from None
    return Image


def _lines(base: Path, name: str) -> list[str]:
    path = find_file("tiny_imagenet", base, ("",), (name,))
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({shortened(error, 600)}).") from None
    if not lines:
        raise ValueError(f"{path} is empty.")
    return lines


def _training_images(base: Path, class_name: str) -> list[Path]:
    folder = base / "train" / class_name / "images"
    paths = sorted(folder.glob("*.JPEG"))
    if not paths:
        raise FileNotFoundError(
            f"tiny_imagenet needs the images of class {class_name}, which wnids.txt names, but {folder} holds none."
        )
    return paths


def _read_part(pillow: ModuleType, examples: Sequence[tuple[Path, int]]) -> Part:
    images = torch.empty(len(examples), 3, _SIDE, _SIDE, dtype=torch.uint8)
    for row, (path, _) in enumerate(examples):
        images[row] = torch.from_numpy(_pixels(pillow, path)).permute(2, 0, 1)
    return images, torch.tensor([index for _, index in examples])


def _pixels(pillow: ModuleType, path: Path) -> np.ndarray:
    """Return the image in a file; its size is known, and checked, before memory for it is taken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # its size is judged below
            with pillow.open(path, formats=("JPEG",)) as image:
                if image.size != (_SIDE, _SIDE):
                    width, height = image.size
                    raise ValueError(f"{path} must have {_SIDE}x{_SIDE} pixels, it has {width}x{height}.")
                return np.array(image.convert("RGB"))  # some images are grey
    except (OSError, SyntaxError, struct.error, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or no JPEG image ({shortened(error, 600)}).") from None
