"""modeconn evaluate: loss, accuracy and barrier along a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn.cli import options, parse
from modeconn.cli.files import check_holds_networks, is_network
from modeconn.cli.inputs import read_connection, training_and_measured
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped
from modeconn.cli.outputs import result_files, write_result


@grouped("augment", "train_examples", "input_shape", "outputs", "symmetries", "untie")
def evaluate(
    connection: options.File,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[
        Path | None,
        typer.Option(help="Begin of the names of the JSON and CSV files; default: NAME, of training data NAME.train."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks to measure, both ends included.")] = 61,
    metric: options.Metrics = None,
    on: Annotated[str, typer.Option(help="test or train: what to measure on.")] = "test",
    overwrite: options.Overwrite = False,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    """Measure loss and accuracy along a connection, or of one network.

    Batch norm is recalibrated at every point on training data; a network alone keeps its statistics. Prints a table,
    and writes all points as JSON and CSV, or with --out - as JSON to standard output.

    For example:

        modeconn evaluate curve.safetensors --data digits --points 25

        modeconn evaluate curve.safetensors --data digits --metric top_k:3 --metric mine:calibration
    """
    check_holds_networks(connection)
    own = connection.with_name(connection.stem if on == "test" else f"{connection.stem}.{on}")
    results = result_files(own, out, overwrite=overwrite)
    train_loader, measured = training_and_measured(data, on)
    template = shape.template(train_loader)
    metrics = parse.metrics(metric)
    if is_network(connection):
        network = options.read_network(connection, template, shape.entry).to(data.device)
        write_result(modeconn.evaluate(network, measured, metrics=metrics), results)
        return
    loaded = read_connection(connection, template, curve_class, data.device)
    how = {"metrics": metrics, "recalibrate": train_loader, "progress": bars(progress)}
    profile = loaded.evaluate(measured, num_points=points, **how)
    write_result(profile, results)
