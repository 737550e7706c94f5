"""Draw results with matplotlib: each function takes an ``ax``, draws what it is given, and returns the ``ax``.

Nothing is computed here but means and spreads, and no global setting of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


class Profile(Protocol):
    """What `profile` draws: values along a curve, tensors on the CPU, as `modeconn.Profile` has them."""

    t: Tensor
    loss: Tensor
    accuracy: Tensor | None
    error: Tensor | None
    own_loss: Tensor | None
    own_accuracy: Tensor | None


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


class History(Protocol):
    """What `history` draws: the loss of each epoch, and its means in bins of t."""

    loss: Sequence[float]
    loss_by_t: Sequence[Sequence[float | None]]


class Fit(Protocol):
    """Something learned, with its history if there is one."""

    history: History | None


class Comparison(Protocol):
    """What `comparison` draws: by row and column one value for each pair."""

    values: Mapping[str, Mapping[str, Sequence[float]]]
    columns: Sequence[str]


Correlation = Mapping[str, tuple[float, float]]
"""Mean correlation ``(before, after)`` by group."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # told apart by all eyes
_BEFORE, _AFTER = "#8C8C8C", _COLOURS[0]
_PERCENT = {"accuracy", "error"}
_DASHES = ("-", "--", "-.", ":")  # told apart in grey print as well
_FEW_GROUPS, _MANY_GROUPS = 6, 12


def profile(
    *profiles: Profile,
    labels: Sequence[str] | None = None,
    quantity: Literal["loss", "accuracy", "error"] = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw loss, accuracy or error along one or several curves.

    Dots mark the ends, recalibrated like all points between them. Where the ends' own statistics give another value,
    a ring marks it.

    Args:
        profiles: What `Connection.evaluate` returned, one line each.
        labels: A name for each, for the legend.
        quantity: What to draw; accuracy and error are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, a label is missing, the quantity is unknown, or a profile has no accuracy.
    """
    _check_quantity(quantity)
    names = _labels(labels, profiles, "profile")
    for number, one in enumerate(profiles):
        if getattr(one, quantity) is None:
            raise ValueError(f"profile {number} has no {quantity}; its targets are no classes. Draw its loss.")
    ax = _axes(ax)
    for number, (one, name) in enumerate(zip(profiles, names, strict=True)):
        colour, dashes = _style(number)
        t, values = one.t.numpy(), _scaled(getattr(one, quantity).numpy(), quantity)
        ax.plot(t, values, dashes, color=colour, linewidth=1.8, label=name)
        ax.plot(t[[0, -1]], values[[0, -1]], "o", color=colour, markersize=5, clip_on=False, zorder=3)
        own = _own_ends(one, quantity)
        if own is not None and not np.allclose(own, values[[0, -1]]):
            ax.plot(t[[0, -1]], own, "o", color=colour, markersize=8, fillstyle="none", clip_on=False, zorder=3)
    ax.set_xlabel("position on the curve, t (0: network a, 1: network b)")
    ax.set_ylabel(f"{quantity} (%)" if quantity in _PERCENT else "loss (mean per example)")
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
    _check_quantity(quantity)
    chosen = list(profile.accuracy)[: None if len(profile.attacks) > 1 else -1] if rows is None else rows
    for row in chosen:
        if row not in profile.accuracy:
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
    beside = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": min(3, len(ax.lines))}  # bands fill the axes
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
    correlations = [one if isinstance(one, Mapping) else one.correlation for one in alignments]
    if not correlations or not correlations[0]:
        raise ValueError("there is no correlation to draw: pass alignments that were given data (loader=).")
    groups = list(correlations[0])
    if any(list(one) != groups for one in correlations):
        raise ValueError("these alignments are of different architectures: their groups differ.")
    names = _labels(labels, groups, "group") if labels is not None else groups
    values = np.array([[one[group] for group in groups] for one in correlations])  # (alignments, groups, 2)

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
    if None in histories:
        raise ValueError(f"fit {histories.index(None)} has no history: no curve was learned.")
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


def _check_quantity(quantity: str) -> None:
    if quantity not in ("loss", *_PERCENT):
        raise ValueError(f"quantity must be 'loss', 'accuracy' or 'error', got quantity={quantity!r}.")


def _quantity(column: str) -> str:
    """Name a column of a comparison, with its unit."""
    if column in ("seconds", "peak bytes"):
        return f"{column} of matching"
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
    if isinstance(labels, str) or len(labels) != len(things):
        raise ValueError(f"labels must name each {what}: {len(things)} to draw, got labels={labels!r}.")
    return labels


def _scaled(values: np.ndarray, quantity: str) -> np.ndarray:
    return 100 * values if quantity in _PERCENT else values


def _own_ends(one: Profile, quantity: str) -> np.ndarray | None:
    """Return the values of both ends with the statistics they came with, or None if they were not measured."""
    own = one.own_loss if quantity == "loss" else one.own_accuracy
    if own is None:
        return None
    return _scaled((1 - own if quantity == "error" else own).numpy(), quantity)
