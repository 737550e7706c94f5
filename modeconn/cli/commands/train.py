"""modeconn train: networks, and ensembles along one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn import models
from modeconn.cli import options, parse
from modeconn.cli.options import (
    AdversaryOptions,
    DataOptions,
    RecipeOptions,
    WatchOptions,
    bars,
    grouped,
    kept_until_done,
    say,
)
from modeconn.cli.outputs import check_new, check_outputs, one_line


@grouped("test_examples", "validate_at")
def train(
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    data: DataOptions,
    model: options.Model,
    recipe: RecipeOptions,
    adversary: AdversaryOptions,
    watch: WatchOptions,
    model_arg: options.ModelArguments = None,
    start: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            metavar="FILE",
            help="A network to go on from, in place of fresh weights.",
        ),
    ] = None,
    cycles: Annotated[
        int | None,
        typer.Option(min=1, help="Train in so many cycles, and write the network at the end of each: NAME-1, NAME-2."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and augmentation of the data, dropout.")] = 0,
    checkpoint: options.Kept = None,
    overwrite: options.Overwrite = False,
    progress: options.Progress = None,
) -> None:
    r"""Train one network: an end for a connection.

    Stopped by Ctrl-C or by anything else, the run goes on after its last finished epoch when the same command is given
    again, and ends with the same bits.

    What the data says of the model need not be said again: classes, channels, image size, mean and deviation of the
    inputs. Default recipe: 30 epochs of SGD with Nesterov momentum at learning rate 0.1. With an adversary (also
    trades:beta=6, free or pgd:clean_weight=0.5), batch norm is recalibrated on clean data at the end and before each
    validation. What --validate-every measures is written to NAME.log.csv, or to --log.

    Cycles with the schedule triangular, from a network that is nearly trained, are fast geometric ensembling, and with
    cosine snapshot ensembles: modeconn chain connects their networks, and modeconn predict says what each adds.

    For example:

        modeconn train a.safetensors --data digits --seed 1 \
            --model mlp --model-arg hidden=128,128 \
            --optimizer adam:lr=0.003 --schedule one_cycle --weight-decay 0

        modeconn train robust.safetensors --data cifar10 --root DIR \
            --model tinyten --adversary pgd --eps 8/255 \
            --step-size 2/255 --attack-steps 5

        modeconn train c.safetensors --data digits --epochs 20 \
            --model mlp --model-arg hidden=128,128 \
            --validation 200 --validate-every 5 --keep-every 10

        modeconn train snapshot.safetensors --data digits \
            --model mlp --model-arg hidden=128,128 \
            --start c.safetensors --cycles 4 --epochs 4 --schedule triangular
    """
    how, opponent = recipe.change(), adversary.opponent()
    kept = checkpoint or out.with_name(out.name + ".checkpoint")
    if watch.validate_every is not None and watch.log is None:
        watch = replace(watch, log=out.with_name(f"{out.stem}.log.csv"))
    numbers = [] if cycles is None else range(1, cycles + 1)
    outs = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers] or [out]
    parts = [kept.with_name(f"{kept.name}.{number}") for number in numbers] or [kept]
    check_outputs(*outs, *parts, watch.log)
    read = [] if start is None else [start]
    check_new(*outs, read=read, overwrite=overwrite)
    check_new(watch.log, read=read, overwrite=True)  # a run that goes on goes on in it
    loader, test = data.load()
    network = parse.make_model(model, parse.settings(model_arg), loader, seed=seed)
    network = (network if start is None else models.load(start, network)).to(data.device)
    told = watch.callbacks(test, out, **({} if opponent is None else {"recalibrate": loader}))
    settings = {"recipe": how, "adversary": opponent, "seed": seed, "checkpoint": kept, "progress": bars(progress)}
    with kept_until_done(*parts, is_own=checkpoint is not None):
        if cycles is None:
            trained = [models.train(network, loader, callbacks=told, **settings)]
        else:
            trained = models.train_snapshots(network, loader, cycles=cycles, callbacks=told, **settings)
        for one, path in zip(trained, outs, strict=True):
            models.save(one, path)
    for one, path in zip(trained, outs, strict=True):
        typer.echo(f"{model} on the test set: {one_line(modeconn.evaluate(one, test))}")
        typer.echo(f"Wrote {path}")
    if ":" in model and not parse.says_that_it_makes_models(parse.imported(model)):
        say(f"later commands need --model {model} for this file, unless {model} is annotated: -> torch.nn.Module.")
