"""A plane of networks as a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.plot.drawn import Plane
from modeconn.plot.style import axes, check

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = 13  # of contours
_FLAT = 1.8  # width over height from which on a plane has its bar of colours below


def plane(result: Plane, *, quantity: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a quantity of a plane of networks as filled contours, with the networks and the curve in it.

    The loss has levels that grow by a factor, up to the plane's limit; what lies above has the last colour.

    Args:
        result: What `modeconn.plane` returned.
        quantity: "loss", "accuracy", "error" or the name of a metric; default: the first.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If the plane does not have the quantity.
    """
    check("result", result, "what modeconn.plane returns", "scattered", "networks", "quantity")
    name = next(iter(result.values)) if quantity is None else quantity
    if not isinstance(name, str) or name not in result.values:
        raise ValueError(f"the plane has no quantity {name!r}, only {', '.join(map(repr, result.values))}.")
    ax = axes(ax)
    points, values = (tensor.numpy() for tensor in result.scattered(name))
    unit = result.quantity(name).unit
    scale = _Scale.of((100 if unit == "%" else 1) * values, result.limit if name == "loss" else None)
    ends = {"levels": scale.levels, "extend": "max" if scale.ends_below else "neither"}
    drawn = ax.tricontourf(*points.T, scale.heights, cmap="viridis", **ends)
    ax.tricontour(*points.T, scale.heights, levels=scale.levels, colors="white", linewidths=0.4, alpha=0.6)
    if result.curve is not None:
        ax.plot(*result.curve.numpy().T, color="white", linewidth=3.2)
        ax.plot(*result.curve.numpy().T, color="black", linewidth=1.4)
    held = [(points[:, k].min(), points[:, k].max()) for k in (0, 1)]
    for label, place in result.networks.items():
        if not all(low <= float(x) <= high for (low, high), x in zip(held, place, strict=True)):
            continue  # outside of an extent that was given
        _mark(ax, label, place.tolist(), points)
    ax.set_aspect("equal")
    ax.set_xlim(points[:, 0].min(), points[:, 0].max())
    ax.set_ylim(points[:, 1].min(), points[:, 1].max())
    ax.set_xlabel("distance in weight space")
    ax.set_ylabel("distance in weight space")
    is_flat = np.ptp(points[:, 0]) > _FLAT * np.ptp(points[:, 1])
    side = {"orientation": "horizontal", "aspect": 30} if is_flat else {"shrink": 0.9}
    bar = ax.figure.colorbar(drawn, ax=ax, format=lambda height, _: f"{scale.value(height):.3g}", **side)
    bar.set_label(f"{name} ({unit})" if unit else name)
    bar.set_ticks(scale.levels[::2])
    return ax


@dataclass(frozen=True)
class _Scale:
    """Heights that contours are drawn of: values, or their logarithms, since low losses differ by little.

    Args:
        heights: Of all points, ``(M,)``.
        levels: Of the contours, rising.
        is_log: Whether they are logarithms.
        ends_below: Whether points lie above the last level.
    """

    heights: np.ndarray[Any, Any]
    levels: np.ndarray[Any, Any]
    is_log: bool
    ends_below: bool

    @classmethod
    def of(cls, values: np.ndarray[Any, Any], limit: float | None) -> _Scale:
        """Return the scale of values, which ends at a limit if there is one."""
        finite = values[np.isfinite(values)]
        is_log = limit is not None and len(finite) > 0 and bool(finite.min() > 0)
        if is_log:
            finite, limit = np.log(finite), float(np.log(limit))
            values = np.log(np.where(np.isfinite(values), values, np.inf))
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        end = high if limit is None else min(high, max(limit, low))
        end = end if end > low else low + max(abs(low), 1.0) * 1e-3
        # What is far above the end is drawn one step above it: contours between it and low points stay where they are.
        top = max(end, low) + (end - low)
        heights = np.clip(np.where(np.isfinite(values), values, top), low, top)
        return cls(heights, np.linspace(low, end, _LEVELS), is_log, bool((heights > end).any()))

    def value(self, height: float) -> float:
        """Return the value of a height."""
        return float(np.exp(height)) if self.is_log else float(height)


def _mark(ax: Axes, label: str, place: Sequence[float], points: np.ndarray[Any, Any]) -> None:
    """Mark a network and write its name beside it, on the side where there is room."""
    ax.plot(*place, "o", color="white", markeredgecolor="black", markersize=6, zorder=4, clip_on=False)
    is_right = place[0] > points[:, 0].mean()
    ax.annotate(
        label, place, xytext=(-7 if is_right else 7, 5), textcoords="offset points", ha="right" if is_right else "left",
        fontsize="small", color="black", zorder=5,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
    )  # fmt: skip
