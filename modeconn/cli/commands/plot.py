"""modeconn plot: figures of files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

from modeconn.cli import options
from modeconn.cli.figures import FIGURES, draw_files
from modeconn.cli.files import read_file
from modeconn.tools.writing import check_writable


def draw(
    files: options.Files,
    out: Annotated[Path, typer.Option(help="The figure: .png, .pdf, .svg.")],
    figure: Annotated[
        str | None, typer.Option(help=f"What of them: {', '.join(FIGURES)}. Default: what one looks at first.")
    ] = None,
    quantity: Annotated[
        str | None,
        typer.Option(
            help="Of profiles and planes loss, accuracy, error or a metric, of a comparison a column, of a history "
            "loss, or what callbacks measured, such as accuracy. Default: the first.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Names for the legend, with commas between them; one with a comma in it in double quotes."),
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Light text on a dark background.")] = False,
) -> None:
    r"""Draw files of one kind.

    Results of modeconn evaluate, robustness and curvature are drawn along t (or as a spectrum); planes as maps (several
    of one --extent as mean-plane, and std-plane for their standard deviation); reports (of modeconn align) as
    correlations before and after; connections as the loss of their training (also history-by-t, or the turns of PAM);
    relabellings, also those of connections, as cycles of units or angles; a comparison (of modeconn compare)
    as one column of its table, by default the barriers of the straight line (repaired, for networks with batch norm).

    For example:

        modeconn plot line.json curve.json --out profiles.pdf \
            --labels "line,curve" --quantity accuracy

        modeconn plot report.json --out correlations.png

        modeconn plot curve.safetensors --out history.png

        modeconn plot curve.safetensors --figure cycles --out cycles.png --dark
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    check_writable(out)
    with style.context("dark_background" if dark else []):
        drawn = Figure(figsize=(5.4, 3.6), layout="constrained")
        names = None if labels is None else _legend(labels)
        read = [(path, read_file(path)) for path in files]
        draw_files(read, drawn.subplots(), figure=figure, labels=names, quantity=quantity)
        options.save_figure(drawn, out)
    typer.echo(f"Wrote {out}")


def _legend(labels: str) -> list[str]:
    (row,) = csv.reader([labels], skipinitialspace=True)
    return row
