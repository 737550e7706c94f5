"""How units were paired, turned and moved, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.plot import style
from modeconn.plot.drawn import Alignment, Correlation, Relabelling, Rotation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

_LENGTHS = ((1, 1), (2, 2), (3, 9), (10, 99), (100, None))  # of cycles, from and to


def correlation(
    *alignments: Alignment | Correlation, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the mean correlation of paired units before and after alignment, dots for each group of units.

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
            style.check(f"alignment {number}", one, "what modeconn.align returns, or its correlation", "correlation")
    correlations = [one if isinstance(one, Mapping) else one.correlation for one in alignments]
    if not correlations or not correlations[0]:
        raise ValueError("there is no correlation to draw: pass alignments that were given data (loader=).")
    groups = list(correlations[0])
    if any(list(one) != groups for one in correlations):
        raise ValueError("these alignments are of different architectures: their groups differ.")
    names = style.named(labels, groups, "group") if labels is not None else groups
    values = _pairs(correlations)

    ax = style.axes(ax)
    places = np.arange(len(groups))
    means = values.mean(0)
    ax.vlines(places, means.min(1), means.max(1), color=style.NEUTRAL, linewidth=0.8, alpha=0.6)
    for column, (name, colour, marker) in enumerate((("before", style.NEUTRAL, "s"), ("after", style.COLOURS[0], "o"))):
        mean, low, high = (reduce(values[:, :, column], axis=0) for reduce in (np.mean, np.min, np.max))
        spread = None if len(correlations) == 1 else (mean - low, high - mean)
        look = {"color": colour, "marker": marker, "markersize": 6, "linestyle": "none", "capsize": 3}
        ax.errorbar(places, mean, yerr=spread, label=f"{name} alignment", **look)
    style.name_places(ax, names)
    ax.set_xlabel("group of units")
    ax.set_ylabel("mean correlation of paired units")
    ax.set_ylim(min(0.0, values.min()) - 0.05, 1.02)
    ax.axhline(0, color=style.NEUTRAL, linewidth=0.6)
    return style.finished(ax, legend=True)


def unit_correlation(matrix: Tensor, *, ax: Axes | None = None) -> Axes:
    """Draw how each unit of a correlates with each of b: blue for -1, white for 0, red for 1.

    Drawn of a and b, and again of a and the relabelled b, it shows what an alignment does: pairs move to the diagonal.

    Args:
        matrix: Of one group ``(N, N)``, as `modeconn.unit_correlations` returns it.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If it is no square matrix.
    """
    if getattr(matrix, "ndim", None) != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(
            f"matrix must be one square matrix that modeconn.unit_correlations returns, got {matrix!r:.80}."
        )
    ax = style.axes(ax)
    drawn = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.figure.colorbar(drawn, ax=ax, label="correlation")
    ax.set_xlabel("unit of b")
    ax.set_ylabel("unit of a")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return ax


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
    style.check("rotation", rotation, "a modeconn.Orthogonal, as align finds it with symmetries='orthogonal'", "angles")
    angles = rotation.angles()
    if not angles:
        raise ValueError("no group of this relabelling rotates its units, so there are no angles to draw.")
    names = style.named(labels, list(angles), "group") if labels is not None else list(angles)
    ax = style.axes(ax)
    ax.plot([0, 100], [0, 180], "--", color=style.NEUTRAL, linewidth=1.2, label="drawn at random")
    for number, (name, found) in enumerate(zip(names, angles.values(), strict=True)):
        degrees = np.sort(np.degrees(found.numpy()).ravel())
        share = 100 * (np.arange(len(degrees)) + 0.5) / len(degrees)
        ax.plot(share, degrees, label=name, **style.line(number))
    ax.set_xlabel("share of directions (%)")
    ax.set_ylabel("turned by at most (degrees)")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 180)
    ax.set_yticks(range(0, 181, 45))
    return style.finished(ax, legend=True)


def cycles(relabelling: Relabelling, *, labels: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw which share of the units of each group stays, and how long the cycles are on which the others move.

    Of a permutation drawn at random every length of a unit's cycle is as likely as any other.

    Args:
        relabelling: The ``permutation`` of an alignment, or any `modeconn.Permutation`.
        labels: Other names for the groups, in their order.
        ax: Where to draw. Default: a new figure.

    Raises:
        ValueError: If nothing is permuted, or a label is missing.
    """
    style.check("relabelling", relabelling, "a modeconn.Permutation, as align finds it", "perms")
    if not relabelling.perms:
        raise ValueError("this relabelling permutes no units, so there are no cycles to draw.")
    names = style.named(labels, list(relabelling.perms), "group") if labels is not None else list(relabelling.perms)
    found = [_cycle_lengths(perm.numpy()) for perm in relabelling.perms.values()]
    ax = style.axes(ax)
    below = np.zeros(len(found))
    for number, (first, last) in enumerate(_LENGTHS):
        ends = np.inf if last is None else last
        shares = np.array([100 * np.mean((first <= lengths) & (lengths <= ends)) for lengths in found])
        name = "stay" if last == 1 else f"cycles of {first}" if first == last else f"cycles of {first} or more"
        name = name if last in (1, first, None) else f"cycles of {first} to {last}"
        colour = style.NEUTRAL if number == 0 else style.COLOURS[number - 1]
        ax.bar(
            np.arange(len(found)),
            shares,
            0.7,
            bottom=below,
            color=colour,
            edgecolor="none",
            label=name if shares.any() else None,
        )
        below += shares
    style.name_places(ax, names)
    ax.set_xlabel("group of units")
    ax.set_ylabel("share of units (%)")
    ax.set_ylim(0, 100)
    return style.finished(ax, legend=True)


def _cycle_lengths(perm: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return for each unit the length of its cycle; of blocks of units each has its own permutation."""
    rows = perm.reshape(-1, perm.shape[-1])
    found = np.zeros(rows.shape, dtype=int)
    for row, lengths in zip(rows, found, strict=True):
        for start in range(len(row)):
            if not lengths[start]:
                cycle = [start]
                while row[cycle[-1]] != start:
                    cycle.append(int(row[cycle[-1]]))
                lengths[cycle] = len(cycle)
    return found.ravel()


def _pairs(correlations: Sequence[Correlation]) -> np.ndarray[Any, Any]:
    """Return correlations as an array ``(alignments, groups, 2)``."""
    try:
        values = np.array([list(map(list, one.values())) for one in correlations], dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 3 or values.shape[2] != 2:
        raise ValueError(f"a correlation must hold (before, after) by group, two numbers, got {correlations[0]!r:.80}.")
    return values
