"""Finding the files of a data set below a folder the user names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

LARGEST = 2 * 2**30
"""How many bytes one file of a data set may unpack to; the largest known one takes 0.2 GiB."""


def find_file(data_set: str, root: str | os.PathLike[str] | None, folders: Sequence[str], names: Sequence[str]) -> Path:
    """Return the first of ``root/folder/name`` that is a file, over all folders, then all names.

    Args:
        data_set: Name of the data set, for the message.
        root: The folder the user gave.
        folders: Usual folders below ``root``; the empty string is ``root`` itself.
        names: Names under which the file is known.

    Raises:
        ValueError: If ``root`` is None.
        FileNotFoundError: If there is no such file; says which one, and all the folders that were searched.
    """
    if root is None:
        raise ValueError(f"{data_set} does not come with the package: pass root=, the folder that holds its files.")
    searched = [Path(root, folder) for folder in folders]
    for folder in searched:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"{data_set} needs the file {' or '.join(names)}, which is not in {', '.join(map(str, searched))}. "
        "Pass root=, the folder that holds it."
    )


def check_part(path: str | os.PathLike[str], images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise unless a file of a data set has images, and a class for each of them.

    Args:
        path: The file of the labels, for the message.
        images: ``(N, ...)``.
        labels: int64.
        num_classes: Labels lie in ``0 .. num_classes - 1``.

    Raises:
        ValueError: If they do not; says how.
    """
    if not len(images):
        raise ValueError(f"{path} holds no image.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path} holds labels of shape {tuple(labels.shape)} for {len(images)} images.")
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{path} holds a label of {wrong}; labels lie in 0..{num_classes - 1}.")
