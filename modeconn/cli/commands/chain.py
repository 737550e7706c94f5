"""modeconn chain: a chain of lines through many networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modeconn import Connection
from modeconn.cli import options
from modeconn.cli.options import DataOptions, ModelOptions, grouped
from modeconn.cli.outputs import check_new


@grouped(
    "batch_size",
    "augment",
    "train_examples",
    "test_examples",
    "validation",
    "data_seed",
    "input_shape",
    "outputs",
    "symmetries",
    "untie",
    data=None,
)
def chain(
    networks: options.Files,
    out: Annotated[Path, typer.Option(help="File for the connection.")],
    data: DataOptions,
    shape: ModelOptions,
    overwrite: options.Overwrite = False,
) -> None:
    r"""Connect many networks, such as checkpoints of one run, by a chain of straight lines.

    Network k of K lies at t = k / (K - 1). The file is measured as any other connection: by evaluate, predict, plane.

    For example:

        modeconn chain a.safetensors b.safetensors c.safetensors \
            --out chain.safetensors
    """
    check_new(out, read=networks, overwrite=overwrite)
    train = data.load_if_given()[0]
    connection = Connection.through(shape.read(networks, train, data.device))
    connection.save(out)
    typer.echo(repr(connection))
    typer.echo(f"Wrote {out}")
