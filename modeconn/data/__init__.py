"""Data sets in memory: the embedded digits, and CIFAR, MNIST-style and Tiny ImageNet files from a folder.

`load` returns a pair of `TensorLoader`, `text` a pair of `TextLoader`, windows of the characters of a text file. Any
other re-iterable of ``(inputs, targets)`` batches works everywhere in the package as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.data.augment import Augmentation, Crop, Flip, Rotate
from modeconn.data.cifar import read_cifar10, read_cifar100
from modeconn.data.digits import read_digits
from modeconn.data.idx import read_mnist_files
from modeconn.data.loader import TensorLoader
from modeconn.data.text import TextLoader, text
from modeconn.data.tiny_imagenet import read_tiny_imagenet
from modeconn.tools.door import checked

__all__ = ["Augmentation", "Crop", "Flip", "Rotate", "TensorLoader", "TextLoader", "load", "names", "text"]

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _DataSet:
    read: Callable[[str | os.PathLike[str] | None, int], tuple[Part, Part]]
    num_classes: int
    batch_size: int = 128
    augment: tuple[Augmentation, ...] = ()


_CIFAR_AUGMENT = (Rotate(15), Flip(), Crop(4))  # Tatro et al. (2020)
_TINY_IMAGENET_AUGMENT = (Rotate(30), Flip(), Crop(8))  # Tatro et al. (2020), without their scaling and colour jitter

_DATA_SETS = {
    "digits": _DataSet(lambda root, seed: read_digits(seed), 10, batch_size=64),
    "cifar10": _DataSet(lambda root, seed: read_cifar10(root), 10, augment=_CIFAR_AUGMENT),
    "cifar100": _DataSet(lambda root, seed: read_cifar100(root), 100, augment=_CIFAR_AUGMENT),
    "mnist": _DataSet(lambda root, seed: read_mnist_files("mnist", root, ("mnist", "MNIST/raw")), 10),
    "fashion_mnist": _DataSet(
        lambda root, seed: read_mnist_files(
            "fashion_mnist", root, ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw")
        ),
        10,
    ),
    "tiny_imagenet": _DataSet(lambda root, seed: read_tiny_imagenet(root), 200, augment=_TINY_IMAGENET_AUGMENT),
}


def names() -> tuple[str, ...]:
    """Return the names that `load` knows.

    Example:
        >>> names()
        ('cifar10', 'cifar100', 'digits', 'fashion_mnist', 'mnist', 'tiny_imagenet')
    """
    return tuple(sorted(_DATA_SETS))


@checked
def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    batch_size: int | None = None,
    augment: bool | Sequence[Augmentation] = True,
    validation: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[TensorLoader, TensorLoader]:
    """Load a data set into memory.

    Images are float32 in [0, 1], shape ``(N, C, H, W)``; digits are ``(N, 64)``.

    Args:
        name: "digits" (in the package), "cifar10", "cifar100", "mnist", "fashion_mnist" or "tiny_imagenet".
        root: Folder that holds the files, or holds the folder that they are usually unpacked to; not for digits.
        batch_size: Of both loaders; default 64 for digits, 128 for images.
        augment: Of the training loader. True: rotation, flip and padded crop as Tatro et al. (2020) train on CIFAR
            and Tiny ImageNet, nothing on the others; False or an empty sequence: none; or your own augmentations.
        validation: If not 0, so many training examples are held out and returned *in place of the test set*, to
            choose settings by.
        seed: Decides which training examples are held out, and which digits are for training.
        device: Where the tensors live.

    Returns:
        The training loader, shuffled and augmented, and the test (or validation) loader, which is neither.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, ``validation`` leaves nothing to train on, or a file is
            damaged or would run code.
        FileNotFoundError: If a file is missing: which one, and where it was looked for.

    Example:
        >>> train, test = load("digits")
        >>> train
        TensorLoader(1297 x (64,), 10 classes, batch_size=64, shuffle=True)
        >>> test.num_examples
        500
    """
    if name not in _DATA_SETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(names())}.")
    chosen = _DATA_SETS[name]
    batch_size = chosen.batch_size if batch_size is None else batch_size
    train, test = (
        TensorLoader(inputs, targets, batch_size, num_classes=chosen.num_classes)
        for inputs, targets in chosen.read(root, seed)
    )
    if validation and not 0 < validation < train.num_examples:
        raise ValueError(
            f"of {train.num_examples} training examples, 1 to {train.num_examples - 1} can be held out for validation, "
            f"or none, got validation={validation}."
        )
    if validation:
        train, test = train.split(validation, seed=seed)
    if isinstance(augment, bool):
        augment = chosen.augment if augment else ()
    return train.with_(shuffle=True, augment=tuple(augment)).to(device), test.to(device)
