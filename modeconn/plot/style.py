"""How all figures look: colours and dashes that anyone tells apart, on white and on dark; nothing hides anything.

No global setting of matplotlib is touched. Text, ticks and spines have the colours of the figure's own style; all
else has a colour from here, which is seen on white and on black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2A7FBF", "#D55E00", "#009E73", "#B8488F", "#C99700", "#56B4E9", "#8C8C8C")
"""Colours that colour-blind readers tell apart; each has a contrast of 2.5 or more with white and with black."""

NEUTRAL = "#8C8C8C"
"""What is there for comparison: zero lines, chance, what was before."""

PERCENT = {"accuracy", "error"}
"""Quantities that are drawn in percent."""

POSITION = "position on the curve, t (0: network a, 1: network b)"
"""The axis of figures along a curve."""

SPREADS = {"std": "standard deviation", "sem": "standard error"}
"""How far several results of one kind differ, by the names that `Comparison.summary` has for it."""

_DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # line styles, which grey print tells apart too
_FEW, _MANY = 6, 12  # names below places
_LETTERS = 60  # that fit side by side below a figure
_WIDEST, _NARROWEST = 2.8, 1.8  # of lines


def line(number: int) -> dict[str, Any]:
    """Return colour, dashes and width of the line with a number.

    Later lines are narrower, so that of equal ones all are seen.
    """
    width = max(_NARROWEST, _WIDEST - 0.3 * number)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": width}


def line_of(row: str, rows: Sequence[str], name: str | None, number: int | None) -> dict[str, Any]:
    """Return look and label of a row of one result or of several, of which each has a colour, and each row its dashes.

    Args:
        row: Its name.
        rows: Names of all rows of the figure; a single one is in no label but that of a result without a name.
        name: Of the result, None without labels.
        number: Of the result; None where there is but one.
    """
    place = rows.index(row)
    label = row if name is None else name if len(rows) == 1 else f"{name}, {row}"
    look = line(place if number is None else number)
    return look | {"linestyle": _DASHES[place % len(_DASHES)], "label": label}


def band(ax: Axes, x: Any, low: Any, high: Any, colour: str, *, label: str | None = None) -> None:
    """Draw a band with an edge of its own, so that bands that lie over each other are told apart."""
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
    for edge in (low, high):
        ax.plot(x, edge, color=colour, linewidth=0.5, alpha=0.6)


def check_spread(kind: Any) -> None:
    """Raise a ValueError if a spread is none of `SPREADS`."""
    if not isinstance(kind, str) or kind not in SPREADS:
        raise ValueError(f"spread must be one of {', '.join(map(repr, SPREADS))}, got spread={kind!r:.80}.")


def spread(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return the standard deviation of values ``(K, ...)`` over K results, or ("sem") the standard error of their mean.

    Of one result there is none: NaN.
    """
    with np.errstate(invalid="ignore"):  # values that are not finite have none
        deviation = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return deviation / (np.sqrt(len(values)) if kind == "sem" else 1)


def axes(ax: Axes | None) -> Axes:
    """Return axes to draw on: those given, else those of a new figure.

    Raises:
        ValueError: If what is given is none.
    """
    if ax is not None:
        check("ax", ax, "an Axes of matplotlib", "plot", "set_xlabel")
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")[1]


def finished(ax: Axes, *, legend: bool) -> Axes:
    """Give axes their grid, and above them a legend, where it hides nothing; a title goes above the legend."""
    ax.grid(axis="y", color=NEUTRAL, alpha=0.25, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        names = ax.get_legend_handles_labels()[1]
        rows = -(-len(names) // (3 if max(map(len, names), default=0) < 24 else 2))
        columns = -(-len(names) // max(rows, 1))  # all of one height, or the last shorter by one
        ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
        _lift_title(ax)
    return ax


def _lift_title(ax: Axes) -> None:
    """Have matplotlib put a title above the legend, whenever it is set.

    It puts titles above axes within axes, but knows nothing of legends: so there is one, unseen, where the legend is.
    """
    if not any(isinstance(child.get_axes_locator(), _AtLegend) for child in ax.child_axes):
        place = ax.inset_axes((0, 0, 1, 1))
        place.set_axis_off()
        place.set_axes_locator(_AtLegend(ax))


class _AtLegend:
    """Tells where the legend of axes is, in their figure; without a legend, where they are.

    Args:
        ax: The axes.
    """

    def __init__(self, ax: Axes) -> None:
        self._ax = ax

    def __call__(self, ax: Axes, renderer: Any) -> Any:
        legend = self._ax.get_legend()
        box = self._ax.bbox if legend is None else legend.get_window_extent(renderer)
        return box.transformed(self._ax.figure.transSubfigure.inverted())


def name_places(ax: Axes, names: Sequence[str | None]) -> None:
    """Write a name under each place: upright where they are few, on end where they are many."""
    widest = max((len(str(name or "")) for name in names), default=0)
    few, many = len(names) <= _FEW and widest * len(names) <= _LETTERS, len(names) > _MANY
    angle, side = (0, "center") if few else (90, "center") if many else (30, "right")
    ax.set_xticks(np.arange(len(names)), names, rotation=angle, ha=side)
    ax.tick_params(axis="x", labelsize=7 if many else 9)
    ax.set_xlim(-0.5, len(names) - 0.5)


def named(labels: Sequence[str] | None, things: Sequence[object], what: str) -> Sequence[str | None]:
    """Return a label for each thing, None for each without labels.

    Raises:
        ValueError: If there is nothing, or not a label for each.
    """
    if not things:
        raise ValueError(f"there is no {what} to draw.")
    if labels is None:
        return [None] * len(things)
    if not is_list(labels) or len(labels) != len(things):
        raise ValueError(f"labels must name each {what}: {len(things)} to draw, got labels={labels!r:.80}.")
    return labels


def unit_of(results: Sequence[Any], quantity: str) -> str:
    """Return the unit in which all results have a quantity.

    Raises:
        ValueError: If they have it in several.
    """
    units = {one.quantity(quantity).unit for one in results}
    if len(units) > 1:
        told = " and in ".join(repr(unit) if unit else "no unit" for unit in sorted(units))
        raise ValueError(f"one figure has one unit, but {quantity!r} is in {told}.")
    return units.pop()


def chosen(rows: Sequence[str] | None, there: Sequence[str]) -> Sequence[str]:
    """Return the rows that were chosen, all that there are without a choice.

    Raises:
        ValueError: If there is no such row, or none was chosen.
    """
    if rows is None:
        return there
    if not is_list(rows) or not len(rows):
        raise ValueError(f"rows must be a list of names, got rows={rows!r:.80}.")
    for row in rows:
        if not isinstance(row, str) or row not in there:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(there)}.")
    return rows


def is_list(value: object) -> bool:
    """Whether a value is a list of things, and no text."""
    has_items = hasattr(value, "__len__") and hasattr(value, "__iter__") and getattr(value, "ndim", 1) != 0
    return has_items and not isinstance(value, (str, bytes))


def check(name: str, value: object, what: str, *parts: str) -> None:
    """Raise a ValueError unless a value is an object with all parts that are drawn of it."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        raise ValueError(f"{name} must be {what}, got {value!r:.80}.")
