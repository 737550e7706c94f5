"""The commands of Deep-Align."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from modeconn import ActivationMatching, DeepAlign, WeightMatching, compare, models
from modeconn.cli import options, parse
from modeconn.cli.options import DataOptions, ModelOptions, RecipeOptions, bars, grouped, kept_until_done
from modeconn.tools.writing import check_writable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn to align from many networks of one architecture, and see what it has learned.",
)

Networks = Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False, show_default=False)]


@app.command()
@grouped("train_examples", "test_examples", "autocast", "compile", "input_shape", "symmetries", "untie", data="digits")
def fit(
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    files: Networks = None,
    out: Annotated[Path, typer.Option(help="File for the aligner.")] = Path("aligner.safetensors"),
    settings: Annotated[
        str, typer.Option(metavar="KEY=VALUE,...", help="Of DeepAlign and its augmentation: num_steps=1000,noise=0.1.")
    ] = "",
    networks: Annotated[int, typer.Option(min=0, help="Train so many networks first, with seeds 0, 1, ...")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for the networks trained here.")] = None,
    checkpoint: options.Kept = None,
    progress: options.Progress = None,
) -> None:
    r"""Fit an aligner to networks in files, or to networks trained here in one vectorised run, or to both.

    Stopped by Ctrl-C or by anything else, it goes on from its checkpoint when the same command is given again; networks
    to train come first, anew if they were finished.

    For example:

        modeconn deepalign fit networks/*.safetensors --data digits --out aligner.safetensors

        modeconn deepalign fit --data digits --out aligner.safetensors --networks 200 \
            --keep networks --model mlp --model-arg hidden=32,32 \
            --optimizer adam:lr=0.003 --schedule one_cycle --weight-decay 0

        modeconn align a.safetensors b.safetensors --method deep_align:aligner.safetensors --out b-aligned.safetensors
    """
    how, aligner = recipe.change(), parse.deep_align(settings)
    check_writable(out)
    loader, _ = data.load()
    if not (files or networks) or (networks and not shape.model):
        raise ValueError("a fit needs networks: name their files, or train some with --networks and --model.")
    population = shape.read(files or (), loader, data.device)
    if networks:
        arguments = parse.settings(shape.model_arg)
        made = [parse.make_model(shape.model, arguments, loader, seed=seed) for seed in range(networks)]
        made = [network.to(data.device) for network in made]
        kept = out.with_name(out.name + ".networks.checkpoint")
        with kept_until_done(kept, is_own=False):
            trained = models.train_population(made, loader, recipe=how, checkpoint=kept, progress=bars(progress))
        _keep(trained, keep)
        population += trained
    kept = checkpoint or out.with_name(out.name + ".checkpoint")
    with kept_until_done(kept, is_own=checkpoint is not None):
        how = {"outputs": parse.outputs(shape.outputs), "checkpoint": kept, "progress": bars(progress)}
        fitted = aligner.fit(population, loader, **how)
        fitted.save(out)
    step, value = min(fitted.fitted.validation, key=lambda one: one[1])
    what = "loss in the middle" if fitted.connectivity else "squared distance of parameters, as a share,"
    typer.echo(f"{len(population)} networks; {what} {value:.4f} on validation pairs, after {step} steps")
    typer.echo(f"Wrote {out}")


def _keep(networks: list[nn.Module], folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, network in enumerate(networks):
            models.save(network, folder / f"{number:04d}.safetensors")


@app.command()
@grouped(
    "batch_size",
    "augment",
    "train_examples",
    "test_examples",
    "input_shape",
    "outputs",
    "symmetries",
    "untie",
    data="digits",
)
def evaluate(
    aligner: options.File,
    data: DataOptions,
    shape: ModelOptions,
    files: Networks = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks to measure on each line.")] = 25,
    progress: options.Progress = None,
) -> None:
    r"""Measure the barriers that an aligner leaves on pairs of networks: the first and second, third and fourth file.

    Beside it are those that weight matching and activation matching leave, and weight matching with it as start.

    For example:

        modeconn deepalign evaluate aligner.safetensors a.safetensors b.safetensors --data digits
    """
    if not files or len(files) % 2:
        raise ValueError(
            f"networks are compared in pairs, but there are {len(files or ())}. Name both files of each pair, one "
            f"behind the other; a file may be named again."
        )
    fitted = DeepAlign.load(aligner, device=data.device)
    train, test = data.load()
    loaded = shape.read(files, train, data.device)
    found = compare(
        list(zip(loaded[::2], loaded[1::2], strict=True)),
        {
            "weights": WeightMatching(),
            "activations": ActivationMatching(),
            "Deep-Align": fitted,
            "Deep-Align, then weights": WeightMatching(start=fitted),
        },
        train,
        test,
        num_points=points,
        repair=False,
        progress=bars(progress),
    )
    typer.echo(repr(found))
