"""Draw results with matplotlib: each function takes an ``ax``, draws what it is given, and returns the ``ax``.

Nothing is computed here but means and spreads, and no global setting of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


class Quantity(Protocol):
    """How a quantity is drawn; "%" is the unit of fractions shown in percent."""

    unit: str


class AlongCurve(Protocol):
    """What `profile` draws: values along a curve by name, tensors on the CPU, as `modeconn.Profile` has them."""

    t: Tensor

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Values at each position, ``(N,)``."""
        ...

    @property
    def own(self) -> Mapping[str, Tensor]:
        """Values of both ends with the statistics they came with, ``(2,)``."""
        ...

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is drawn."""
        ...


class RobustProfile(Protocol):
    """What `robust_profile` draws: values along a curve by row, tensors on the CPU."""

    t: Tensor
    loss: Mapping[str, Tensor]
    accuracy: Mapping[str, Tensor]
    interval: Mapping[str, Tensor]
    attacks: Mapping[str, Any]


class Alignment(Protocol):
    """What `correlation` draws: mean correlation ``(before, after)`` by group."""

    correlation: Mapping[str, tuple[float, float]]


class Rotation(Protocol):
    """What `eigen_angles` draws: angles ``(..., n)`` by group, from 0 to pi."""

    def angles(self) -> Mapping[str, Tensor]:
        """Return the angles of each group that rotates."""
        ...


class History(Protocol):
    """What `history` draws: the loss of each epoch, and its means in bins of t."""

    loss: Sequence[float]
    loss_by_t: Sequence[Sequence[float | None]]


class Fit(Protocol):
    """Something learned, with its history if there is one."""

    history: History | None


class Plane(Protocol):
    """What `plane` draws: values of networks of a plane, tensors on the CPU, as `modeconn.Plane` has them."""

    x: Tensor
    y: Tensor
    networks: Mapping[str, Tensor]
    curve: Tensor | None
    limit: float | None

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Values of the grid, ``(H, W)``."""
        ...

    def scattered(self, name: str) -> tuple[Tensor, Tensor]:
        """Return all points of a quantity ``(M, 2)``, and its values ``(M,)``."""
        ...

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is drawn."""
        ...


class Comparison(Protocol):
    """What `comparison` draws: by row and column one value for each pair."""

    values: Mapping[str, Mapping[str, Sequence[float]]]
    columns: Sequence[str]


Correlation = Mapping[str, tuple[float, float]]
"""Mean correlation ``(before, after)`` by group."""

# Colours that colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BEFORE, _AFTER = "#8C8C8C", _COLOURS[0]
_PERCENT = {"accuracy", "error"}
_DASHES = ("-", "--", "-.", ":")  # line styles, which grey print tells apart too
_FEW_GROUPS, _MANY_GROUPS = 6, 12
_LEVELS = 13  # of contours
_FLAT = 1.8  # width over height from which on a plane has its bar of colours below


def profile(
    *profiles: AlongCurve, labels: Sequence[str] | None = None, quantity: str = "loss", ax: Axes | None = None
) -> Axes:
    """Draw one quantity along one or several curves.

    Dots mark the ends, recalibrated like all points between them. Where the ends' own statistics give another value,
    a ring marks it.

    Args:
        profiles: What `Connection.evaluate` or `Connection.curvature` returned, one line each.
        labels: A name for each, for the legend.
        quantity: What to draw: "loss", "accuracy", "error" or the name of a metric; fractions of right or wrong answers
            are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, a label is missing, or a profile does not have the quantity.
    """
    names = _labels(labels, profiles, "profile")
    for number, one in enumerate(profiles):
        _check(f"profile {number}", one, "what Connection.evaluate returns", "t", "values", "own", "quantity")
        if not isinstance(quantity, str) or quantity not in one.values:
            raise ValueError(f"profile {number} has no quantity {quantity!r}, only {', '.join(map(repr, one.values))}.")
    ax = _axes(ax)
    for number, (one, name) in enumerate(zip(profiles, names, strict=True)):
        colour, dashes = _style(number)
        scale = 100 if one.quantity(quantity).unit == "%" else 1
        t, values = one.t.numpy(), scale * one.values[quantity].numpy()
        ax.plot(t, values, dashes, color=colour, linewidth=1.8, label=name)
        ax.plot(t[[0, -1]], values[[0, -1]], "o", color=colour, markersize=5, clip_on=False, zorder=3)
        if quantity in one.own:
            own = scale * one.own[quantity].numpy()
            if not np.allclose(own, values[[0, -1]]):
                ax.plot(t[[0, -1]], own, "o", color=colour, markersize=8, fillstyle="none", clip_on=False, zorder=3)
    unit = profiles[0].quantity(quantity).unit
    ax.set_xlabel("position on the curve, t (0: network a, 1: network b)")
    ax.set_ylabel(f"{quantity} ({unit})" if unit else quantity)
    ax.set_xlim(0, 1)
    return _finished(ax, legend=labels is not None)


def robust_profile(
    profile: RobustProfile,
    *,
    rows: Sequence[str] | None = None,
    quantity: Literal["loss", "accuracy", "error"] = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Draw what attacks leave along a curve, a line for each row; around accuracies and errors their 95% intervals.

    Args:
        profile: What `Connection.robustness` returned.
        rows: Which to draw; default all, the worst case only if there are several attacks.
        quantity: What to draw; accuracy and error are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no such row or quantity.
    """
    _check("profile", profile, "what Connection.robustness returns", "t", "loss", "accuracy", "interval", "attacks")
    if quantity not in ("loss", *_PERCENT):
        raise ValueError(f"quantity must be 'loss', 'accuracy' or 'error', got quantity={quantity!r}.")
    if rows is not None and not _is_list(rows):
        raise ValueError(f"rows must be a list of names, got rows={rows!r:.80}.")
    chosen = list(profile.accuracy)[: None if len(profile.attacks) > 1 else -1] if rows is None else rows
    for row in chosen:
        if not isinstance(row, str) or row not in profile.accuracy:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(profile.accuracy)}.")
    ax = _axes(ax)
    t = profile.t.numpy()
    for number, row in enumerate(chosen):
        colour, dashes = _style(number)
        if quantity == "loss":
            ax.plot(t, profile.loss[row].numpy(), dashes, marker=".", color=colour, label=row)
            continue
        values, bounds = profile.accuracy[row].numpy(), profile.interval[row].numpy().T
        if quantity == "error":
            values, bounds = 1 - values, 1 - bounds
        ax.plot(t, 100 * values, dashes, marker=".", color=colour, label=row)
        ax.fill_between(t, *(100 * bounds), color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel("position on the curve, t (0: network a, 1: network b)")
    ax.set_ylabel(f"{quantity} (%)" if quantity in _PERCENT else "loss (mean per example)")
    _finished(ax, legend=False)
    # The bands reach from edge to edge.
    beside = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": min(3, len(ax.lines))}
    ax.legend(frameon=False, fontsize="small", **beside)
    return ax


def correlation(
    *alignments: Alignment | Correlation, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the mean correlation of paired units before and after alignment, for each group of units.

    Args:
        alignments: What `modeconn.align` returned, or the ``correlation`` of it. Several alignments of one architecture
            are drawn as their mean, with a bar from the smallest to the largest value.
        labels: Other names for the groups, in their order.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is nothing to draw, alignments are of different architectures, or a label is missing.
    """
    for number, one in enumerate(alignments):
        if not isinstance(one, Mapping):
            _check(f"alignment {number}", one, "what modeconn.align returns, or its correlation", "correlation")
    correlations = [one if isinstance(one, Mapping) else one.correlation for one in alignments]
    if not correlations or not correlations[0]:
        raise ValueError("there is no correlation to draw: pass alignments that were given data (loader=).")
    groups = list(correlations[0])
    if any(list(one) != groups for one in correlations):
        raise ValueError("these alignments are of different architectures: their groups differ.")
    names = _labels(labels, groups, "group") if labels is not None else groups
    values = _pairs(correlations)

    ax = _axes(ax)
    places = np.arange(len(groups))
    for column, (name, colour, marker) in enumerate((("before", _BEFORE, "s"), ("after", _AFTER, "o"))):
        mean, low, high = (reduce(values[:, :, column], axis=0) for reduce in (np.mean, np.min, np.max))
        spread = None if len(correlations) == 1 else (mean - low, high - mean)
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.4, "capsize": 3}
        ax.errorbar(places, mean, yerr=spread, label=f"{name} alignment", **style)
    _name_groups(ax, names)
    ax.set_xlabel("group of units")
    ax.set_ylabel("mean correlation of paired units")
    ax.set_ylim(min(0.0, values.min()) - 0.05, 1.02)
    ax.axhline(0, color="black", linewidth=0.6)
    return _finished(ax, legend=True)


def eigen_angles(rotation: Rotation, *, labels: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw by how much a relabelling turns the units of each group: the angles of its matrices, in rising order.

    Where a line lies at 0, directions stay; at 180 degrees they are turned round. The dashed line is that of matrices
    drawn at random.

    Args:
        rotation: The ``permutation`` of an alignment whose groups rotate, or any `modeconn.Orthogonal`.
        labels: Other names for the groups, in their order.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If nothing rotates, or a label is missing.
    """
    _check("rotation", rotation, "a modeconn.Orthogonal, as align finds it with symmetries='orthogonal'", "angles")
    angles = rotation.angles()
    if not angles:
        raise ValueError("no group of this relabelling rotates its units, so there are no angles to draw.")
    names = _labels(labels, list(angles), "group") if labels is not None else list(angles)
    ax = _axes(ax)
    ax.plot([0, 100], [0, 180], "--", color=_BEFORE, linewidth=1.2, label="drawn at random")
    for number, (name, found) in enumerate(zip(names, angles.values(), strict=True)):
        degrees = np.sort(np.degrees(found.numpy()).ravel())
        share = 100 * (np.arange(len(degrees)) + 0.5) / len(degrees)
        colour, dashes = _style(number)
        ax.plot(share, degrees, dashes, color=colour, linewidth=1.6, label=name)
    ax.set_xlabel("share of directions (%)")
    ax.set_ylabel("turned by at most (degrees)")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 180)
    ax.set_yticks(range(0, 181, 45))
    return _finished(ax, legend=True)


def history(*fits: Fit | History, labels: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the training loss of each epoch of one or several fits, and its range over ten bins of t.

    Args:
        fits: What `modeconn.fit_curve` returned, or the ``history`` of it, one line each.
        labels: A name for each, for the legend.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no fit, a label is missing, or nothing was learned in one.
    """
    names = _labels(labels, fits, "fit")
    histories = [getattr(fit, "history", fit) for fit in fits]
    for number, kept in enumerate(histories):
        if kept is not None:
            _check(f"fit {number}", kept, "what modeconn.fit_curve returns, or its history", "loss", "loss_by_t")
        if kept is None or not kept.loss:
            raise ValueError(f"fit {number} has no history: no curve was learned.")
    ax = _axes(ax)
    for number, (kept, name) in enumerate(zip(histories, names, strict=True)):
        colour, dashes = _style(number)
        epochs = np.arange(1, len(kept.loss) + 1)
        by_t = np.array(kept.loss_by_t, dtype=float)  # a bin without a batch is NaN
        low, high = np.nanmin(by_t, axis=1), np.nanmax(by_t, axis=1)
        range_name = "range over t" if number == 0 else None
        ax.plot(epochs, kept.loss, dashes, color=colour, linewidth=1.8, label=name or "mean over t")
        ax.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0, label=range_name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss (mean per example)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _finished(ax, legend=True)


def comparison(compared: Comparison, *, column: str = "line", ax: Axes | None = None) -> Axes:
    """Draw what each method of a comparison made of every pair: a dot for a pair, a bar for the mean.

    Args:
        compared: What `modeconn.compare` returned.
        column: What to draw, one of ``compared.columns``; accuracies are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no such column.
    """
    _check("compared", compared, "what modeconn.compare returns", "values", "columns")
    if column not in compared.columns:
        raise ValueError(f"there is no column {column!r}; there are {', '.join(compared.columns)}.")
    is_share = column.endswith("accuracy")
    ax = _axes(ax)
    for place, cells in enumerate(compared.values.values()):
        values = np.array(cells[column]) * (100 if is_share else 1)
        beside = place + np.linspace(-0.25, 0.25, len(values))
        ax.plot(beside, values, ".", color=_style(place)[0], markersize=4, alpha=0.6)
        ax.hlines(values.mean(), place - 0.35, place + 0.35, color="black", linewidth=1.8)
    _name_groups(ax, list(compared.values))
    ax.set_ylabel(_quantity(column))
    return _finished(ax, legend=False)


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
    _check("result", result, "what modeconn.plane returns", "scattered", "networks", "quantity")
    name = next(iter(result.values)) if quantity is None else quantity
    if name not in result.values:
        raise ValueError(f"the plane has no quantity {name!r}, only {', '.join(map(repr, result.values))}.")
    ax = _axes(ax)
    points, values = (tensor.numpy() for tensor in result.scattered(name))
    unit = result.quantity(name).unit
    scale = _Scale.of((100 if unit == "%" else 1) * values, result.limit if name == "loss" else None)
    ends = {"levels": scale.levels, "extend": "max" if scale.ends_below else "neither"}
    drawn = ax.tricontourf(*points.T, scale.heights, cmap="viridis", **ends)
    ax.tricontour(*points.T, scale.heights, levels=scale.levels, colors="white", linewidths=0.4, alpha=0.6)
    if result.curve is not None:
        ax.plot(*result.curve.numpy().T, color="white", linewidth=3.2)
        ax.plot(*result.curve.numpy().T, color="black", linewidth=1.4)
    for label, place in result.networks.items():
        _mark(ax, label, place.tolist(), points)
    ax.set_aspect("equal")
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
    ax.plot(*place, "o", color="white", markeredgecolor="black", markersize=6, zorder=4)
    is_right = place[0] > points[:, 0].mean()
    ax.annotate(
        label, place, xytext=(-7 if is_right else 7, 5), textcoords="offset points", ha="right" if is_right else "left",
        fontsize="small", color="black", zorder=5,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
    )  # fmt: skip


def _pairs(correlations: Sequence[Correlation]) -> np.ndarray[Any, Any]:
    """Return correlations as an array ``(alignments, groups, 2)``."""
    try:
        values = np.array([list(map(list, one.values())) for one in correlations], dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 3 or values.shape[2] != 2:
        raise ValueError(f"a correlation must hold (before, after) by group, two numbers, got {correlations[0]!r:.80}.")
    return values


def _quantity(column: str) -> str:
    """Name a column of a comparison, with its unit."""
    if column in ("seconds", "peak bytes"):
        return f"{column} of matching"
    if column == "curve seconds":
        return "seconds of the fit"
    if column.endswith("length"):
        return f"length in weight space, {column.partition(' ')[0] if ' ' in column else 'line'}"
    if column == "tempered":
        return "barrier of the loss, line, best temperatures"
    connection, _, accuracy = column.partition(" ")
    return f"accuracy lost, {connection} (%)" if accuracy else f"barrier of the loss, {connection}"


def _style(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]


def _name_groups(ax: Axes, names: Sequence[str | None]) -> None:
    """Write a name under each place: upright where they are few, on end where they are many."""
    few, many = len(names) <= _FEW_GROUPS, len(names) > _MANY_GROUPS
    angle, side = (0, "center") if few else (90, "center") if many else (30, "right")
    ax.set_xticks(np.arange(len(names)), names, rotation=angle, ha=side)
    ax.tick_params(axis="x", labelsize=7 if many else 9)
    ax.set_xlim(-0.5, len(names) - 0.5)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        _check("ax", ax, "an Axes of matplotlib", "plot", "set_xlabel")
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")[1]


def _finished(ax: Axes, *, legend: bool) -> Axes:
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize="small")
    return ax


def _labels(labels: Sequence[str] | None, things: Sequence[object], what: str) -> Sequence[str | None]:
    if not things:
        raise ValueError(f"there is no {what} to draw.")
    if labels is None:
        return [None] * len(things)
    if not _is_list(labels) or len(labels) != len(things):
        raise ValueError(f"labels must name each {what}: {len(things)} to draw, got labels={labels!r:.80}.")
    return labels


def _is_list(value: object) -> bool:
    has_items = hasattr(value, "__len__") and hasattr(value, "__iter__") and getattr(value, "ndim", 1) != 0
    return has_items and not isinstance(value, (str, bytes))


def _check(name: str, value: object, what: str, *parts: str) -> None:
    """Raise a ValueError unless a value is an object with all parts that are drawn of it."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        raise ValueError(f"{name} must be {what}, got {value!r:.80}.")
