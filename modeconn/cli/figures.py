"""Which figures there are of the files that commands write, and how each is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn import Comparison, Plane, Relabelling, RobustProfile, plot
from modeconn.cli.files import File, with_article
from modeconn.measure.along import AlongCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FigureKind:
    """A figure that can be drawn of files.

    Args:
        draw: Called with what the files hold, ``labels=`` if it has a legend of them, ``ax=``, and with the quantity
            under the name that it has there.
        shows_several: Whether it shows several files.
        has_labels: Whether each of several files has a name in its legend.
        in_reports: Whether a report of a folder draws it of each file.
        quantity: What its function calls the quantity that is drawn; None if there is but one.
    """

    draw: Callable[..., Any]
    shows_several: bool = True
    has_labels: bool = True
    in_reports: bool = True
    quantity: str | None = None


def _of_planes(statistic: str) -> FigureKind:
    draw = partial(plot.mean_plane, statistic=statistic)  # type: ignore[arg-type]  # one of its own
    return FigureKind(draw, has_labels=False, in_reports=False, quantity="quantity")


FIGURES: Mapping[str, FigureKind] = {
    "profile": FigureKind(plot.profile, quantity="quantity"),
    "robust-profile": FigureKind(plot.robust_profile, quantity="quantity"),
    "spectrum": FigureKind(plot.spectrum, in_reports=False, quantity="quantity"),
    "plane": FigureKind(plot.plane, shows_several=False, quantity="quantity"),
    "mean-plane": _of_planes("mean"),
    "std-plane": _of_planes("std"),
    "comparison": FigureKind(plot.comparison, shows_several=False, quantity="column"),
    "correlation": FigureKind(plot.correlation),
    "history": FigureKind(plot.history, quantity="quantity"),
    "validation": FigureKind(plot.history, quantity="quantity"),
    "history-by-t": FigureKind(plot.history_by_t, shows_several=False),
    "turns": FigureKind(plot.turns, shows_several=False),
    "cycles": FigureKind(plot.cycles, shows_several=False),
    "eigen-angles": FigureKind(plot.eigen_angles, shows_several=False),
}
"""Every kind of figure, by the name that ``modeconn plot --figure`` knows it by."""

_OF_RESULTS = (
    (RobustProfile, ("robust-profile", "spectrum")),
    (AlongCurve, ("profile", "spectrum")),
    (Plane, ("plane", "mean-plane", "std-plane")),
    (Comparison, ("comparison",)),
    (dict, ("correlation",)),
)


def figures_of(file: File) -> dict[str, Any]:
    """Return what of a file can be drawn, by the kind of figure; the first is drawn where none is asked for."""
    names = next((names for kind, names in _OF_RESULTS if isinstance(file.result, kind)), ())
    found: dict[str, Any] = dict.fromkeys(names, file.result)
    if file.history is not None and file.history.loss:
        found |= dict.fromkeys(("history", *["history-by-t"] * bool(file.history.loss_by_t)), file.history)
    if file.history is not None and _validated(file.history):
        found["validation"] = file.history
    if file.history is not None and file.history.turns:
        found["turns"] = file.history
    return found | _of_relabelling(file.relabelling)


def _validated(history: Any) -> set[str]:
    """Return what was measured on validation data after epochs: "loss", "accuracy", or the name of a metric."""
    names = {name for values in history.values for name in values if name.startswith("validation ")}
    return {name.removeprefix("validation ").partition(",")[0] for name in names}


def draw_files(
    files: Sequence[tuple[Path, File]], ax: Axes, *, figure: str | None = None, labels: Sequence[str] | None = None,
    quantity: str | None = None,
) -> None:  # fmt: skip
    """Draw one figure of one or several files, each with what it holds; several are called by their names, or labels.

    Raises:
        ValueError: If there is no such figure of one of them, or not one for all.
    """
    if figure is not None and figure not in FIGURES:
        raise ValueError(f"--figure must be one of {', '.join(FIGURES)}, got {figure!r}.")
    offered = [figures_of(file) for _, file in files]
    for (path, file), found in zip(files, offered, strict=True):
        _check_is_offered(path, file, found, figure)
    names = {figure or next(iter(found)) for found in offered}
    if len(names) > 1:
        kinds = ", ".join(sorted({with_article(file.kind) for _, file in files}))
        raise ValueError(f"one figure shows files of one kind, got {kinds}.")
    (name,) = names
    kind = FIGURES[name]
    settings: dict[str, Any] = {"ax": ax}
    if len(files) > 1 and not kind.shows_several:
        raise ValueError(f"a figure of the kind {name} shows one file, got {len(files)}.")
    if kind.shows_several and kind.has_labels:
        settings["labels"] = [path.stem for path, _ in files] if labels is None and len(files) > 1 else labels
    elif labels is not None:
        raise ValueError(f"--labels are for figures that name several files, which {name} does not. Leave them out.")
    if kind.quantity is not None:
        settings[kind.quantity] = _quantity(name, quantity, offered[0][name])
    elif quantity is not None:
        raise ValueError(
            f"--quantity chooses what is drawn of a profile, a plane, a comparison or a history; {name} has no choice."
        )
    kind.draw(*(found[name] for found in offered), **settings)


def _check_is_offered(path: Path, file: File, found: Mapping[str, Any], figure: str | None) -> None:
    if not found:
        raise ValueError(
            f"{str(path)!r} is {with_article(file.kind)}, of which there is nothing to draw. Figures show results "
            f"along curves, planes, comparisons, correlations of alignments, relabellings, and the training of "
            f"connections."
        )
    if figure is not None and figure not in found:
        raise ValueError(
            f"of {str(path)!r}, {with_article(file.kind)}, there is no figure of the kind {figure}: --figure can be "
            f"{' or '.join(found)}."
        )


def _of_relabelling(relabelling: Relabelling | None) -> dict[str, Any]:
    found = {"cycles": relabelling} if getattr(relabelling, "perms", None) else {}
    turns = hasattr(relabelling, "angles") and any(group.rotates for group in relabelling.spec.groups)
    return found | ({"eigen-angles": relabelling} if turns else {})


def _quantity(name: str, asked: str | None, result: Any) -> str | None:
    """Return what is drawn of a result: what was asked for, else what one looks at first."""
    if asked is not None or isinstance(result, Plane | Comparison):  # which know it themselves
        return asked
    if name == "validation":
        return "validation accuracy" if "accuracy" in _validated(result) else "validation loss"
    firsts = {"robust-profile": "accuracy", "history": "loss"}
    return firsts.get(name) or next(iter(result.values))
