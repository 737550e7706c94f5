"""What lies along curves, as lines over t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeconn.plot import style
from modeconn.plot.drawn import AlongCurve, RobustProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Z = 1.96  # of 95%


def profile(
    *profiles: AlongCurve | Sequence[AlongCurve],
    labels: Sequence[str] | None = None,
    quantity: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Draw one quantity along one or several curves.

    Dots mark the ends, recalibrated like all points between them. Where the ends' own statistics give another value,
    a ring marks it. Around accuracies and errors lie their 95% intervals (Wilson), as far as the number of examples
    tells them; of several profiles in a list the mean is drawn, and one standard deviation to both sides.

    Args:
        profiles: What `Connection.evaluate` or `Connection.curvature` returned, one line each; or lists of such, as of
            several seeds, measured at the same positions.
        labels: A name for each, for the legend.
        quantity: What to draw: "loss", "accuracy", "error" or the name of a metric; fractions of right or wrong answers
            are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, a label is missing, a profile does not have the quantity, profiles of one
            list have other positions, or their quantities are written in other units.
    """
    names = style.named(labels, profiles, "profile")
    groups = [_members(one, number, quantity) for number, one in enumerate(profiles)]
    units = {one.quantity(quantity).unit for group in groups for one in group}
    if len(units) > 1:
        told = " and in ".join(repr(unit) if unit else "no unit" for unit in sorted(units))
        raise ValueError(f"one figure has one unit, but {quantity!r} is in {told}.")
    unit = units.pop()
    scale = 100 if unit == "%" else 1
    ax = style.axes(ax)
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        look, t = style.line(number), group[0].t.numpy()
        values = scale * np.stack([one.values[quantity].numpy() for one in group])
        mean = values.mean(0)
        ax.plot(t, mean, label=name, **look)
        ax.plot(t[[0, -1]], mean[[0, -1]], "o", color=look["color"], markersize=5, clip_on=False, zorder=3)
        if len(group) > 1:
            spread = values.std(0, ddof=1)
            style.band(ax, t, mean - spread, mean + spread, look["color"])
            continue
        (one,) = group
        if quantity in style.PERCENT and getattr(one, "num_examples", 0):
            style.band(ax, t, *(100 * bound for bound in _interval(mean / 100, one.num_examples)), look["color"])
        if quantity in one.own:
            own = scale * one.own[quantity].numpy()
            if not np.allclose(own, mean[[0, -1]]):
                ring = {"markersize": 8, "fillstyle": "none", "clip_on": False, "zorder": 3}
                ax.plot(t[[0, -1]], own, "o", color=look["color"], **ring)
    ax.set_xlabel(style.POSITION)
    ax.set_ylabel(f"{quantity} ({unit})" if unit else quantity)
    ax.set_xlim(0, 1)
    return style.finished(ax, legend=labels is not None)


def robust_profile(
    *profiles: RobustProfile,
    labels: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    quantity: Literal["loss", "accuracy", "error"] = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Draw what attacks leave along one or several curves, a line for each row; with 95% intervals of accuracies.

    Of several curves, each has a colour, and each row its dashes.

    Args:
        profiles: What `Connection.robustness` returned.
        labels: A name for each, for the legend; needed for several.
        rows: Which to draw; default all that each has, the worst case only if there are several attacks.
        quantity: What to draw; accuracy and error are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, no such row or quantity, or a label is missing.
    """
    for number, one in enumerate(profiles):
        name = "profile" if len(profiles) == 1 else f"profile {number}"
        style.check(name, one, "what Connection.robustness returns", "t", "loss", "accuracy", "interval", "attacks")
    names = style.named(labels, profiles, "profile")
    if len(profiles) > 1 and labels is None:
        raise ValueError(f"labels must name each profile: {len(profiles)} to draw, got labels=None.")
    if quantity not in ("loss", *style.PERCENT):
        raise ValueError(f"quantity must be 'loss', 'accuracy' or 'error', got quantity={quantity!r}.")
    if rows is not None and not style.is_list(rows):
        raise ValueError(f"rows must be a list of names, got rows={rows!r:.80}.")
    chosen = [_rows(one, rows) for one in profiles]
    places = list(dict.fromkeys(row for some in chosen for row in some))
    ax = style.axes(ax)
    for number, (one, name, some) in enumerate(zip(profiles, names, chosen, strict=True)):
        t = one.t.numpy()
        for row in some:
            look = style.line(number if len(profiles) > 1 else places.index(row))
            look |= {"linestyle": style.dashes(places.index(row)), "label": row}
            if name is not None:  # the axis names what all lines share
                look["label"] = name if len(places) == 1 else f"{name}, {row}"
            if quantity == "loss":
                ax.plot(t, one.loss[row].numpy(), marker=".", **look)
                continue
            values, bounds = one.accuracy[row].numpy(), one.interval[row].numpy().T
            if quantity == "error":
                values, bounds = 1 - values, 1 - bounds
            ax.plot(t, 100 * values, marker=".", **look)
            style.band(ax, t, *(100 * bounds), look["color"])
    ax.set_xlabel(style.POSITION)
    shown = f", {places[0]}" if len(places) == 1 and names[0] is not None else ""
    unit = "%" if quantity in style.PERCENT else "mean per example"
    ax.set_ylabel(f"{quantity}{shown} ({unit})")
    return style.finished(ax, legend=True)


def _rows(one: RobustProfile, rows: Sequence[str] | None) -> Sequence[str]:
    chosen = list(one.accuracy)[: None if len(one.attacks) > 1 else -1] if rows is None else rows
    for row in chosen:
        if not isinstance(row, str) or row not in one.accuracy:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(one.accuracy)}.")
    return chosen


def _members(given: Any, number: int, quantity: Any) -> list[AlongCurve]:
    """Return the profiles of one line, all with the quantity and the same positions."""
    members = list(given) if style.is_list(given) and not hasattr(given, "values") else [given]
    if not members:
        raise ValueError(f"profile {number} is an empty list: there is nothing to draw.")
    for one in members:
        style.check(f"profile {number}", one, "what Connection.evaluate returns", "t", "values", "own", "quantity")
        if not isinstance(quantity, str) or quantity not in one.values:
            raise ValueError(f"profile {number} has no quantity {quantity!r}, only {', '.join(map(repr, one.values))}.")
        if one.t.tolist() != members[0].t.tolist():
            raise ValueError(f"the profiles of list {number} were measured at different positions: no mean is drawn.")
    return members


def _interval(share: Any, count: int) -> tuple[Any, Any]:
    """Return the 95% interval of shares of so many examples, by Wilson."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return middle - half, middle + half
