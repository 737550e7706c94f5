"""Polygonal chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modeconn.curves.curve import Curve
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings


@dataclass(frozen=True)
class PolyChain(Curve):
    r"""Straight segments from control point to control point, each taking an equal share of t.

    .. math:: B_k(t) = \max(0, \; 1 - |n t - k|)

    Args:
        num_segments: ``n``, at least 1; the chain has ``n - 1`` inner control points.
        free_ends: Whether `fit_curve` trains the ends as well: True for both, "a" or "b" for one of them.

    Raises:
        ValueError: If there is no segment.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026

    Example:
        >>> PolyChain(2).basis(0.25)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    num_segments: int = 2
    free_ends: bool | Literal["a", "b"] = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_segments")
        check_at_least(self, 1, "num_segments")

    @property
    def num_control_points(self) -> int:
        """``num_segments + 1``."""
        return self.num_segments + 1

    @property
    def knots(self) -> tuple[float, ...]:
        """The inner control points' positions."""
        return tuple(k / self.num_segments for k in range(1, self.num_segments))

    def _basis(self, t: Tensor) -> Tensor:
        k = torch.arange(self.num_segments + 1, device=t.device)
        return (1 - (self.num_segments * t[..., None] - k).abs()).clamp(min=0)

    def _derivative(self, t: Tensor) -> Tensor:
        segment = (self.num_segments * t).long().clamp(max=self.num_segments - 1)
        start = F.one_hot(segment, self.num_segments).to(t)
        return self.num_segments * (F.pad(start, (1, 0)) - F.pad(start, (0, 1)))
