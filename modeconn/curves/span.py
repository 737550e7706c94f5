"""The networks of a plane through weight space, and where in it other weights lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.curves.path import Path
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import but_for, norm_layers, recalibrate
from modeconn.network.batches import num_examples
from modeconn.network.copies import copy_of
from modeconn.network.estimates import differing, mixed, settle, warn_of
from modeconn.network.loss import Forward
from modeconn.network.weights import load_buffers

_FLAT = 1e-6  # height over the line through two of the points, relative to the longest side, below which there is none
Buffers = Mapping[str, Tensor]


class Span:
    r"""The plane through three points of a weight space, with orthonormal coordinates.

    The first point is the origin, the second lies on the axis of x, and the third above it:
    :math:`\theta(x, y) = a + x u + y v` with :math:`u = (b - a) / \lVert b - a \rVert`, and v the part of c - a that is
    orthogonal to u, of length 1. Distances in the plane are those of weight space.

    Args:
        line: The straight line between the first two points, for its weight space, template and training data.
        third: The third point, ``(P,)``.
        buffers: Of the three, by name.

    Attributes:
        corners: Coordinates of the three points, float64 ``(3, 2)``.

    Raises:
        ValueError: If the three are on one line.
    """

    def __init__(self, line: Path, third: Tensor, buffers: Sequence[Buffers]) -> None:
        self._line, self._buffers = line, buffers
        wide = torch.promote_types(third.dtype, torch.float32)  # steps of a plane are lost in half precision
        a, b, third = (x.to(wide) for x in (*line.control_points, third))
        along, aside = b - a, third - a
        length, reach = dot(along, along) ** 0.5, dot(aside, aside) ** 0.5
        share = dot(along, aside) / length if length else 0.0
        self._u = along.div_(length) if length else along
        self._v = aside.sub_(self._u, alpha=share)
        height = dot(self._v, self._v) ** 0.5
        if not height > _FLAT * max(length, reach) or not length > _FLAT * reach:
            raise ValueError(
                "the three points (or directions) are on one line, or one is out of proportion, so there is no plane "
                "through them. Take a third network that is not between the others or beyond them; a curve that "
                "has not been learned yet is a line."
            )
        self._v.div_(height)
        self._v.sub_(self._u, alpha=dot(self._u, self._v))  # once more, against rounding
        self._origin = a
        self._length, self._height, self._share = length, height, share
        self.corners = torch.tensor([[0, 0], [length, 0], [share, height]], dtype=torch.float64, device="cpu")
        self._differing = differing(line.template, buffers)
        warn_of(self._differing, buffers[0])

    def place(self, theta: Tensor) -> tuple[tuple[float, float], Tensor]:
        """Return the coordinates of the point of the plane next to weights ``(P,)``, and the way from there to them."""
        way = theta.to(self._origin.dtype) - self._origin
        x, y = dot(way, self._u), dot(way, self._v)
        return (x, y), way.sub_(self._u, alpha=x).sub_(self._v, alpha=y)

    def networks(
        self, calibrate: Iterable[Any] | AdversarialExamples | None, limit: int | None, forward: Forward | None
    ) -> SpanNetworks:
        """Return one network that can be moved in the plane; arguments are those of `Path.networks`."""
        if calibrate is None and self._line.training.loader is None and norm_layers(self._line.template):
            raise ValueError(
                "between the networks of a plane batch norm needs statistics of training data, but none are "
                "remembered. Pass recalibrate=, a loader of such data."
            )
        data = self._line.calibration_data(calibrate, limit, repair=False)
        return SpanNetworks(self, data, forward or self._line.training.forward)

    def weights(self, x: float, y: float) -> tuple[float, float, float]:
        """Return the weights, with sum 1, by which a point is the sum of the three."""
        third = y / self._height
        second = (x - self._share * third) / self._length
        return 1 - second - third, second, third

    def point(self, x: float, y: float, out: Tensor) -> Tensor:
        """Write the weights at a point into ``out`` and return it."""
        return out.copy_(self._origin).add_(self._u, alpha=x).add_(self._v, alpha=y)

    def load(self, x: float, y: float, model: nn.Module, theta: Tensor) -> None:
        """Move a model to a point; ``theta (P,)`` is scratch."""
        self._line.space.load(self.point(x, y, theta).to(self._line.control_points.dtype), model)
        buffers = {**self._buffers[0], **mixed(self._differing, self._buffers, self.weights(x, y))}
        load_buffers(buffers, model)
        settle(model)

    def new_model(self) -> tuple[nn.Module, Tensor]:
        """Return a network of the architecture, in eval mode, and scratch for its weights."""
        return copy_of(self._line.template), torch.empty_like(self._origin)


class SpanNetworks:
    """One network that is moved in a plane: calling it with coordinates returns it as it is there, in eval mode.

    Args:
        span: The plane.
        calibration: What batch norm is recalibrated on, empty for a model without it.
        forward: Runs the network on a batch of it; None to hand its inputs to the model.
    """

    def __init__(self, span: Span, calibration: list[Any] | AdversarialExamples, forward: Forward | None) -> None:
        self._span, self._calibration, self._forward = span, calibration, forward
        self._model, self._theta = span.new_model()
        self._missed: tuple[str, ...] | None = None  # of a network that was recalibrated

    @property
    def calibration(self) -> list[Any] | AdversarialExamples:
        """What batch norm is recalibrated on, empty for nothing."""
        return self._calibration

    @property
    def forward(self) -> Forward | None:
        """What runs the network on a batch of it."""
        return self._forward

    @property
    def statistics(self) -> str:
        """Which statistics norm layers have, empty for none."""
        if not self._calibration:
            return ""
        if self._missed is None:  # all points were measured before, or by other processes
            self(0.0, 0.0)
        if isinstance(self._calibration, AdversarialExamples):
            on = "on each network's own adversarial examples"
            return f"norm layers recalibrated at every point, {on}{but_for(self._missed)}"
        count = sum(map(num_examples, self._calibration))
        return f"norm layers recalibrated at every point on {count:,} training examples{but_for(self._missed)}"

    def __call__(self, x: float, y: float) -> nn.Module:
        """Return the network at a point, always the same module."""
        self._span.load(x, y, self._model, self._theta)
        if self._calibration:
            self._missed = recalibrate(self._model, self._calibration, forward=self._forward)
        return self._model


def dot(x: Tensor, y: Tensor) -> float:
    """Return a product in double precision, of a part at a time: a wide copy of all weights would be large."""
    parts = zip(x.split(_PART), y.split(_PART), strict=True)
    return math.fsum(float(one.double() @ other.double()) for one, other in parts)


_PART = 1 << 22
