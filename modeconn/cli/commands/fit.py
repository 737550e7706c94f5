"""modeconn fit: a curve of low loss between two networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import modeconn
from modeconn.cli import options, parse
from modeconn.cli.files import is_network
from modeconn.cli.inputs import read_connection
from modeconn.cli.options import (
    AdversaryOptions,
    DataOptions,
    ModelOptions,
    RecipeOptions,
    WatchOptions,
    bars,
    grouped,
    kept_until_done,
)
from modeconn.cli.outputs import check_new, check_outputs


@grouped("test_examples", "input_shape")
def fit(
    a: options.File,
    b: options.File,
    out: Annotated[Path, typer.Option(help="File for the connection.")],
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    adversary: AdversaryOptions,
    watch: WatchOptions,
    method: Annotated[str, typer.Option(help=f"{options.METHOD}; a permutation file; or none.")] = "activation",
    curve: Annotated[
        str,
        typer.Option(
            help="line, bezier:DEGREE or polychain:SEGMENTS, also with ,free_ends=True, or =a, =b for one end."
        ),
    ] = "bezier:2",
    start: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            metavar="FILE",
            help="A network that an inner control point begins with, repeated for each of them; or a connection, whose "
            "inner control points are taken. Default: points on the straight line.",
        ),
    ] = None,
    refine: Annotated[
        str,
        typer.Option(
            help="none, pam, or pam:KEY=VALUE,... such as pam:iterations=4,step=sinkhorn. Steps: "
            f"{', '.join(parse.STEPS)}."
        ),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of t, order and augmentation of the data, dropout.")] = 0,
    checkpoint: options.Kept = None,
    overwrite: options.Overwrite = False,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints inside an epoch.")] = 60,
    progress: options.Progress = None,
) -> None:
    r"""Align network b with network a, then learn a curve of low loss between them.

    Stopped by Ctrl-C or by anything else, the run goes on from its checkpoint when the same command is given again, and
    ends with the same bits.

    What --validate-every measures is kept in the history of the connection, too.

    For example:

        modeconn fit a.safetensors b.safetensors --data digits \
            --out curve.safetensors --epochs 15 \
            --optimizer adam:lr=0.001 --schedule one_cycle

        modeconn fit a.safetensors b.safetensors --data digits \
            --out curve.safetensors --validate-every 5 --validate-at 0,0.5,1

        modeconn fit a.safetensors b.safetensors --data digits \
            --out robust.safetensors --adversary pgd --eps 0.1
    """
    settings = {
        "align": parse.alignment(method),
        "curve": parse.curve(curve),
        "recipe": recipe.change(),
        "refine": parse.refinement(refine),
        "adversary": adversary.opponent(),
    }
    started = start or []
    if len(started) > 1 and not all(map(is_network, started)):
        raise ValueError("--start takes one connection, or a network for each inner control point, not both.")
    kept = checkpoint or out.with_name(out.name + ".checkpoint")
    check_outputs(out, kept, watch.log)
    check_new(out, read=[a, b, *started], overwrite=overwrite)
    check_new(watch.log, read=[a, b, *started], overwrite=True)  # a run that goes on goes on in it
    watch.check(are_epochs=bool(settings["curve"].num_trained))
    loader, test = data.load()
    networks = shape.read((a, b), loader, data.device)
    with kept_until_done(kept, is_own=checkpoint is not None):
        connection = modeconn.fit_curve(
            *networks,
            loader,
            **settings,
            start=_start(started, shape, loader, data.device),
            checkpoint=modeconn.Checkpoint(kept, every_seconds=save_every),
            seed=seed,
            outputs=parse.outputs(shape.outputs),
            symmetries=shape.symmetries,
            untie=shape.untie,
            callbacks=watch.callbacks(test, out),
            progress=bars(progress),
        )
        connection.save(out)
    typer.echo(repr(connection))
    typer.echo(f"Wrote {out}")


def _start(files: list[Path], shape: ModelOptions, train: Any, device: str) -> Any:
    """Return what inner control points begin with: a connection, networks, or None if no files were given."""
    if files and not is_network(files[0]):
        return read_connection(files[0], shape.template(train), None, device)
    return shape.read(files, train, device) or None
