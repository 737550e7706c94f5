"""Tiny ImageNet in its folder layout: JPEG images of 64x64 pixels in 200 classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from modeconn.data.files import find_file

Part = tuple[Tensor, Tensor]
_SIDE = 64


def read_tiny_imagenet(root: str | os.PathLike[str] | None) -> tuple[Part, Part]:
    """Return uint8 images ``(N, 3, 64, 64)`` and int64 classes, for training and for validation.

    The validation images serve as test set: the labels of the real one are not public. Classes are numbered in the
    order of ``wnids.txt``. Decoding 110,000 images takes about a minute, holding them 1.3 GB.

    Raises:
        FileNotFoundError: If ``wnids.txt`` or anything it leads to is missing.
        ImportError: If Pillow, which decodes JPEG, is not installed.
    """
    pillow = _import_pillow()
    base = find_file("tiny_imagenet", root, ("", "tiny-imagenet-200"), ("wnids.txt",)).parent
    class_of = {name: index for index, name in enumerate(_lines(base, "wnids.txt"))}

    train = [(path, index) for name, index in class_of.items() for path in _training_images(base, name)]
    annotations = [line.split("\t")[:2] for line in _lines(base, "val/val_annotations.txt")]
    test = [(base / "val" / "images" / file_name, class_of[name]) for file_name, name in annotations]
    return _read_part(pillow, train), _read_part(pillow, test)


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("tiny_imagenet holds JPEG images, which need Pillow: pip install pillow.") from None
    return Image


def _lines(base: Path, name: str) -> list[str]:
    return find_file("tiny_imagenet", base, ("",), (name,)).read_text().splitlines()


def _training_images(base: Path, class_name: str) -> list[Path]:
    folder = base / "train" / class_name / "images"
    paths = sorted(folder.glob("*.JPEG"))
    if not paths:
        raise FileNotFoundError(f"tiny_imagenet needs the images of class {class_name}, but {folder} holds none.")
    return paths


def _read_part(pillow: ModuleType, examples: Sequence[tuple[Path, int]]) -> Part:
    images = torch.empty(len(examples), 3, _SIDE, _SIDE, dtype=torch.uint8)
    for row, (path, _) in enumerate(examples):
        with pillow.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # some images are grey
        if pixels.shape != (_SIDE, _SIDE, 3):
            raise ValueError(f"{path} must have {_SIDE}x{_SIDE} pixels, it has {pixels.shape[1]}x{pixels.shape[0]}.")
        images[row] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images, torch.tensor([index for _, index in examples])
