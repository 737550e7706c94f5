"""What all curves share: a curve is ``basis(t) @ control_points``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modeconn.tools.shown import Shown

_CHUNK = 1 << 20  # columns made float64 at a time: 8 MB a row, whatever the size of the network
_PANELS = 64
_NODES, _NODE_WEIGHTS = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(8))


class Curve(Shown, ABC):
    r"""A path from network a to network b through weight space, linear in its control points.

    .. math:: \theta(t) = \sum_k B_k(t) \, c_k, \qquad c_k \in \mathbb{R}^P, \quad \sum_k B_k(t) = 1

    A curve holds no weights: control points ``(K, P)`` are passed to it. With ``free_ends`` the first and the last
    one are trained too, and need no longer be the networks that were connected; "a" frees the first alone, "b" the last
    alone. A subclass states only its formula:
    `num_control_points`, `_basis` and `_derivative`, float64, for ``t`` of any shape. Its ends are fixed unless it sets
    ``free_ends``.
    """

    free_ends: bool | Literal["a", "b"] = False

    @property
    @abstractmethod
    def num_control_points(self) -> int:
        """``K``, ends included."""

    @property
    def knots(self) -> tuple[float, ...]:
        """The inner positions at which the curve has a corner."""
        return ()

    @abstractmethod
    def _basis(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _derivative(self, t: Tensor) -> Tensor: ...

    @property
    def trained(self) -> slice:
        """The rows of the control points that `fit_curve` learns."""
        return slice(0 if self.frees(0) else 1, self.num_control_points - (0 if self.frees(1) else 1))

    def frees(self, end: float) -> bool:
        """Whether `fit_curve` trains the end at t=0 or t=1, so that it need not be the network that was connected."""
        return self.free_ends in (True, "ab"[int(end)])

    @property
    def num_trained(self) -> int:
        """How many control points `fit_curve` learns."""
        return len(range(self.num_control_points)[self.trained])

    def basis(self, t: float | Tensor) -> Tensor:
        """Return the weights of the control points at ``t``.

        Args:
            t: Positions in [0, 1], of any shape.

        Returns:
            float64 on the CPU, the shape of ``t`` and then ``(K,)``; they sum to 1.

        Raises:
            ValueError: If a position lies outside [0, 1].
        """
        return self._basis(check_positions(t))

    def derivative(self, t: float | Tensor) -> Tensor:
        """Return the weights whose sum over the control points is the velocity at ``t``; shaped like `basis`."""
        return self._derivative(check_positions(t))

    def initial_control_points(self, theta_a: Tensor, theta_b: Tensor) -> Tensor:
        """Return control points ``(K, P)`` evenly spaced on the straight line, which the curve then is.

        The ends are ``theta_a`` and ``theta_b`` bit for bit.
        """
        last = self.num_control_points - 1
        inner = [torch.lerp(theta_a, theta_b, k / last) for k in range(1, last)]
        return torch.stack([theta_a, *inner, theta_b])

    def point(self, control_points: Tensor, t: float, *, out: Tensor | None = None) -> Tensor:
        """Return the weights ``(P,)`` at ``t``; at 0 and 1 the end itself, bit for bit.

        Args:
            control_points: ``(K, P)``.
            t: A position in [0, 1].
            out: Where to write the result, ``(P,)``.
        """
        out = torch.empty_like(control_points[0]) if out is None else out
        return mix(control_points, self.basis(t).tolist(), out)

    def arc_length(self, control_points: Tensor, t: float | Tensor) -> Tensor:
        """Return the length of the curve from 0 to each ``t``, in the Euclidean norm of weight space.

        By 8-point Gauss-Legendre quadrature of the speed on at least 64 panels that meet at the corners; the speed
        needs only the inner products of the control points, taken once in float64.

        Args:
            control_points: ``(K, P)``.
            t: Positions in [0, 1], of any shape.

        Returns:
            float64 on the CPU, shaped like ``t``.
        """
        positions = check_positions(t)
        edges = torch.cat(
            [torch.linspace(0, 1, _PANELS + 1, dtype=torch.float64, device=positions.device), positions.flatten()]
        )
        edges = torch.cat([edges, torch.tensor(self.knots, dtype=torch.float64, device=positions.device)]).unique()
        half = edges.diff() / 2
        nodes = edges[:-1, None] + half[:, None] * (1 + _NODES)

        velocity = self._derivative(nodes)[..., 1:]  # weights sum to 0, so distances from the first end suffice
        gram = _gram(control_points)
        speed = torch.einsum("...i,ij,...j->...", velocity, gram, velocity).clamp(min=0).sqrt()
        lengths = torch.cat([half.new_zeros(1), (half * (speed @ _NODE_WEIGHTS)).cumsum(0)])
        return lengths[torch.searchsorted(edges, positions)]

    def length(self, control_points: Tensor) -> float:
        """Return the length of the whole curve, in the Euclidean norm of weight space."""
        return float(self.arc_length(control_points, 1.0))


@torch.no_grad()
def mix(control_points: Tensor, weights: Sequence[float], out: Tensor) -> Tensor:
    """Write the weighted mean of control points into ``out`` and return it.

    By interpolating on from point to point: a weight on which all points agree keeps its bits, points of weight 0 are
    not touched, and there is nothing to send to an accelerator but numbers. It is no slower than one product of matrix
    and vector (15 million weights, quadratic curve, one core: 8.1 ms, the product 8.9 ms).

    Args:
        control_points: ``(K, P)``.
        weights: ``K`` numbers, none negative, that sum to 1.
        out: ``(P,)``.
    """
    (total, mean), *others = ((weight, point) for weight, point in zip(weights, control_points, strict=True) if weight)
    if not others:
        return out.copy_(mean)
    for weight, point in others:
        total += weight
        mean = torch.lerp(mean, point, weight / total, out=out)
    return mean


def check_positions(t: float | Tensor) -> Tensor:
    """Return ``t`` in float64 on the CPU.

    Raises:
        ValueError: If a position lies outside [0, 1].
    """
    positions = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    # A comparison that is False for NaN, which is outside of [0, 1].
    outside = positions[~((positions >= 0) & (positions <= 1))]
    if outside.numel():
        raise ValueError(f"t must lie in [0, 1], got t={outside.flatten()[0].item()}.")
    return positions


def _gram(control_points: Tensor) -> Tensor:
    """Return the inner products of ``control_points[1:] - control_points[0]``, float64 ``(K - 1, K - 1)``."""
    size = len(control_points) - 1
    gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    for chunk in control_points.detach().split(_CHUNK, dim=1):
        difference = (chunk[1:] - chunk[:1]).double()
        gram += (difference @ difference.t()).cpu()
    return gram
