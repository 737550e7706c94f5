"""Commands on files of models of any size, which are read tensor by tensor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from modeconn import tensor_files
from modeconn.cli import options
from modeconn.cli.options import bars

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Model = Annotated[Path, typer.Argument(exists=True, help="A safetensors file, a folder of shards, or a state dict.")]


def bytes_of(text: str) -> int:
    """Return a size such as ``5GB`` in bytes.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) * _UNITS[found[2].upper()] < 1:
        raise ValueError(f"--out-shard-size must be a size such as 5GB or 500MB, got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def interpolate(
    a: Model,
    b: Model,
    out: Annotated[Path, typer.Option(help="A folder, or a file that ends in .safetensors.")],
    t: Annotated[float, typer.Option(help="Position on the line from a, 0, to b, 1.")] = 0.5,
    out_shard_size: Annotated[str, typer.Option(help="How large a file of the folder may be.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    progress: options.Progress = None,
) -> None:
    r"""Write the network at a point of the straight line between two models in files, as they are.

    Files of any size: no more than three tensors are in memory. A folder also gets a's
    configuration and tokenizer. Networks that were trained apart should be aligned first.

    For example:

        modeconn interpolate llama-a llama-b --t 0.3 --out llama-between --out-shard-size 2GB
    """
    written = tensor_files.interpolate(
        a, b, out, t=t, shard_bytes=bytes_of(out_shard_size), overwrite=overwrite, progress=bars(progress)
    )
    typer.echo(f"Wrote {written}")


def diff(
    a: Model,
    b: Model,
    out: Annotated[Path | None, typer.Option(help="Write all numbers to this JSON file.")] = None,
    progress: options.Progress = None,
) -> None:
    r"""Say what tells two models in files apart: names, shapes, and how far numbers differ, tensor by tensor.

    Files of any size: one tensor of each is in memory at a time. The exit status is 0 also where they differ.

    For example:

        modeconn diff llama llama-tuned
    """
    found = tensor_files.difference(a, b, progress=bars(progress))
    if out is not None:
        found.to_json(out)
    typer.echo(repr(found))
    if found.is_none:
        typer.echo("They hold the same numbers under the same names.")
    if out is not None:
        typer.echo(f"Wrote {out}")
