"""The commands of Deep-Align."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from modeconn import ActivationMatching, DeepAlign, Recipe, WeightMatching, compare, models
from modeconn.cli import options, parse
from modeconn.cli.options import DataOptions, bars, change_recipe, template
from modeconn.tools.files import check_writable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn to align from many networks of one architecture, and see what it has learned.",
)

Networks = Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False, show_default=False)]


@app.command()
def fit(
    files: Networks = None,
    out: Annotated[Path, typer.Option(help="File for the aligner.")] = Path("aligner.safetensors"),
    data: options.Data = "digits",
    settings: Annotated[
        str, typer.Option(metavar="KEY=VALUE,...", help="Of DeepAlign and its augmentation: steps=1000,noise=0.1.")
    ] = "",
    networks: Annotated[int, typer.Option(min=0, help="Train so many networks first, with seeds 0, 1, ...")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for the networks trained here.")] = None,
    model: options.Template = None,
    model_arg: options.ModelArguments = None,
    epochs: options.Epochs = None,
    optimizer: options.Optimizer = None,
    schedule: options.Schedule = None,
    weight_decay: options.WeightDecay = None,
    root: options.Root = None,
    batch_size: options.BatchSize = None,
    augment: options.Augment = True,
    data_seed: options.DataSeed = 0,
    device: options.Device = "cpu",
    progress: options.Progress = None,
) -> None:
    r"""Fit an aligner to networks in files, or to networks trained here in one vectorised run, or to both.

    For example:

        modeconn deepalign fit networks/*.safetensors --data digits --out aligner.safetensors

        modeconn deepalign fit --data digits --out aligner.safetensors --networks 200 \
            --keep networks --model mlp --model-arg hidden=32,32 \
            --optimizer adam:lr=0.003 --schedule one_cycle --weight-decay 0

        modeconn align a.safetensors b.safetensors --method deep_align:aligner.safetensors --out b-aligned.safetensors
    """
    recipe = change_recipe(Recipe(), epochs=epochs, optimizer=optimizer, schedule=schedule, weight_decay=weight_decay)
    aligner = parse.deep_align(settings)
    check_writable(out)
    loader, _ = DataOptions(data, root, batch_size, augment, seed=data_seed, device=device).load()
    shape = template(model, model_arg, loader)
    if not (files or networks) or (networks and not model):
        raise ValueError("a fit needs networks: name their files, or train some with --networks and --model.")
    population = [models.load(path, shape).to(device) for path in files or ()]
    if networks:
        made = [parse.make_model(model, parse.settings(model_arg), loader, seed=seed) for seed in range(networks)]
        made = [network.to(device) for network in made]
        trained = models.train_population(made, loader, recipe=recipe, progress=bars(progress))
        _keep(trained, keep)
        population += trained
    fitted = aligner.fit(population, loader, progress=bars(progress))
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
def evaluate(
    aligner: options.File,
    files: Networks = None,
    data: options.Data = "digits",
    points: Annotated[int, typer.Option(min=2, help="How many networks to measure on each line.")] = 25,
    model: options.Template = None,
    model_arg: options.ModelArguments = None,
    root: options.Root = None,
    data_seed: options.DataSeed = 0,
    device: options.Device = "cpu",
    progress: options.Progress = None,
) -> None:
    r"""Measure the barriers that an aligner leaves on pairs of networks: the first and second, third and fourth file.

    Beside it are those that weight matching and activation matching leave, and weight matching with it as start.

    For example:

        modeconn deepalign evaluate aligner.safetensors a.safetensors b.safetensors --data digits
    """
    if not files or len(files) % 2:
        raise ValueError(f"networks are compared in pairs, but there are {len(files or ())}.")
    fitted = DeepAlign.load(aligner, device=device)
    train, test = DataOptions(data, root, seed=data_seed, device=device).load()
    shape = template(model, model_arg, train)
    loaded = [models.load(path, shape).to(device) for path in files]
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
