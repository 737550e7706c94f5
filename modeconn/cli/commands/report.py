"""modeconn report: one page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modeconn.cli import report
from modeconn.tools.writing import check_writable, write_text


def write_report(
    runs: Annotated[list[Path], typer.Argument(exists=True, show_default=False, help="Folders of runs, or files.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Of the page; default: the names of the runs.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write one page of HTML about everything that runs left, to look into without network.

    All results along curves stand in one figure, with a menu of quantities, values on hovering and a slider over t;
    then each file with its table, its figure, and how it was made. Files that cannot be read are named, and left out.

    For example:

        modeconn report modeconn-demo --out report.html
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} exists. Give --out another name, or --overwrite it.")
    check_writable(out)
    name = title or "modeconn: " + ", ".join(run.resolve().name for run in runs)
    write_text(report.report(report.parts_of(runs), name), out)
    typer.echo(f"Wrote {out}")
