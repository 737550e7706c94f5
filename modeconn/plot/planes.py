"""Planes of networks as maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeconn.plot.drawn import Plane
from modeconn.plot.style import SPREADS, axes, check, spread, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Array = np.ndarray[Any, Any]
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
    name = _quantity_of([result], quantity)
    ax = axes(ax)
    points, values = (tensor.numpy() for tensor in result.scattered(name))
    unit = result.quantity(name).unit
    label = f"{name} ({unit})" if unit else name
    _contours(ax, points, values, unit, result.limit if name == "loss" else None, label)
    _lay_over(ax, [result], points)
    return ax


def mean_plane(
    *planes: Plane,
    quantity: str | None = None,
    statistic: Literal["mean", "std", "sem"] = "mean",
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean of a quantity over several planes of networks, as of several pairs, or how far they differ.

    All curves lie over it, and all networks, each of which has its name once. Planes must have one grid; what
    refinement added between its points lies elsewhere in each, and is left out. Colours of the loss end at the highest
    limit of the planes, on a logarithmic scale.

    Args:
        planes: What `modeconn.plane` returned with one ``extent=`` and one ``num_points=``.
        quantity: "loss", "accuracy", "error" or the name of a metric; default: the first of the first plane.
        statistic: "mean", or, of two planes or more, "std" for the standard deviation (with n - 1), or "sem" for the
            standard error of the mean.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no plane, planes have different grids, one does not have the quantity, the quantity is
            written in other units, or a spread is asked for of one plane.
    """
    if not planes:
        raise ValueError("there is no plane to draw.")
    if statistic not in ("mean", *SPREADS):
        told = ", ".join(map(repr, ("mean", *SPREADS)))
        raise ValueError(f"statistic must be one of {told}, got statistic={statistic!r:.80}.")
    if statistic != "mean" and len(planes) < 2:
        raise ValueError(f"the {SPREADS[statistic]} over planes needs two planes or more, got 1.")
    name = _quantity_of(planes, quantity)
    _check_grids(planes)
    unit = unit_of(planes, name)
    values = np.stack([one.values[name].numpy() for one in planes])
    values = values.mean(0) if statistic == "mean" else spread(values, statistic)
    limits = [one.limit for one in planes if one.limit is not None] if name == "loss" else []
    ax = axes(ax)
    points = np.stack(np.meshgrid(planes[0].x.numpy(), planes[0].y.numpy()), -1).reshape(-1, 2)
    about = [*filter(None, [unit]), f"over {len(planes)} plane{'s' * (len(planes) > 1)}"]
    label = f"{SPREADS.get(statistic, statistic)} of the {name}\n({'; '.join(about)})"
    _contours(ax, points, values.ravel(), unit, max(limits, default=None), label)
    _lay_over(ax, planes, points)
    return ax


def _quantity_of(planes: Sequence[Plane], quantity: str | None) -> str:
    """Return the name of the quantity that is drawn, by default the first of the first plane.

    Raises:
        ValueError: If one of them is no plane, or does not have it.
    """
    for number, one in enumerate(planes):
        what, whose = ("result", "the plane") if len(planes) == 1 else (f"plane {number}",) * 2
        check(what, one, "what modeconn.plane returns", "scattered", "networks", "quantity")
        quantity = next(iter(one.values)) if quantity is None else quantity
        if not isinstance(quantity, str) or quantity not in one.values:
            raise ValueError(f"{whose} has no quantity {quantity!r}, only {', '.join(map(repr, one.values))}.")
    return str(quantity)


def _check_grids(planes: Sequence[Plane]) -> None:
    """Raise unless all planes have the grid of the first."""
    first = planes[0]
    for number, one in enumerate(planes):
        if not (np.array_equal(one.x, first.x) and np.array_equal(one.y, first.y)):
            pairs = [[getattr(plane, axis) for plane in planes] for axis in ("x", "y")]
            ends = [end(float(axis[place]) for axis in some) for some in pairs for end, place in ((min, 0), (max, -1))]
            raise ValueError(
                f"plane {number} has another grid than plane 0. Measure all of them with one window and one number of "
                f"points, such as modeconn.plane(..., extent=({', '.join(f'{end:.4g}' for end in ends)}), "
                f"num_points=({len(first.x)}, {len(first.y)}))."
            )


def _contours(ax: Axes, points: _Array, values: _Array, unit: str, limit: float | None, label: str) -> None:
    """Draw values ``(M,)`` at points ``(M, 2)`` as filled contours, with axes and a bar of colours."""
    scale = _Scale.of((100 if unit == "%" else 1) * values, limit)
    ends = {"levels": scale.levels, "extend": "max" if scale.ends_below else "neither"}
    drawn = ax.tricontourf(*points.T, scale.heights, cmap="viridis", **ends)
    ax.tricontour(*points.T, scale.heights, levels=scale.levels, colors="white", linewidths=0.4, alpha=0.6)
    ax.set_aspect("equal")
    ax.set_xlim(points[:, 0].min(), points[:, 0].max())
    ax.set_ylim(points[:, 1].min(), points[:, 1].max())
    ax.set_xlabel("distance in weight space")
    ax.set_ylabel("distance in weight space")
    is_flat = np.ptp(points[:, 0]) > _FLAT * np.ptp(points[:, 1])
    side = {"orientation": "horizontal", "aspect": 30} if is_flat else {"shrink": 0.9}
    bar = ax.figure.colorbar(drawn, ax=ax, format=lambda height, _: f"{scale.value(height):.3g}", **side)
    bar.set_label(label)
    bar.set_ticks(scale.levels[::2])


def _lay_over(ax: Axes, planes: Sequence[Plane], points: _Array) -> None:
    """Draw curves and networks of planes over their contours; a network of several planes has its name once."""
    thin = 1 if len(planes) == 1 else 0.6
    for one in planes:
        if one.curve is not None:
            ax.plot(*one.curve.numpy().T, color="white", linewidth=3.2 * thin)
            ax.plot(*one.curve.numpy().T, color="black", linewidth=1.4 * thin)
    held = [(points[:, k].min(), points[:, k].max()) for k in (0, 1)]
    for label in dict.fromkeys(name for one in planes for name in one.networks):
        places = [one.networks[label].numpy() for one in planes if label in one.networks]
        # Others are outside of an extent that was given.
        inside = [p for p in places if all(low <= x <= high for (low, high), x in zip(held, p, strict=True))]
        if inside:
            _mark(ax, label, np.stack(inside), points)


@dataclass(frozen=True)
class _Scale:
    """Heights that contours are drawn of: values, or their logarithms, since low losses differ by little.

    Args:
        heights: Of all points, ``(M,)``.
        levels: Of the contours, rising.
        is_log: Whether they are logarithms.
        ends_below: Whether points lie above the last level.
    """

    heights: _Array
    levels: _Array
    is_log: bool
    ends_below: bool

    @classmethod
    def of(cls, values: _Array, limit: float | None) -> _Scale:
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


def _mark(ax: Axes, label: str, places: _Array, points: _Array) -> None:
    """Mark a network at its places ``(K, 2)`` and write its name beside their mean, where there is room."""
    middle, size = places.mean(0), 6 if len(places) == 1 else 4
    look = {"color": "white", "markeredgecolor": "black", "markersize": size, "zorder": 4, "clip_on": False}
    ax.plot(*places.T, "o", **look)
    is_right = bool(middle[0] > points[:, 0].mean())
    beside = {"xytext": (-7, 5), "ha": "right"} if is_right else {"xytext": (7, 5), "ha": "left"}
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    look = {"fontsize": "small", "color": "black", "zorder": 5, "bbox": box}
    ax.annotate(label, middle, textcoords="offset points", **beside, **look)
