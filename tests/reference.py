"""Slow and obvious versions of what modeconn computes fast."""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.curves import Curve


def de_casteljau(control_points: Tensor, t: float) -> Tensor:
    """A Bezier curve by repeated straight-line interpolation."""
    points = control_points
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def walk_chain(control_points: Tensor, t: float) -> Tensor:
    """A polygonal chain by finding the segment first."""
    position = t * (len(control_points) - 1)
    start = min(int(position), len(control_points) - 2)
    return torch.lerp(control_points[start], control_points[start + 1], position - start)


def sampled_length(curve: Curve, control_points: Tensor, t: float = 1.0, num_points: int = 20_001) -> float:
    """The length of a curve up to t by summing many short chords."""
    positions = torch.linspace(0, t, num_points, dtype=torch.float64)
    return float((curve.basis(positions) @ control_points.double()).diff(dim=0).norm(dim=1).sum())
