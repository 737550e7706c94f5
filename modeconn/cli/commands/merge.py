"""modeconn merge: one network out of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn import models
from modeconn.cli import options, parse
from modeconn.cli.commands import tensor_files
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped
from modeconn.cli.outputs import check_new, one_line
from modeconn.cli.recipes import Recipe as Recipe_
from modeconn.tools.progress import bars as progress_bars


@grouped("batch_size", "augment", "train_examples", "test_examples", data=None)
def merge(
    context: typer.Context,
    networks: tensor_files.Models,
    data: DataOptions,
    shape: ModelOptions,
    stream: tensor_files.StreamOptions,
    out: Annotated[Path | None, typer.Option(help="File for the mean.", show_default=False)] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"Aligns each with the mean of the others: {options.METHOD}; or none, to take the mean as they are."
        ),
    ] = "weight",
    weights: Annotated[
        str | None, options.file_option("How each network counts; default: all alike.", metavar="NUMBER,...")
    ] = None,
    last: Annotated[
        int | None,
        options.file_option("Of checkpoints of one run, take so many last ones, by the numbers in their names."),
    ] = None,
    decay: Annotated[
        float, options.file_option("Of checkpoints of one run, the weight of each beside the one after it.")
    ] = 1.0,
    start: Annotated[str | None, typer.Option(help="A method that first aligns each with the first network.")] = None,
    repair: Annotated[bool, typer.Option(help="Whether to repair the mean of networks without batch norm.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the networks.")] = 0,
    recipe: Recipe_ = None,
    progress: options.Progress = None,
) -> None:
    r"""Bring two or more networks under one set of names, and write their mean.

    With batch norm, the mean is recalibrated on training data. Prints how far the networks are from their mean and,
    where there is data, what the mean does on the test set.

    Folders of shards, as Hugging Face has them, and with --stream files, are read tensor by tensor, with no network in
    memory; --model says of which architecture they are. With --method none they are averaged as they are, such as
    checkpoints of one run.

    For example:

        modeconn merge a.safetensors b.safetensors c.safetensors \
            --data digits --start activation --repair --out merged.safetensors

        modeconn merge run/step-* --method none --last 5 --decay 0.9 --out averaged
    """
    if stream.is_for(networks) or method == "none":
        tensor_files.refuse_data("merged", data, None, start, repair or None)
        tensor_files.merge(context, networks, out, method, seed, weights, last, decay, shape, stream, progress)
        return
    if weights is not None or last is not None or decay != 1:
        raise ValueError("--weights, --last and --decay are for networks that are read by tensor: pass --stream.")
    out = tensor_files.needed(out)
    check_new(out, read=networks, overwrite=stream.overwrite)
    chosen, first = parse.method(method), None if start is None else parse.method(start)
    loader, test = data.load_if_given()
    loaded = shape.read(networks, loader, data.device)
    how = {"method": chosen, "start": first, "repair": repair, "seed": seed, **shape.how_to_discover()}
    with progress_bars(bars(progress)):
        found = modeconn.merge_many(loaded, loader, **how)
    models.save(found.model, out)
    typer.echo(repr(found))
    if test is not None:
        typer.echo(f"Their mean on the test set: {one_line(modeconn.evaluate(found.model, test))}")
    typer.echo(f"Wrote {out}")
