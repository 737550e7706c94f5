"""The program `modeconn`: its commands, and the options that it has itself."""

from __future__ import annotations

from typing import Annotated

import typer

import modeconn
from modeconn.cli import parse
from modeconn.cli.commands import deep_align, tensor_files
from modeconn.cli.commands.align import align
from modeconn.cli.commands.chain import chain
from modeconn.cli.commands.compare import compare
from modeconn.cli.commands.curvature import curvature
from modeconn.cli.commands.demo import demo
from modeconn.cli.commands.evaluate import evaluate
from modeconn.cli.commands.fit import fit
from modeconn.cli.commands.info import info
from modeconn.cli.commands.merge import merge
from modeconn.cli.commands.plane import measure_plane
from modeconn.cli.commands.plot import draw
from modeconn.cli.commands.predict import predict
from modeconn.cli.commands.report import write_report
from modeconn.cli.commands.robustness import robustness
from modeconn.cli.commands.sample import sample
from modeconn.cli.commands.symmetry import symmetry
from modeconn.cli.commands.train import train
from modeconn.cli.group import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Connect independently trained neural networks by curves of low loss.\n\nBegin with: modeconn demo",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(modeconn.__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import a module of yours first, whose classes files hold."),
    ] = None,
) -> None:
    """Hold the options of the program itself."""
    for module in imports or ():
        parse.imported(module)


for _name, _command in {
    "demo": demo,
    "train": train,
    "align": align,
    "merge": merge,
    "fit": fit,
    "chain": chain,
    "evaluate": evaluate,
    "robustness": robustness,
    "sample": sample,
    "predict": predict,
    "plane": measure_plane,
    "curvature": curvature,
    "compare": compare,
    "plot": draw,
    "symmetry": symmetry,
    "report": write_report,
    "info": info,
}.items():
    app.command(name=_name)(_command)
app.add_typer(deep_align.app, name="deepalign")
for _command in (tensor_files.interpolate, tensor_files.diff, tensor_files.shuffle, tensor_files.verify):
    app.command()(_command)
app.command(name="add-task")(tensor_files.add_task)
