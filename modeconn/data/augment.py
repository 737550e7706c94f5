"""Random changes to a batch of images, on its device.

An augmentation is any callable that takes images ``(N, C, H, W)`` with values in [0, 1] and returns as many of the
same shape. The ones here draw from torch's global CPU generator whatever the device: a seeded run sees the same
changes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeconn.tools.door import check_settings

Augmentation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Flip:
    """Mirror each image left to right with a probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got probability={self.probability}.")

    def __call__(self, images: Tensor) -> Tensor:
        flipped = torch.rand(len(images), device="cpu") < self.probability
        return torch.where(flipped.to(images.device).reshape(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class Crop:
    """Pad with black by ``padding`` pixels on every side, then cut the original size out at a random place."""

    padding: int = 4

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.padding >= 0:
            raise ValueError(f"padding must be at least 0, got padding={self.padding}.")

    def __call__(self, images: Tensor) -> Tensor:
        offsets = torch.randint(0, 2 * self.padding + 1, (2, len(images)), device="cpu")
        return crop(images, offsets.to(images.device), self.padding)


@dataclass(frozen=True)
class Rotate:
    """Turn each image about its centre by an angle drawn uniformly from ``[-degrees, degrees]``."""

    degrees: float = 15.0

    def __post_init__(self) -> None:
        check_settings(self)
        if not math.isfinite(self.degrees):
            raise ValueError(f"degrees must be finite, got degrees={self.degrees}.")

    def __call__(self, images: Tensor) -> Tensor:
        angles = (2 * torch.rand(len(images), device="cpu") - 1) * math.radians(self.degrees)
        return rotate(images, angles.to(images))


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Shift each image by ``padding - offset`` pixels, black beyond its edges.

    Args:
        images: ``(N, C, H, W)``.
        offsets: int64 ``(2, N)``, rows and columns, in ``[0, 2 * padding]``; ``padding`` leaves an image as it is.
        padding: Largest shift.

    Returns:
        ``(N, C, H, W)``; pixels are moved, never mixed.
    """
    num, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[0].reshape(-1, 1) + torch.arange(height, device=images.device)
    columns = offsets[1].reshape(-1, 1) + torch.arange(width, device=images.device)
    rows = rows.reshape(num, 1, height, 1).expand(num, channels, height, width + 2 * padding)
    columns = columns.reshape(num, 1, 1, width).expand(num, channels, height, width)
    return padded.gather(2, rows).gather(3, columns)


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Turn each image counter-clockwise about its centre, bilinearly, black beyond its edges.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        angles: ``(N,)`` in radians.

    Returns:
        ``(N, C, H, W)`` in [0, 1].
    """
    height, width = images.shape[-2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Maps places of the output to places of the input, in coordinates that run from -1 to 1 along either side.
    inverse = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False).clamp_(0, 1)
