"""Bezier curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modeconn.curves.curve import Curve
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings


@dataclass(frozen=True)
class Bezier(Curve):
    r"""A Bezier curve; of degree 2 it is the curve of mode connectivity.

    .. math:: \theta(t) = \sum_{k=0}^{n} \binom{n}{k} t^k (1-t)^{n-k} \, c_k

    Args:
        degree: ``n``, at least 1; the curve has ``n - 1`` inner control points.
        free_ends: Whether `fit_curve` trains the ends as well: True for both, "a" or "b" for one of them.

    Raises:
        ValueError: If the degree is below 1.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026

    Example:
        >>> Bezier(2).basis(0.5)
        tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64)
    """

    degree: int = 2
    free_ends: bool | Literal["a", "b"] = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "degree")
        check_at_least(self, 1, "degree")

    @property
    def num_control_points(self) -> int:
        """``degree + 1``."""
        return self.degree + 1

    def _basis(self, t: Tensor) -> Tensor:
        return _bernstein(t, self.degree)

    def _derivative(self, t: Tensor) -> Tensor:
        lower = _bernstein(t, self.degree - 1)
        return self.degree * (F.pad(lower, (1, 0)) - F.pad(lower, (0, 1)))


def _bernstein(t: Tensor, degree: int) -> Tensor:
    k = torch.arange(degree + 1, device=t.device)
    binomial = torch.tensor([math.comb(degree, i) for i in range(degree + 1)], dtype=t.dtype, device=t.device)
    return binomial * t[..., None] ** k * (1 - t[..., None]) ** (degree - k)
