"""One page for everything that runs left: what was run, tables, figures, and curves side by side to look into."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeconn import Profile, Relabelling
from modeconn.cli.figures import FIGURES, draw_files, figures_of
from modeconn.cli.files import DEMO, File, read_file
from modeconn.measure.along import AlongCurve
from modeconn.plot.style import COLOURS
from modeconn.tools.page import figure, page
from modeconn.tools.table import html_table
from modeconn.tools.warn import warn

_LEFT_OUT = {".png", ".pdf", ".svg", ".csv", ".html", ".vti", ".log", ".py", ".ipynb", ".sh", ".md", ".toml", ".yaml"}
"""Files that say again what others say, and those that people write."""
_GRID = "rgba(140, 140, 140, 0.3)"  # seen on white and on dark
_INK = "#7A7A7A"
_ON_ANY_PAGE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
"""How pictures are drawn that are read on white and on dark pages: on no ground, in a grey that is seen on both."""
_SLIDER = 61  # positions of t at which the values of all curves are read off


@dataclass(frozen=True)
class Part:
    """A file of a run, or why it cannot be read.

    Args:
        run: The name of the run.
        path: The file.
        file: What it holds; None if it cannot be read.
        problem: Why.
    """

    run: str
    path: Path
    file: File | None
    problem: str = ""

    @property
    def name(self) -> str:
        """How tables and legends call it."""
        return f"{self.run}: {self.path.stem}" if self.run else self.path.stem


def parts_of(runs: Sequence[Path]) -> list[Part]:
    """Read the files of runs, folders or single files; what cannot be read is a part that says why.

    Raises:
        ValueError: If nothing can be read.
    """
    found: list[Part] = []
    for run in runs:
        label = run.name if len(runs) > 1 and run.is_dir() else ""
        paths = sorted(one for one in run.iterdir() if one.is_file() or one.is_symlink()) if run.is_dir() else [run]
        for path in paths:
            if path.suffix in _LEFT_OUT or path.name.startswith("."):
                continue
            try:
                found.append(Part(label, path, read_file(path)))
            except (ValueError, OSError) as error:
                found.append(Part(label, path, None, str(error)))
    if not any(part.file for part in found):
        names = ", ".join(repr(str(run)) for run in runs)
        why = f" ({found[0].problem})" if found else ""
        raise ValueError(f"there is nothing of modeconn to report in {names}{why}.")
    found = [part for run in dict.fromkeys(part.run for part in found) for part in _in_order(found, run)]
    for part in found:
        if part.file is None:
            warn(f"left out of the report: {part.problem}")
    return found


def _in_order(parts: Sequence[Part], run: str) -> list[Part]:
    """Return the parts of a run: first a demo, whose table says most, then what it lists, then others by name."""
    own = [part for part in parts if part.run == run]
    listed = [name for part in own if part.file for name in part.file.lists]
    place = {name: number for number, name in enumerate(dict.fromkeys(listed))}
    is_demo = {part.path: part.file is not None and part.file.kind == DEMO for part in own}
    return sorted(own, key=lambda part: (not is_demo[part.path], place.get(part.path.stem, len(place))))


def report(parts: Sequence[Part], title: str) -> str:
    """Return the page."""
    curves = [part for part in parts if part.file and isinstance(part.file.result, AlongCurve)]
    body = "\n".join([*_curves(curves), *_sections(parts)])
    return page(title, body, interactive=bool(curves))


def _curves(curves: Sequence[Part]) -> Iterator[str]:
    """Yield the interactive figure of all results along curves, with a menu of quantities and a slider over t."""
    if not curves:
        return
    counts = Counter(name for part in curves for name in part.file.result.values)
    quantities = [name for name, _ in counts.most_common()]  # what most have is what is shown first
    traces: list[dict[str, Any]] = []
    shown_by: dict[str, list[bool]] = {name: [] for name in quantities}
    for number, part in enumerate(curves):
        result = part.file.result
        for name, values in result.values.items():
            unit = result.quantity(name).unit
            text = f"%{{y:.4g}}{'%' if unit == '%' else ''}"
            traces.append(
                {
                    "type": "scatter",
                    "x": result.t,
                    "y": values * (100 if unit == "%" else 1),
                    "name": part.name,
                    "visible": name == quantities[0],
                    "line": {"color": COLOURS[number % len(COLOURS)], "width": 2},
                    "hovertemplate": f"{html.escape(part.name)}<br>t=%{{x:.3g}}: {text}<extra></extra>",
                }
            )
            for other in quantities:
                shown_by[other].append(other == name)
    menu = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": shown_by[name]}, {"yaxis.title.text": _axis(curves, name)}],
        }
        for name in quantities
    ]
    mark = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "#8C8C8C", "width": 1}}
    steps = [
        {"label": f"{t:.3g}", "method": "relayout", "args": [{"shapes": [{**mark, "x0": t, "x1": t}]}]}
        for t in torch.linspace(0, 1, _SLIDER).tolist()
    ]
    layout = {
        "xaxis": {"title": {"text": "position on the curve, t"}, "range": [0, 1], "gridcolor": _GRID},
        "yaxis": {"title": {"text": _axis(curves, quantities[0])}, "gridcolor": _GRID},
        "updatemenus": [
            {
                "buttons": menu,
                "x": 0,
                "xanchor": "left",
                "y": 1.16,
                "yanchor": "top",
                "font": {"color": "#222222"},
                "bgcolor": "#EEEEEE",
            }
        ],
        "sliders": [{"steps": steps, "currentvalue": {"prefix": "t = "}, "pad": {"t": 40}}],
        "hovermode": "x",
        "legend": {"orientation": "h", "y": -0.45},
        "margin": {"t": 60, "r": 20},
    }
    yield "<h2>Along the curves</h2>"
    yield figure(traces, layout)
    yield f'<div class="wide">{_barriers(curves)}</div>'


_MAIN = ("loss", "accuracy", "clean accuracy", "worst accuracy")
"""What the table of all curves has of each, where it was measured; of a profile also metrics of the user's own."""


def _axis(curves: Sequence[Part], name: str) -> str:
    unit = next(part.file.result.quantity(name).unit for part in curves if name in part.file.result.values)
    return f"{name} ({unit})" if unit else name


def _barriers(curves: Sequence[Part]) -> str:
    """Return a table of what one looks at first on each curve: at the ends, the least and the most, and the barrier."""
    rows = []
    for part in curves:
        result: AlongCurve = part.file.result
        names = [one for one in _MAIN if one in result.values] or list(result.values)[:1]
        if isinstance(result, Profile):  # a robust profile has many rows, in its own table
            names += [one for one in result.values if one not in (*_MAIN, "error")]
        for name in names:
            values, form = result.values[name], result.quantity(name).form
            told = [form.format(float(one)) for one in (values[0], values[-1], values.min(), values.max())]
            barrier = result.barrier_of(name)
            rows.append([part.name, name, *told, "" if barrier != barrier else form.format(barrier)])
    return html_table(["", "quantity", "t=0", "t=1", "min", "max", "barrier"], rows, left=(0, 1))


def _sections(parts: Sequence[Part]) -> Iterator[str]:
    """Yield what each file holds, run by run."""
    run, relabellings = None, {}
    for part in parts:
        if part.run != run:
            run = part.run
            yield f"<h2>{html.escape(run)}</h2>" if run else "<h2>Files</h2>"
        is_open = part.file is not None and (part.file.kind == DEMO or figures_of(part.file))
        yield f"<details{' open' if is_open else ''}>"
        if part.file is None:
            yield f"<summary>{html.escape(part.path.name)}: cannot be read</summary><p>{html.escape(part.problem)}</p>"
        else:
            yield f"<summary><b>{html.escape(part.path.name)}</b>: {html.escape(part.file.kind)}</summary>"
            yield _held(part.file)
            yield f'<div class="pictures">{"".join(_pictures(part, relabellings))}</div>'
            made_by = part.file.made_by
            if isinstance(made_by, dict):
                facts = [f"{name}: {made_by[name]}" for name in ("command", "call") if name in made_by][:1]
                facts += [f"{name} {version}" for name, version in made_by.get("versions", {}).items()]
                yield f'<p class="made">{html.escape("; ".join(facts))}</p>'
        yield "</details>"


def _held(file: File) -> str:
    if hasattr(file.result, "_repr_html_"):
        return f'<div class="wide">{file.result._repr_html_()}</div>'
    return f"<pre>{html.escape(file.text)}</pre>" if file.text else ""


def _pictures(part: Part, relabellings: dict[str, Relabelling]) -> Iterator[str]:
    """Yield the figures of one file that belong into a report, as SVG.

    Args:
        part: The file.
        relabellings: Those drawn so far, by file; each is drawn once, and that of this file is added.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    offered = figures_of(part.file)
    names = [name for name in offered if FIGURES[name].in_reports]
    if (relabelling := part.file.relabelling) is not None:
        same = next((name for name, other in relabellings.items() if relabelling == other), None)
        if same is None:
            relabellings[f"{part.run}/{part.path.name}" if part.run else part.path.name] = relabelling
        else:
            yield f"<p>Its relabelling is the one drawn at {html.escape(same)}.</p>"
            names = [name for name in names if offered[name] is not relabelling]
    for name in names:
        buffer = io.BytesIO()
        with rc_context(_ON_ANY_PAGE):
            drawn = Figure(figsize=(6.0, 4.0), layout="constrained")
            try:
                draw_files([(part.path, part.file)], drawn.subplots(), figure=name)
            except ValueError as error:  # of one position, say
                yield f"<p>{html.escape(str(error))}</p>"
                continue
            drawn.savefig(buffer, format="svg")
        text = base64.b64encode(buffer.getvalue()).decode()
        yield f'<img alt="{html.escape(f"{part.name}: {name}")}" src="data:image/svg+xml;base64,{text}">'
