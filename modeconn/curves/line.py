"""The straight line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modeconn.curves.curve import Curve


@dataclass(frozen=True)
class Line(Curve):
    r"""The straight line :math:`(1-t) c_0 + t c_1`: nothing between the ends to learn.

    Example:
        >>> Line().basis(0.25)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    free_ends: ClassVar[bool] = False

    @property
    def num_control_points(self) -> int:
        """Two: the ends."""
        return 2

    def _basis(self, t: Tensor) -> Tensor:
        return torch.stack([1 - t, t], dim=-1)

    def _derivative(self, t: Tensor) -> Tensor:
        return torch.stack([-torch.ones_like(t), torch.ones_like(t)], dim=-1)
