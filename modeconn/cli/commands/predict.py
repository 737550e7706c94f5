"""modeconn predict: probabilities along a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modeconn.cli import options
from modeconn.cli.files import check_holds_networks
from modeconn.cli.inputs import attack_named, read_connection, training_and_measured
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped
from modeconn.cli.outputs import check_outputs


@grouped("augment", "train_examples", "input_shape", "outputs", "symmetries", "untie")
def predict(
    connection: options.File,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[Path | None, typer.Option(help="The file; default: NAME.predictions.npz.")] = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks, both ends included.")] = 11,
    attack: Annotated[
        str | None, typer.Option(help="What attacks the examples of each network, such as pgd20; default: nothing.")
    ] = None,
    eps: Annotated[str, typer.Option(metavar="8/255", help="Radius, in units of the pixel range.")] = "8/255",
    norm: Annotated[str | None, typer.Option(help="linf or l2; default: linf.", show_default=False)] = None,
    on: Annotated[str, typer.Option(help="test or train: what to predict.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    """Write the probabilities that networks along a connection give to each class, for every example, as .npz.

    Batch norm is recalibrated at every point on training data. Prints accuracies of the networks, and of all together.

    For example:

        modeconn predict curve.safetensors --data digits --points 5
    """
    path = out or connection.with_name(f"{connection.stem}.predictions.npz")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists. Give --out another name, or --overwrite it.")
    check_outputs(path)
    training, measured = training_and_measured(data, on)
    check_holds_networks(connection)
    loaded = read_connection(connection, shape.template(training), curve_class, data.device)
    found = loaded.predict(
        measured,
        num_points=points,
        attack=attack_named(attack, eps, norm),
        recalibrate=training,
        seed=seed,
        progress=bars(progress),
    )
    found.save(path)
    typer.echo(repr(found))
    typer.echo(f"Wrote {path}")
