"""modeconn sample: networks along a connection, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from modeconn import models
from modeconn.cli import options
from modeconn.cli.files import check_holds_networks
from modeconn.cli.inputs import read_connection
from modeconn.cli.options import DataOptions, ModelOptions, grouped
from modeconn.tools import processes


@grouped("augment", "test_examples", "input_shape", "outputs", "symmetries", "untie")
def sample(
    connection: options.File,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[Path, typer.Option(help="Folder for NAME-000.safetensors and so on; made if it is not there.")],
    points: Annotated[int, typer.Option(min=2, help="How many networks, both ends included.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    curve_class: options.CurveClass = None,
) -> None:
    """Write networks along a connection to files, evenly spaced in t, both ends included.

    Batch norm is recalibrated on training data between the ends, which keep their statistics. Each is a network like
    any other: it goes into merge, evaluate, align, or a program of its own.

    For example:

        modeconn sample curve.safetensors --data digits --points 5 --out networks
    """
    files = [out / f"{connection.stem}-{number:03d}.safetensors" for number in range(points)]
    taken = [path for path in files if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{str(taken[0])!r} exists. Choose another folder, or --overwrite it.")
    training, _ = data.load()
    check_holds_networks(connection)
    loaded = read_connection(connection, shape.template(training), curve_class, data.device)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {str(out)!r} is a file.")
    if processes.writes():
        out.mkdir(parents=True, exist_ok=True)
    for t, path in zip(torch.linspace(0, 1, points, dtype=torch.float64).tolist(), files, strict=True):
        models.save(loaded.model_at(t, recalibrate=None if t in (0, 1) else training), path)
        typer.echo(f"t={t:.4g}: {path}")
