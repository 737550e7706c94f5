"""modeconn compare: methods held against each other on many pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn import Recipe
from modeconn.cli import options, parse
from modeconn.cli.options import DataOptions, ModelOptions, RecipeOptions, bars, grouped, kept_until_done
from modeconn.cli.outputs import STDOUT, check_outputs, write_result


@grouped("autocast", "compile", "input_shape")
def compare(
    networks: options.Files,
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    out: Annotated[Path, typer.Option(help="JSON file; a CSV file is written beside it. - prints the JSON.")],
    method: Annotated[
        list[str],
        typer.Option(help=f"{options.METHOD}; a row each, may be repeated."),
    ] = ["activation", "weight"],  # noqa: B006  # typer reads it and copies it
    points: Annotated[int, typer.Option(min=2, help="How many networks to measure on each connection.")] = 25,
    repair: Annotated[bool, typer.Option(help="Whether to measure repaired (or recalibrated) lines too.")] = True,
    curve: Annotated[str, typer.Option(help="bezier:DEGREE or polychain:SEGMENTS, fitted if --epochs is given.")] = (
        "bezier:2"
    ),
    references: Annotated[
        bool,
        typer.Option(
            help="Whether to add rows for a random direction and the ensemble of the ends, and a column with best "
            "temperatures."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of random relabellings, the order of the data and the curves.")] = 0,
    checkpoint: options.Finished = None,
    progress: options.Progress = None,
) -> None:
    r"""Compare ways to match on pairs of networks: the first and second file, the third and fourth, and so on.

    Prints the barriers of the straight line between each pair, as it is and repaired, and of a curve if --epochs says
    how long to fit one; always with rows for b as it is and for b relabelled at random.

    For example:

        modeconn compare a.safetensors b.safetensors c.safetensors d.safetensors \
            --data digits --method weight --method activation --out compare.json
    """
    if len(networks) % 2:
        raise ValueError(
            f"networks are compared in pairs, but there are {len(networks)}. Name both files of each pair, one behind "
            f"the other; a file may be named again."
        )
    how = recipe.change()
    if recipe.epochs is None and how != Recipe():
        raise ValueError(
            "--optimizer, --schedule and --weight-decay are for curves; say with --epochs how long to fit."
        )
    methods, shape_of_curve = {name: parse.method(name) for name in method}, parse.curve(curve)
    written = [] if out == STDOUT else [out, out.with_suffix(".csv")]
    kept = checkpoint or out.with_name("comparison.checkpoint" if out == STDOUT else out.name + ".checkpoint")
    check_outputs(*written, kept)
    loaders = data.load()
    loaded = shape.read(networks, loaders[0], data.device)
    with kept_until_done(kept, is_own=checkpoint is not None):
        found = modeconn.compare(
            list(zip(loaded[::2], loaded[1::2], strict=True)),
            methods,
            *loaders,
            num_points=points,
            repair=repair,
            recipe=None if recipe.epochs is None else how,
            curve=shape_of_curve,
            outputs=parse.outputs(shape.outputs),
            symmetries=shape.symmetries,
            untie=shape.untie,
            checkpoint=kept,
            references=references,
            seed=seed,
            progress=bars(progress),
        )
        write_result(found, written)
