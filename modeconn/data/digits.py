"""The UCI handwritten digits, which come with the package (see digits.txt for their origin and licence)."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN = 1297


def read_digits(split: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1,297 digits to train on and 500 to test on.

    Args:
        split: Seeds the random division.

    Returns:
        Inputs float32 ``(N, 64)`` in [0, 1], targets int64 ``(N,)``, for training, then for testing.
    """
    with resources.files("modeconn.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        inputs = torch.from_numpy(arrays["inputs"]).float() / 16
        targets = torch.from_numpy(arrays["targets"]).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(split))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (inputs[train], targets[train]), (inputs[test], targets[test])
