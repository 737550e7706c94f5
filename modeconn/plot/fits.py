"""How curves were learned, and how methods compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modeconn.plot import style
from modeconn.plot.drawn import Comparison, Fit, History, Turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def history(*fits: Fit | History, labels: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the training loss of each epoch of one or several fits, and its range over ten bins of t.

    The axis of the loss is logarithmic, unless a loss is 0 or less.

    Args:
        fits: What `modeconn.fit_curve` returned, or the ``history`` of it, one line each.
        labels: A name for each, for the legend.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no fit, a label is missing, or nothing was learned in one.
    """
    names = style.named(labels, fits, "fit")
    histories = [_history_of(fit, number) for number, fit in enumerate(fits)]
    ax = style.axes(ax)
    lowest = np.inf
    for number, (kept, name) in enumerate(zip(histories, names, strict=True)):
        look = style.line(number)
        epochs = np.arange(1, len(kept.loss) + 1)
        by_t = np.array(kept.loss_by_t, dtype=float)  # a bin without a batch is NaN
        low, high = np.nanmin(by_t, axis=1), np.nanmax(by_t, axis=1)
        ax.plot(epochs, kept.loss, label=name or "mean over t", **look)
        style.band(ax, epochs, low, high, look["color"], label="range over t" if number == 0 else None)
        lowest = min(lowest, float(np.nanmin(low)))
    if lowest > 0:
        ax.set_yscale("log")
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss (mean per example)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return style.finished(ax, legend=True)


def history_by_t(fit: Fit | History, *, ax: Axes | None = None) -> Axes:
    """Draw the training loss of a fit over epochs and ten bins of t, as a map with logarithmic colours.

    Args:
        fit: What `modeconn.fit_curve` returned, or the ``history`` of it.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If nothing was learned.
    """
    from matplotlib.colors import LogNorm

    kept = _history_of(fit, 0)
    by_t = np.array(kept.loss_by_t, dtype=float)
    ax = style.axes(ax)
    edges = np.arange(len(by_t) + 1) + 0.5, np.linspace(0, 1, by_t.shape[1] + 1)
    norm = LogNorm() if np.nanmin(by_t) > 0 else None
    drawn = ax.pcolormesh(*edges, by_t.T, cmap="viridis", norm=norm)
    ax.figure.colorbar(drawn, ax=ax, label="training loss (mean per example)")
    ax.set_xlabel("epoch")
    ax.set_ylabel("position on the curve, t")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def turns(fit: Fit | Turns, *, ax: Axes | None = None) -> Axes:
    """Draw what each turn of a refinement, such as `modeconn.PAM`, made of the loss on its sample.

    Args:
        fit: What `modeconn.fit_curve(refine=...)` returned, or the ``history`` of it.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If nothing was refined.
    """
    kept = getattr(fit, "history", fit)
    if not getattr(kept, "turns", None):
        raise ValueError("this fit has no turns: pass one that was refined, such as fit_curve(..., refine=PAM()).")
    ax = style.axes(ax)
    number = np.arange(1, len(kept.turns) + 1)
    before, after = (np.array([turn[f"loss_{when}"] for turn in kept.turns]) for when in ("before", "after"))
    ax.vlines(number, after, before, color=style.NEUTRAL, linewidth=0.8)
    ax.plot(number, before, "s", color=style.NEUTRAL, label="before")
    ax.plot(number, after, "o", color=style.COLOURS[0], label="after")
    if min(before.min(), after.min()) > 0:
        ax.set_yscale("log")
    ax.set_xlabel("turn of the refinement")
    ax.set_ylabel("loss on its sample (mean per example)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return style.finished(ax, legend=True)


def comparison(compared: Comparison, *, column: str = "line", ax: Axes | None = None) -> Axes:
    """Draw what each method of a comparison made of every pair: a bar from 0 to the mean, and a dot for a pair.

    Seconds, lengths and bytes, which differ by orders of magnitude, are drawn on a logarithmic axis, where bars have no
    beginning: a line marks their mean.

    Args:
        compared: What `modeconn.compare` returned.
        column: What to draw, one of ``compared.columns``; accuracies are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no such column.
    """
    style.check("compared", compared, "what modeconn.compare returns", "values", "columns")
    if column not in compared.columns:
        raise ValueError(f"there is no column {column!r}; there are {', '.join(compared.columns)}.")
    every = [np.array(cells[column], dtype=float) for cells in compared.values.values()]
    is_log = any(word in column for word in ("seconds", "bytes")) and min(map(np.nanmin, every)) > 0
    ax = style.axes(ax)
    for place, values in enumerate(every):
        values = values * (100 if column.endswith("accuracy lost") else 1)
        colour = style.COLOURS[place % len(style.COLOURS)]
        beside = place + (np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(1))
        if is_log:
            ax.hlines(values.mean(), place - 0.35, place + 0.35, color=colour, linewidth=2.2)
        else:
            ax.bar(place, values.mean(), 0.7, color=colour, alpha=0.45)
        ax.plot(beside, values, "o", color=colour, markersize=4, markeredgecolor=style.NEUTRAL, markeredgewidth=0.4)
    if is_log:
        ax.set_yscale("log")
    else:
        ax.axhline(0, color=style.NEUTRAL, linewidth=0.8)
    style.name_places(ax, list(compared.values))
    ax.set_ylabel(_quantity(column))
    return style.finished(ax, legend=False)


def _history_of(fit: Fit | History, number: int) -> History:
    kept = getattr(fit, "history", fit)
    if kept is not None:
        style.check(f"fit {number}", kept, "what modeconn.fit_curve returns, or its history", "loss", "loss_by_t")
    if kept is None or not kept.loss:
        raise ValueError(f"fit {number} has no history: no curve was learned.")
    return kept


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
