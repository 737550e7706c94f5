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

COLOURS = ("#2A7FBF", "#D55E00", "#009E73", "#CC79A7", "#C99700", "#56B4E9", "#8C8C8C")
"""Colours that colour-blind readers tell apart; each has a contrast of 2.5 or more with white and with black."""

NEUTRAL = "#8C8C8C"
"""What is there for comparison: zero lines, chance, what was before."""

PERCENT = {"accuracy", "error"}
"""Quantities that are drawn in percent."""

POSITION = "position on the curve, t (0: network a, 1: network b)"
"""The axis of figures along a curve."""

_DASHES = ("-", "--", "-.", ":")  # line styles, which grey print tells apart too
_FEW, _MANY = 6, 12  # names below places
_LETTERS = 60  # that fit side by side below a figure
_WIDEST, _NARROWEST = 2.6, 1.2  # of lines


def line(number: int) -> dict[str, Any]:
    """Return colour, dashes and width of the line with a number.

    Later lines are narrower, so that of equal ones all are seen.
    """
    width = max(_NARROWEST, _WIDEST - 0.4 * number)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": width}


def dashes(number: int) -> str:
    """Return the line style with a number."""
    return _DASHES[number % len(_DASHES)]


def band(ax: Axes, x: Any, low: Any, high: Any, colour: str, *, label: str | None = None) -> None:
    """Draw a band with an edge of its own, so that bands that lie over each other are told apart."""
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
    for edge in (low, high):
        ax.plot(x, edge, color=colour, linewidth=0.5, alpha=0.6)


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
    """Give axes their grid, and above them a legend, where it hides nothing."""
    ax.grid(axis="y", color=NEUTRAL, alpha=0.25, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        names = ax.get_legend_handles_labels()[1]
        columns = min(len(names), 3 if max(map(len, names), default=0) < 24 else 2)
        ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
    return ax


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


def is_list(value: object) -> bool:
    """Whether a value is a list of things, and no text."""
    has_items = hasattr(value, "__len__") and hasattr(value, "__iter__") and getattr(value, "ndim", 1) != 0
    return has_items and not isinstance(value, (str, bytes))


def check(name: str, value: object, what: str, *parts: str) -> None:
    """Raise a ValueError unless a value is an object with all parts that are drawn of it."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        raise ValueError(f"{name} must be {what}, got {value!r:.80}.")
