"""modeconn curvature: the largest eigenvalue of the Hessian along a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modeconn.cli import options
from modeconn.cli.files import check_holds_networks
from modeconn.cli.inputs import read_connection, training_and_measured
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped
from modeconn.cli.outputs import result_files, write_result


@grouped("augment", "train_examples", "test_examples", "input_shape", "outputs", "symmetries", "untie")
def curvature(
    connection: options.File,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Begin of the names of the JSON and CSV files; default: NAME.curvature, or NAME.curvature.train."
        ),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks to measure, both ends included.")] = 11,
    wrt: Annotated[str, typer.Option(help="weights, inputs or both: whose Hessian to look at.")] = "weights",
    steps: Annotated[int, typer.Option(min=1, help="How many products with the Hessian at most, at each point.")] = 100,
    on: Annotated[str, typer.Option(help="test or train: what to measure on.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the vectors that the method begins with.")] = 0,
    overwrite: options.Overwrite = False,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    """Measure the largest eigenvalue of the Hessian of the loss along a connection.

    Batch norm is recalibrated at every point on training data. Prints a table, and writes all points as JSON and CSV.

    For example:

        modeconn curvature curve.safetensors --data digits --points 5
    """
    check_holds_networks(connection)
    own = f"{connection.stem}.curvature" if on == "test" else f"{connection.stem}.curvature.{on}"
    results = result_files(connection.with_name(own), out, overwrite=overwrite)
    if wrt not in ("weights", "inputs", "both"):
        raise ValueError(f"--wrt must be weights, inputs or both, got {wrt!r}.")
    train_loader, measured = training_and_measured(data, on)
    loaded = read_connection(connection, shape.template(train_loader), curve_class, data.device)
    found = loaded.curvature(
        measured,
        wrt=wrt,  # type: ignore[arg-type]  # checked above
        num_points=points,
        num_steps=steps,
        recalibrate=train_loader,
        seed=seed,
        progress=bars(progress),
    )
    write_result(found, results)
