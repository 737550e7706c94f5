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
    spread: Literal["std", "sem"] = "std",
    ax: Axes | None = None,
) -> Axes:
    """Draw one quantity along one or several curves.

    Dots mark the ends, recalibrated like all points between them. Where the ends' own statistics give another value,
    a ring marks it. Around accuracies and errors lie their 95% intervals (Wilson), as far as the number of examples
    tells them; of several profiles in a list the mean is drawn, and one standard deviation, or one standard error of
    the mean, to both sides.

    Args:
        profiles: What `Connection.evaluate` or `Connection.curvature` returned, one line each; or lists of such, as of
            several seeds, measured at the same positions.
        labels: A name for each, for the legend.
        quantity: What to draw: "loss", "accuracy", "error" or the name of a metric; fractions of right or wrong answers
            are drawn in percent.
        spread: What is drawn beside the mean of a list: "std", the standard deviation, or "sem", the standard error.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, a label is missing, a profile does not have the quantity, profiles of one
            list have other positions, their quantities are written in other units, or there is no such spread.
    """
    names = style.named(labels, profiles, "profile")
    groups = [_members(one, number, quantity) for number, one in enumerate(profiles)]
    unit = style.unit_of([one for group in groups for one in group], quantity)
    scale = 100 if unit == "%" else 1
    every = [scale * np.stack([one.values[quantity].numpy() for one in group]) for group in groups]
    style.check_spread(spread)
    ax = style.axes(ax)
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        look, t, mean = style.line(number), group[0].t.numpy(), every[number].mean(0)
        ax.plot(t, mean, label=name, **look)
        ax.plot(t[[0, -1]], mean[[0, -1]], "o", color=look["color"], markersize=5, clip_on=False, zorder=3)
        if len(group) > 1:
            beside = style.spread(every[number], spread)
            style.band(ax, t, mean - beside, mean + beside, look["color"])
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
    # The worst case of one attack is that attack.
    shown = [list(one.accuracy)[: None if rows is not None or len(one.attacks) > 1 else -1] for one in profiles]
    chosen = [style.chosen(rows, there) for there in shown]
    places = list(dict.fromkeys(row for some in chosen for row in some))
    ax = style.axes(ax)
    for number, (one, name, some) in enumerate(zip(profiles, names, chosen, strict=True)):
        t = one.t.numpy()
        for row in some:
            look = style.line_of(row, places, name, number if len(profiles) > 1 else None)
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


def spectrum(
    *profiles: AlongCurve, labels: Sequence[str] | None = None, quantity: str = "loss", ax: Axes | None = None
) -> Axes:
    r"""Draw of which waves a quantity along one or several curves is made: the magnitude of its Fourier transform.

    .. math:: |\hat v_k| = \frac{1}{N} \left| \sum_{n=0}^{N-1} (v_n - \bar v) \, e^{-2 \pi i k n / N} \right|

    for k from 1 to N / 2, from values at N evenly spaced positions, less their mean, in the unit of the quantity: a
    wave of amplitude A has a magnitude of A / 2. Positions hold both ends of the curve, t=0 and t=1, which are two
    networks and no repetition of one: so, by the conventions of `numpy.fft.rfft` and ``rfftfreq``, all N points are one
    period, a step longer than the curve, and frequencies are k (N - 1) / N cycles per unit of t. Ends that differ are
    a jump where the period begins anew, which adds a little at all frequencies. The axis of magnitudes is logarithmic,
    unless one is 0.

    Args:
        profiles: What `Connection.evaluate`, `Connection.robustness` or `Connection.curvature` returned, one line each,
            measured at evenly spaced positions, at least 3.
        labels: A name for each, for the legend.
        quantity: What to draw: "loss", "accuracy", "error" or the name of a metric; fractions of right or wrong answers
            are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no profile, a label is missing, a profile does not have the quantity, or not at evenly
            spaced positions, or not everywhere a finite one, or their quantities are written in other units.
    """
    names = style.named(labels, profiles, "profile")
    for number, one in enumerate(profiles):
        _check_has(one, number, quantity)
        steps = np.diff(one.t.numpy())
        if len(steps) < 2 or not np.allclose(steps, steps.mean(), rtol=1e-3, atol=0):
            raise ValueError(
                f"a spectrum is that of values at three evenly spaced positions or more, but profile {number} was "
                f"measured at t={one.t.tolist()!r:.80}. Measure it with num_points=, without t=."
            )
        if not np.isfinite(one.values[quantity].numpy()).all():
            raise ValueError(
                f"the {quantity!r} of profile {number} is NaN or infinite at some positions, so it has no spectrum. "
                f"Draw a quantity that is finite along the whole curve."
            )
    unit = style.unit_of(profiles, quantity)
    ax, lowest = style.axes(ax), np.inf
    for number, (one, name) in enumerate(zip(profiles, names, strict=True)):
        t, values = one.t.numpy(), (100 if unit == "%" else 1) * one.values[quantity].numpy()
        heights = np.abs(np.fft.rfft(values - values.mean(), norm="forward"))[1:]
        frequencies = np.fft.rfftfreq(len(t), (t[-1] - t[0]) / (len(t) - 1))[1:]
        ax.plot(frequencies, heights, marker=".", label=name, **style.line(number))
        lowest = min(lowest, heights.min())
    if lowest > 0:
        ax.set_yscale("log")
    ax.set_xlabel("frequency (cycles per unit of t)")
    ax.set_ylabel(f"magnitude in the spectrum of the {quantity}" + (f"\n({unit})" if unit else ""))
    ax.set_xlim(left=0)
    return style.finished(ax, legend=labels is not None)


def _members(given: Any, number: int, quantity: Any) -> list[AlongCurve]:
    """Return the profiles of one line, all with the quantity and the same positions."""
    members = list(given) if style.is_list(given) and not hasattr(given, "values") else [given]
    if not members:
        raise ValueError(f"profile {number} is an empty list: there is nothing to draw.")
    for one in members:
        _check_has(one, number, quantity)
        if one.t.tolist() != members[0].t.tolist():
            raise ValueError(f"the profiles of list {number} were measured at different positions: no mean is drawn.")
    return members


def _check_has(one: Any, number: int, quantity: Any) -> None:
    """Raise unless something is a result along a curve that has the quantity."""
    style.check(f"profile {number}", one, "what Connection.evaluate returns", "t", "values", "own", "quantity")
    if not isinstance(quantity, str) or quantity not in one.values:
        raise ValueError(f"profile {number} has no quantity {quantity!r}, only {', '.join(map(repr, one.values))}.")


def _interval(share: Any, count: int) -> tuple[Any, Any]:
    """Return the 95% interval of shares of so many examples, by Wilson."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return middle - half, middle + half
