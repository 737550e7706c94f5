"""How curves were learned, and how methods compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.plot import style
from modeconn.plot.drawn import Comparison, Fit, History, Turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Points = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Epochs ``(E,)``, the first is 1, and values ``(E,)``."""


def history(
    *fits: Fit | History, labels: Sequence[str] | None = None, quantity: str = "loss", ax: Axes | None = None
) -> Axes:
    """Draw the training loss of each epoch of one or several fits, or what callbacks measured in them.

    The training loss has its range over ten bins of t. Of what a `callbacks.Validation` measured at several positions,
    each has a line; of several fits each has a colour, and each position its dashes. The axis of a loss is logarithmic,
    unless one is 0 or less.

    Args:
        fits: What `modeconn.fit_curve` returned, or the ``history`` of it, one line each.
        labels: A name for each, for the legend; needed for several, unless the training loss is drawn.
        quantity: "loss" for the training loss; or a name in ``history.values``, such as "validation accuracy, t=0.5",
            or what it begins with, "validation accuracy", or "accuracy" alone, for those at all positions. Accuracies
            are drawn in percent.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no fit, a label is missing, nothing was learned in one, or the quantity was not
            measured.
    """
    names = style.named(labels, fits, "fit")
    histories = [_history_of(fit, number) for number, fit in enumerate(fits)]
    if quantity == "loss":
        ax = style.axes(ax)
        is_log = _draw_training_loss(ax, histories, names)
        ax.set_ylabel("training loss (mean per example)")
    else:
        found = [_measured(kept, number, quantity) for number, kept in enumerate(histories)]
        if len(fits) > 1 and labels is None:
            raise ValueError(f"labels must name each fit: {len(fits)} to draw, got labels=None.")
        ax = style.axes(ax)
        is_log = _draw_measured(ax, found, names, quantity)
    if is_log:
        ax.set_yscale("log")
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return style.finished(ax, legend=True)


def _draw_training_loss(ax: Axes, histories: Sequence[History], names: Sequence[str | None]) -> bool:
    """Draw the loss of each epoch and its range over t; return whether its logarithm can be drawn."""
    lowest = np.inf
    for number, (kept, name) in enumerate(zip(histories, names, strict=True)):
        look = style.line(number)
        epochs = np.arange(1, len(kept.loss) + 1)
        ax.plot(epochs, kept.loss, label=name or "mean over t", **look)
        lowest = min(lowest, float(np.nanmin(kept.loss)))
        if not kept.loss_by_t:  # a descent on all data at once, whose steps have no t
            continue
        by_t = np.array(kept.loss_by_t, dtype=float)  # a bin without a batch is NaN
        low, high = np.nanmin(by_t, axis=1), np.nanmax(by_t, axis=1)
        style.band(ax, epochs, low, high, look["color"], label="range over t" if number == 0 else None)
        lowest = min(lowest, float(np.nanmin(low)))
    return lowest > 0


def _draw_measured(
    ax: Axes, found: Sequence[Mapping[str, _Points]], names: Sequence[str | None], quantity: str
) -> bool:
    """Draw values by epoch, a line for each name; return whether they are a loss whose logarithm can be drawn."""
    every = list(dict.fromkeys(name for points in found for name in points))
    wholes, kinds, positions = (list(parts) for parts in zip(*map(_parts, every), strict=True))
    is_one = len(set(wholes)) == 1  # then the axis names it, and the legend the positions alone
    rows = [position or wholes[0] for position in positions] if is_one else every
    is_percent, is_loss = set(kinds) <= style.PERCENT, set(kinds) == {"loss"}
    drawn: list[float] = []
    for number, (points, name) in enumerate(zip(found, names, strict=True)):
        for own, (epochs, values) in points.items():
            look = style.line_of(rows[every.index(own)], rows, name, number if len(found) > 1 else None)
            ax.plot(epochs, (100 if is_percent else 1) * values, marker=".", **look)
            drawn += values[np.isfinite(values)].tolist()
    shared = every[0] if len(every) == 1 else wholes[0] if is_one else quantity
    ax.set_ylabel(shared + (" (%)" if is_percent else " (mean per example)" if is_loss else ""))
    return is_loss and min(drawn, default=0) > 0


def history_by_t(fit: Fit | History, *, ax: Axes | None = None) -> Axes:
    """Draw the training loss of a fit over epochs and ten bins of t, as a map with logarithmic colours.

    Args:
        fit: What `modeconn.fit_curve` returned, or the ``history`` of it.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If nothing was learned, or at all positions at once.
    """
    from matplotlib.colors import LogNorm

    kept = _history_of(fit, 0)
    if not kept.loss_by_t:
        raise ValueError("this fit has no losses by t: it descended on all positions at once, as PAM(exact=True) does.")
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


def comparison(
    compared: Comparison, *, column: str | None = None, rows: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what each method of a comparison made of every pair: a bar from 0 to the mean, and a dot for a pair.

    Seconds, lengths and bytes, which differ by orders of magnitude, are drawn on a logarithmic axis, where bars have no
    beginning: a line marks their mean.

    Args:
        compared: What `modeconn.compare` returned.
        column: What to draw, one of ``compared.columns``; accuracies are drawn in percent. Default:
            ``compared.headline``, "repaired" for networks with batch norm, "line" for others.
        rows: Which methods to draw, in which order; default all.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If there is no such column, or no such row.
    """
    style.check("compared", compared, "what modeconn.compare returns", "values", "columns")
    column = getattr(compared, "headline", "line") if column is None else column
    if column not in compared.columns:
        raise ValueError(f"there is no column {column!r}; there are {', '.join(compared.columns)}.")
    rows = style.chosen(rows, list(compared.values))
    every = [np.array(compared.values[row][column], dtype=float) for row in rows]
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
    style.name_places(ax, rows)
    ax.set_ylabel(_quantity(column))
    return style.finished(ax, legend=False)


def _history_of(fit: Fit | History, number: int) -> History:
    kept = getattr(fit, "history", fit)
    if kept is not None:
        style.check(
            f"fit {number}", kept, "what modeconn.fit_curve returns, or its history", "loss", "loss_by_t", "values"
        )
    if kept is None or not kept.loss:
        raise ValueError(f"fit {number} has no history: no curve was learned.")
    return kept


def _measured(kept: History, number: int, quantity: Any) -> dict[str, _Points]:
    """Return the epochs in which each value of a quantity was measured, and the values, by name."""
    there = list(dict.fromkeys(name for values in kept.values for name in values))
    if not there:
        raise ValueError(
            f"fit {number} has no {quantity!r} by epoch: nothing was measured but the training loss, quantity='loss'. "
            f"Pass fit_curve(..., callbacks=[callbacks.Validation(loader)])."
        )
    chosen = [quantity] if quantity in there else [name for name in there if quantity in _parts(name)[:2]]
    if not chosen:
        raise ValueError(f"fit {number} has no {quantity!r} by epoch, only 'loss', {', '.join(map(repr, there))}.")
    found = {}
    for name in chosen:
        points = [(epoch, values[name]) for epoch, values in enumerate(kept.values, 1) if name in values]
        found[name] = (np.array([epoch for epoch, _ in points]), np.array([value for _, value in points], dtype=float))
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """Split "validation accuracy, t=0.5" into itself without the position, "accuracy", and "t=0.5"."""
    whole, _, position = name.partition(", t=")
    return whole, whole.removeprefix("validation "), f"t={position}" if position else ""


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
