"""The commands, each of which reads files, calls one function and writes files."""

from __future__ import annotations

import csv
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from typer.core import TyperGroup

import modeconn
from modeconn import Connection, Recipe, models, plot
from modeconn.cli import deep_align, options, parse, report, tensor_files
from modeconn.cli import demo as story
from modeconn.cli.figures import FIGURES, draw_files
from modeconn.cli.files import CORRELATIONS, check_holds_networks, describe_file, is_network, made_by_of, read_file
from modeconn.cli.options import (
    AdversaryOptions,
    DataOptions,
    ModelOptions,
    RecipeOptions,
    WatchOptions,
    grouped,
    kept_until_done,
    say,
)
from modeconn.cli.options import bars as _bars
from modeconn.cli.recipes import Recipe as Recipe_
from modeconn.cli.sharing import launched_together, shared_command
from modeconn.measure.along import AlongCurve
from modeconn.network.batches import in_order
from modeconn.tools import processes, program, provenance
from modeconn.tools.json_files import KIND, to_json
from modeconn.tools.measurements import Records
from modeconn.tools.progress import bars as progress_bars
from modeconn.tools.writing import check_writable, made_folder, write_text

_STDOUT = Path("-")
_INTERRUPTED, _BROKEN_PIPE, _TERMINATED = 130, 141, 143  # 128 + SIGINT, SIGPIPE and SIGTERM, as shells have it


class _Group(TyperGroup):
    """Turns what the library raises into one line on stderr, and lets all that is made say by which command."""

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        with provenance.command(shlex.join(["modeconn", *given])):
            return super().main(given, **settings)

    def invoke(self, context: Any) -> Any:
        try:
            with launched_together():
                return self._invoke(context)
        except ValueError as error:  # of the launcher
            say(f"error: {error}")
            raise typer.Exit(1) from None

    def _invoke(self, context: Any) -> Any:
        them = processes.joined()
        try:
            if program.is_program():  # from here on an interruption is said in words; before, it ends in silence
                program.interrupt()
            with shared_command() as them:
                return super().invoke(context)
        except BrokenPipeError:  # whoever reads the output has seen enough
            sys.stdout = open(os.devnull, "w")  # until the process ends, which would write to it
            raise typer.Exit(_BROKEN_PIPE) from None
        except processes.OtherProcessError as error:
            if them.speaker is None and them.says_what_was_lost():  # otherwise the one that failed says it
                say(f"error: {error}")
            raise typer.Exit(1) from None
        except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
            if them.speaks:
                said = str(error)
                say(f"error: {said if isinstance(error, parse.OptionError) else _in_options(said, context)}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if them.is_first:
                say("interrupted.")
            raise typer.Exit(_TERMINATED if program.was_terminated else _INTERRUPTED) from None
        except Exception as error:
            code = getattr(error, "exit_code", None)  # of a usage error, which is printed once
            if code is None or them.speaks:
                raise
            time.sleep(1)  # the first process prints it later than all others that go wrong together
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Connect independently trained neural networks by curves of low loss.\n\nBegin with: modeconn demo",
)


_OPTIONS = {
    "num_points": "--points",
    "num_examples": "--examples",
    "num_steps": "--steps",
    "template": "--model",
    "example_input": "--input-shape",
    "curve": "--curve-class",
    "loader": "--data",
    "align": "--method",
}
"""What the command line calls arguments of the library that have another name there."""

_PHRASES = {
    "example_input=, a tensor (or tuple, or dict of keyword inputs) that the model accepts": "--input-shape N,C,H,W, "
    "such as 2,3,32,32, or 2,16:int64 for tokens",
}
"""What is written in another way on the command line than in Python."""


def _in_options(message: str, context: Any) -> str:
    """Return an error of the library with the options of the command at work in place of Python's arguments."""
    command = getattr(context, "command", None)
    named = command.get_command(context, context.invoked_subcommand or "") if hasattr(command, "get_command") else None
    own = {name for parameter in getattr(named, "params", ()) for name in parameter.opts}
    names = {name.removeprefix("--").replace("-", "_"): name for name in own} | _OPTIONS
    calls = re.findall(r"\b[A-Z]\w*\([^()]*\)", message)  # such as DataLoader(loader, batch_size=128): Python's own
    for number, call in enumerate(calls):
        message = message.replace(call, f"\0{number}\0")
    for phrase, other in _PHRASES.items():
        message = message.replace(phrase, other)
    for name, option in names.items():
        if option not in own:
            continue
        message = re.sub(rf"(?<![\w.-]){name}=True\b", option, message)
        message = re.sub(rf"(?<![\w.-]){name}=(?=[^\s,.;)])", f"{option} ", message)
        message = re.sub(rf"(?<![\w.-]){name}=", option, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w.'-]){name}(?![\w='])", option, message)
    in_python = dict.fromkeys(re.findall(r"(?<![\w.'-])[a-z]\w*=(?=[\s,.;:)]|$)", message))
    if in_python:
        are = "is an argument" if len(in_python) == 1 else "are arguments"
        message += f" ({' and '.join(in_python)} {are} in Python, which no option stands for.)"
    for number, call in enumerate(calls):
        message = message.replace(f"\0{number}\0", call)
    return message


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(modeconn.__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import a module of yours first, whose classes files hold."),
    ] = None,
) -> None:
    """Hold the options of the program itself."""
    for module in imports or ():
        parse.imported(module)


def _check_outputs(*paths: Path | None) -> None:
    """Raise unless each file that is asked for can be written, and to a place of its own."""
    asked = [path for path in paths if path is not None]
    places = [path.resolve() for path in asked]
    for path, place in zip(asked, places, strict=True):
        check_writable(path)
        if places.count(place) > 1:
            raise ValueError(f"several results would be written to {str(path)!r}. Give them names that differ.")


def _refuse_data(done: str, data: DataOptions, adversary: AdversaryOptions | None, *others: Any) -> None:
    """Raise a ValueError if networks that are read tensor by tensor are to be run."""
    attacked = adversary is not None and adversary.opponent() is not None
    if data.data is not None or attacked or any(one is not None for one in others):
        raise ValueError(
            f"networks that are read tensor by tensor are {done} by their weights, without data: leave out --data, "
            f"--adversary, --report, --start and --repair."
        )
    if data.device != "cpu":
        raise ValueError(f"networks that are read tensor by tensor are {done} on the CPU: leave out --device.")


def _legend(labels: str) -> list[str]:
    (row,) = csv.reader([labels], skipinitialspace=True)
    return row


def _training_and_measured(data: DataOptions, on: str) -> tuple[Any, Any]:
    """Return the training loader, and the loader of what is to be measured on: "train" or "test"."""
    if on not in ("train", "test"):
        raise ValueError(f"--on must be train or test, got {on!r}.")
    train_loader, test_loader = data.load()
    return train_loader, in_order(train_loader) if on == "train" else test_loader


def _connection(path: Path, template: nn.Module | None, curve_class: str | None, device: str) -> Connection:
    kind = None if curve_class is None else parse.imported(curve_class)
    if template is None:
        parse.enter_factory(path)
    return Connection.load(path, template, curve=kind, device=device)


def _result_files(base: Path, out: Path | None, *, overwrite: bool) -> list[Path]:
    """Return the JSON and CSV files whose names begin with ``out`` (or are one of these), by default with ``base``.

    They can be written, and under a default name there is no result of another command yet. ``-`` means no files.
    """
    if out == _STDOUT:
        return []
    base = base if out is None else out.with_suffix("") if out.suffix in (".json", ".csv") else out
    results = [base.with_name(base.name + ending) for ending in (".json", ".csv")]
    _check_outputs(*results)
    if out is None and not overwrite:
        _check_own(results[0])
    return results


def _check_own(result: Path) -> None:
    """Raise unless a result is new, or was written by the very command that is at work."""
    if not result.exists():
        return
    made_by = made_by_of(result) or {}
    if made_by.get("command") != provenance.current_command():
        by = f", made by: {made_by['command']}" if "command" in made_by else ""
        raise ValueError(f"{str(result)!r} holds another result{by}. Choose another name, or --overwrite it.")


def _check_new(*paths: Path | None, read: Sequence[Path] = (), overwrite: bool) -> None:
    """Raise unless files can be written, are none of those that are read, and replace no result of another command."""
    _check_outputs(*paths)
    for path in (path for path in paths if path is not None):
        if path.resolve() in [one.resolve() for one in read]:
            raise ValueError(f"{str(path)!r} is one of the files that are read. Write to another one.")
        if not overwrite:
            _check_own(path)


def _write_result(found: AlongCurve, results: list[Path]) -> None:
    """Write a result along a curve as JSON and CSV, and say so; without files, print the JSON alone."""
    if not results:
        typer.echo(found.to_json(), nl=False)
        return
    found.to_json(results[0])
    found.to_csv(results[1])
    typer.echo(repr(found))
    typer.echo(f"Wrote {results[0]}, {results[1]}")


def _one_line(profile: modeconn.Profile) -> str:
    accuracy = "" if profile.accuracy is None else f", accuracy {profile.accuracy[0]:.2%}"
    return f"loss {profile.loss[0]:.4f}{accuracy}"


def _versions() -> str:
    import platform

    import numpy
    import safetensors
    import scipy

    versions = {module.__name__: module.__version__ for module in (torch, numpy, scipy, safetensors)}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return "\n".join(
        [f"modeconn {modeconn.__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
        + [f"{name} {version}" for name, version in versions.items()]
        + [where]
    )


def _under_attack(method: Any, adversary: Any) -> Any:
    """Return the way to align that compares units under attack, if there is an adversary."""
    if adversary is None:
        return method
    if not isinstance(adversary, modeconn.AdversarialTraining) or adversary.clean_weight:
        raise ValueError(f"networks are aligned under an attack, --adversary pgd[:KEY=VALUE,...], got {adversary!r}.")
    if not isinstance(method, modeconn.ActivationMatching | None):
        raise ValueError(f"--adversary is for --method activation, which looks at data, got {method!r}.")
    return replace(method or modeconn.ActivationMatching(), adversary=adversary.attack)


@app.command()
@grouped(
    "optimizer",
    "schedule",
    "weight_decay",
    "autocast",
    "compile",
    "entry",
    "input_shape",
    "outputs",
    "symmetries",
    "untie",
    data="digits",
)
def demo(
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    out: Annotated[Path, typer.Option(help="Folder for figures, connections and numbers.")] = Path("modeconn-demo"),
    curve_epochs: Annotated[int | None, typer.Option(help="The same for curves.", rich_help_panel="Recipe")] = None,
    points: Annotated[int | None, typer.Option(min=2, help="How many networks to measure on each connection.")] = None,
    seeds: Annotated[tuple[int, int], typer.Option(help="Of the two networks.")] = (1, 2),
    progress: options.Progress = None,
) -> None:
    r"""Train two networks and connect them: straight and curved, with and without alignment.

    Prints one table, and writes figures, connections, numbers and a page about them into a folder. On the digits, which
    come with the package, this takes seconds. On images it trains on 10,000 examples for 10 epochs and measures 2,000,
    unless told otherwise.

    For example:

        modeconn demo

        modeconn demo --data fashion_mnist --root DIR --model tinyten \
            --epochs 20 --train-examples 60000
    """
    preset = story.DIGITS if data.data == "digits" else story.IMAGES
    arguments = parse.settings(shape.model_arg)
    plan = preset.changed(
        model=shape.model,
        arguments=arguments if shape.model else {**preset.arguments, **arguments},
        endpoints=recipe.change(preset.endpoints),
        curve=RecipeOptions(epochs=curve_epochs).change(preset.curve),
        num_points=points,
        train_examples=data.train_examples,
        test_examples=data.test_examples,
    )
    data = replace(data, train_examples=plan.train_examples, test_examples=plan.test_examples)
    loaders = data.load()
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "results.json")

    def make(seed: int) -> torch.nn.Module:
        return parse.make_model(plan.model, plan.arguments, loaders[0], seed=seed).to(data.device)

    with story.on_threads(plan.num_threads):
        found = story.tell(plan, make, *loaders, seeds=seeds, say=say, progress=_bars(progress))
    story.write_results(found, out, {"data": data.data, "data_seed": data.data_seed, "seeds": seeds, **plan.to_json()})
    typer.echo(f"{plan.model} on {data.data}, {found.rows[0].profile.num_examples} test examples\n\n{found.table()}\n")
    page = report.report(report.parts_of([out]), f"modeconn demo: {plan.model} on {data.data}")
    write_text(page, out / "report.html")
    typer.echo(f"Figures (*.png), networks and connections (*.safetensors), numbers (*.json): {out.resolve()}")
    typer.echo(f"All of it on one page: {out.resolve() / 'report.html'}")


@app.command()
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
    _check_outputs(*outs, *parts, watch.log)
    read = [] if start is None else [start]
    _check_new(*outs, read=read, overwrite=overwrite)
    _check_new(watch.log, read=read, overwrite=True)  # a run that goes on goes on in it
    loader, test = data.load()
    network = parse.make_model(model, parse.settings(model_arg), loader, seed=seed)
    network = (network if start is None else models.load(start, network)).to(data.device)
    told = watch.callbacks(test, out, **({} if opponent is None else {"recalibrate": loader}))
    settings = {"recipe": how, "adversary": opponent, "seed": seed, "checkpoint": kept, "progress": _bars(progress)}
    with kept_until_done(*parts, is_own=checkpoint is not None):
        if cycles is None:
            trained = [models.train(network, loader, callbacks=told, **settings)]
        else:
            trained = models.train_snapshots(network, loader, cycles=cycles, callbacks=told, **settings)
        for one, path in zip(trained, outs, strict=True):
            models.save(one, path)
    for one, path in zip(trained, outs, strict=True):
        typer.echo(f"{model} on the test set: {_one_line(modeconn.evaluate(one, test))}")
        typer.echo(f"Wrote {path}")
    if ":" in model and not parse.says_that_it_makes_models(parse.imported(model)):
        say(f"later commands need --model {model} for this file, unless {model} is annotated: -> torch.nn.Module.")


@app.command()
@grouped("batch_size", "augment", "train_examples", "test_examples", data=None)
def align(
    context: typer.Context,
    a: tensor_files.Model,
    b: tensor_files.Model,
    data: DataOptions,
    shape: ModelOptions,
    adversary: AdversaryOptions,
    stream: tensor_files.StreamOptions,
    out: Annotated[Path | None, typer.Option(help="File for b, relabelled.", show_default=False)] = None,
    out_a: Annotated[
        Path | None, typer.Option(help="File for a with its gains folded, which b agrees with if it is rotated.")
    ] = None,
    permutation: Annotated[Path | None, typer.Option(help="File for the relabelling itself.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file for correlations, for modeconn plot.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{options.METHOD}; default: activation where there is data."),
    ] = None,
    recipe: Recipe_ = None,
    progress: options.Progress = None,
) -> None:
    r"""Relabel the units of network b so that it agrees with network a; its function stays the same.

    Prints the mean correlation of paired units before and after, for each group of units, where there is data. With an
    adversary, activations are those of each network's own adversarial examples.

    With --symmetries orthogonal, b is rotated where it may be, and agrees with what --out-a writes.

    Folders of shards, as Hugging Face has them, and with --stream files, are read tensor by tensor and aligned by
    their weights, with no network in memory; --model says of which architecture they are.

    For example:

        modeconn align a.safetensors b.safetensors --data digits \
            --out b-aligned.safetensors --report report.json

        modeconn align a.safetensors b.safetensors --method weight \
            --out b-aligned.safetensors

        modeconn align llama-a llama-b --model mine:llama --symmetries orthogonal \
            --out llama-b-aligned --out-a llama-a-folded
    """
    if stream.is_for((a, b)):
        _refuse_data("aligned", data, adversary, report)
        tensor_files.align(context, a, b, out, out_a, permutation, method, shape, stream, progress)
        return
    out = tensor_files.needed(out)
    _check_new(out, out_a, permutation, report, read=[a, b], overwrite=stream.overwrite)
    chosen = _under_attack(None if method is None else parse.method(method), adversary.opponent())
    loader, _ = data.load_if_given()
    networks = shape.read((a, b), loader, data.device)
    how = {"method": chosen, **shape.how_to_discover(), "progress": _bars(progress)}
    found = modeconn.align(*networks, loader, **how)
    models.save(found.model_b, out)
    if out_a is not None:
        models.save(found.model_a, out_a)
    elif found.model_a is not networks[0]:
        typer.echo("The gains of a were folded, too: --out-a writes the network that b agrees with now.", err=True)
    if permutation is not None:
        found.permutation.save(permutation)
    if report is not None:
        to_json({KIND: CORRELATIONS, "correlation": found.correlation, **provenance.entry(found)}, report)
    typer.echo(repr(found))
    typer.echo(f"Wrote {', '.join(str(path) for path in (out, out_a, permutation, report) if path is not None)}")


@app.command()
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
        _refuse_data("merged", data, None, start, repair or None)
        tensor_files.merge(context, networks, out, method, seed, weights, last, decay, shape, stream, progress)
        return
    if weights is not None or last is not None or decay != 1:
        raise ValueError("--weights, --last and --decay are for networks that are read by tensor: pass --stream.")
    out = tensor_files.needed(out)
    _check_new(out, read=networks, overwrite=stream.overwrite)
    chosen, first = parse.method(method), None if start is None else parse.method(start)
    loader, test = data.load_if_given()
    loaded = shape.read(networks, loader, data.device)
    how = {"method": chosen, "start": first, "repair": repair, "seed": seed, **shape.how_to_discover()}
    with progress_bars(_bars(progress)):
        found = modeconn.merge_many(loaded, loader, **how)
    models.save(found.model, out)
    typer.echo(repr(found))
    if test is not None:
        typer.echo(f"Their mean on the test set: {_one_line(modeconn.evaluate(found.model, test))}")
    typer.echo(f"Wrote {out}")


@app.command()
@grouped("test_examples", "input_shape")
def fit(
    a: options.File,
    b: options.File,
    out: Annotated[Path, typer.Option(help="File for the connection.")],
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    adversary: AdversaryOptions,
    watch: WatchOptions,
    method: Annotated[str, typer.Option(help=f"{options.METHOD}; a permutation file; or none.")] = "activation",
    curve: Annotated[
        str,
        typer.Option(
            help="line, bezier:DEGREE or polychain:SEGMENTS, also with ,free_ends=True, or =a, =b for one end."
        ),
    ] = "bezier:2",
    start: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            metavar="FILE",
            help="A network that an inner control point begins with, repeated for each of them; or a connection, whose "
            "inner control points are taken. Default: points on the straight line.",
        ),
    ] = None,
    refine: Annotated[
        str,
        typer.Option(
            help="none, pam, or pam:KEY=VALUE,... such as pam:iterations=4,step=sinkhorn. Steps: "
            f"{', '.join(parse.STEPS)}."
        ),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of t, order and augmentation of the data, dropout.")] = 0,
    checkpoint: options.Kept = None,
    overwrite: options.Overwrite = False,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints inside an epoch.")] = 60,
    progress: options.Progress = None,
) -> None:
    r"""Align network b with network a, then learn a curve of low loss between them.

    Stopped by Ctrl-C or by anything else, the run goes on from its checkpoint when the same command is given again, and
    ends with the same bits.

    What --validate-every measures is kept in the history of the connection, too.

    For example:

        modeconn fit a.safetensors b.safetensors --data digits \
            --out curve.safetensors --epochs 15 \
            --optimizer adam:lr=0.001 --schedule one_cycle

        modeconn fit a.safetensors b.safetensors --data digits \
            --out curve.safetensors --validate-every 5 --validate-at 0,0.5,1

        modeconn fit a.safetensors b.safetensors --data digits \
            --out robust.safetensors --adversary pgd --eps 0.1
    """
    settings = {
        "align": parse.alignment(method),
        "curve": parse.curve(curve),
        "recipe": recipe.change(),
        "refine": parse.refinement(refine),
        "adversary": adversary.opponent(),
    }
    started = start or []
    if len(started) > 1 and not all(map(is_network, started)):
        raise ValueError("--start takes one connection, or a network for each inner control point, not both.")
    kept = checkpoint or out.with_name(out.name + ".checkpoint")
    _check_outputs(out, kept, watch.log)
    _check_new(out, read=[a, b, *started], overwrite=overwrite)
    _check_new(watch.log, read=[a, b, *started], overwrite=True)  # a run that goes on goes on in it
    watch.check(are_epochs=bool(settings["curve"].num_trained))
    loader, test = data.load()
    networks = shape.read((a, b), loader, data.device)
    with kept_until_done(kept, is_own=checkpoint is not None):
        connection = modeconn.fit_curve(
            *networks,
            loader,
            **settings,
            start=_start(started, shape, loader, data.device),
            checkpoint=modeconn.Checkpoint(kept, every_seconds=save_every),
            seed=seed,
            outputs=parse.outputs(shape.outputs),
            symmetries=shape.symmetries,
            untie=shape.untie,
            callbacks=watch.callbacks(test, out),
            progress=_bars(progress),
        )
        connection.save(out)
    typer.echo(repr(connection))
    typer.echo(f"Wrote {out}")


def _start(files: list[Path], shape: ModelOptions, train: Any, device: str) -> Any:
    """Return what inner control points begin with: a connection, networks, or None if no files were given."""
    if files and not is_network(files[0]):
        return _connection(files[0], shape.template(train), None, device)
    return shape.read(files, train, device) or None


@app.command()
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
    _check_new(out, read=networks, overwrite=overwrite)
    train = data.load_if_given()[0]
    connection = Connection.through(shape.read(networks, train, data.device))
    connection.save(out)
    typer.echo(repr(connection))
    typer.echo(f"Wrote {out}")


@app.command()
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
    """
    check_holds_networks(connection)
    own = connection.with_name(connection.stem if on == "test" else f"{connection.stem}.{on}")
    results = _result_files(own, out, overwrite=overwrite)
    train_loader, measured = _training_and_measured(data, on)
    template = shape.template(train_loader)
    if is_network(connection):
        network = options.read_network(connection, template, shape.entry).to(data.device)
        _write_result(modeconn.evaluate(network, measured), results)
        return
    loaded = _connection(connection, template, curve_class, data.device)
    profile = loaded.evaluate(measured, num_points=points, recalibrate=train_loader, progress=_bars(progress))
    _write_result(profile, results)


@app.command()
@grouped("augment", "train_examples", "test_examples", "input_shape", "outputs", "symmetries", "untie")
def robustness(
    connections: options.Files,
    data: DataOptions,
    shape: ModelOptions,
    attack: Annotated[
        list[str],
        typer.Option(
            help="pgd20 (or another number of steps), apgd, square, autoattack, autoattack-10, or any attack of "
            "torchattacks, 'torchattacks:FAB(steps=50)'; may be repeated."
        ),
    ] = ["pgd20"],  # noqa: B006  # typer reads it and copies it
    eps: Annotated[
        str, typer.Option(metavar="8/255", help="Radius of every ball, in units of the pixel range.")
    ] = "8/255",
    norm: Annotated[
        str | None,
        typer.Option(help="linf or l2; default: linf, or that of an attack in l2 alone.", show_default=False),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks to attack, both ends included.")] = 11,
    examples: Annotated[int | None, typer.Option(help="Attack the first so many examples.")] = None,
    on: Annotated[str, typer.Option(help="test or train: what to attack.")] = "test",
    statistics: Annotated[
        str, typer.Option(help="Batch norm is recalibrated on clean or on adversarial (5 steps of eps/4) examples.")
    ] = "clean",
    transfer: Annotated[bool, typer.Option(help="Whether to try what is found at each t at all others too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for NAME.robust.json (or NAME.robust.train.json), .csv, .png; default: that of each file. - "
            "prints JSON."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    overwrite: options.Overwrite = False,
    checkpoint: options.Finished = None,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    r"""Attack the networks along one or several connections, or networks alone.

    Batch norm is recalibrated at every point on training data; a network alone keeps its statistics. Prints a table,
    and writes it with the answers to every example as JSON, as CSV and as a figure. Stopped by Ctrl-C or by anything
    else, it goes on from its checkpoint when the same command is given again.

    Attacks are many small operations. Where other programs keep the cores busy, torch's threads wait for each other at
    each of them: set the environment variable OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=passive to keep several threads.

    For example:

        modeconn robustness curve.safetensors --data digits \
            --attack pgd20 --eps 0.1 --points 5 --examples 100

        modeconn robustness *.safetensors --data cifar10 --root DIR \
            --attack pgd20 --attack autoattack --eps 8/255 \
            --points 3 --examples 200
    """
    radius, ball = parse.number(eps), None if norm is None else parse.norm(norm)
    attacks = {text: modeconn.attacks.build(text, eps=radius, norm=ball) for text in attack}
    if statistics not in ("clean", "adversarial"):
        raise ValueError(f"--statistics must be clean or adversarial, got {statistics!r}.")
    if out == _STDOUT and len(connections) > 1:
        raise ValueError(f"--out - prints one result, but there are {len(connections)} files.")
    check_holds_networks(*connections)
    endings = () if out == _STDOUT else ("json", "csv", "png")
    own = "robust" if on == "test" else f"robust.{on}"
    folder = None if out is None or not endings else made_folder(out)
    bases = [(folder or path.parent) / f"{path.stem}.{own}" for path in connections]
    results = [[base.with_name(f"{base.name}.{ending}") for ending in endings] for base in bases]
    _check_outputs(*(file for written in results for file in written))
    for written in results if endings and not overwrite else ():
        _check_own(written[0])
    training, measured = _training_and_measured(data, on)
    template = shape.template(training)
    if statistics == "adversarial":
        training = modeconn.AdversarialExamples(training, modeconn.attacks.build("pgd5", eps=radius, norm=ball))
    for path, base, written in zip(connections, bases, results, strict=True):
        kept = checkpoint or base.with_name(f"{base.name}.checkpoint")
        with Records(kept):  # another file than a checkpoint is refused here, before anything is said of it
            pass
        how = {"num_examples": examples, "checkpoint": kept, "seed": seed, "progress": _bars(progress)}
        with kept_until_done(kept, is_own=checkpoint is not None):
            if is_network(path):
                network = options.read_network(path, template, shape.entry).to(data.device)
                found = modeconn.robustness(network, measured, attacks, **how)
            else:
                along = {"num_points": points, "recalibrate": training, "transfer": transfer}
                loaded = _connection(path, template, curve_class, data.device)
                found = loaded.robustness(measured, attacks, **along, **how)
            _write_robust_profile(found, path, written)


def _write_robust_profile(found: modeconn.RobustProfile, path: Path, written: list[Path]) -> None:
    """Write a result as JSON, CSV and a figure, and say so; without files, print the JSON alone."""
    from matplotlib.figure import Figure

    if not written:
        typer.echo(found.to_json(), nl=False)
        return
    found.to_json(written[0])
    found.to_csv(written[1])
    if len(found.t) > 1:
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        plot.robust_profile(found, ax=figure.subplots())
        options.save_figure(figure, written[2])
    typer.echo(f"{path}: {found!r}")
    typer.echo(f"Wrote {', '.join(map(str, written if len(found.t) > 1 else written[:2]))}")


@app.command()
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
    loaded = _connection(connection, shape.template(training), curve_class, data.device)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {str(out)!r} is a file.")
    if processes.writes():
        out.mkdir(parents=True, exist_ok=True)
    for t, path in zip(torch.linspace(0, 1, points, dtype=torch.float64).tolist(), files, strict=True):
        models.save(loaded.model_at(t, recalibrate=None if t in (0, 1) else training), path)
        typer.echo(f"t={t:.4g}: {path}")


@app.command()
@grouped("augment", "train_examples", "input_shape", "outputs", "symmetries", "untie")
def predict(
    connection: options.File,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[Path | None, typer.Option(help="The file; default: NAME.predictions.npz.")] = None,
    points: Annotated[int, typer.Option(min=2, help="How many networks, both ends included.")] = 11,
    attack: Annotated[
        str | None, typer.Option(help="What attacks the examples of each network, such as pgd20; default: nothing.")
    ] = None,
    eps: Annotated[str, typer.Option(metavar="8/255", help="Radius, in units of the pixel range.")] = "8/255",
    norm: Annotated[str | None, typer.Option(help="linf or l2; default: linf.", show_default=False)] = None,
    on: Annotated[str, typer.Option(help="test or train: what to predict.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    """Write the probabilities that networks along a connection give to each class, for every example, as .npz.

    Batch norm is recalibrated at every point on training data. Prints accuracies of the networks, and of all together.

    For example:

        modeconn predict curve.safetensors --data digits --points 5
    """
    path = out or connection.with_name(f"{connection.stem}.predictions.npz")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists. Give --out another name, or --overwrite it.")
    _check_outputs(path)
    training, measured = _training_and_measured(data, on)
    check_holds_networks(connection)
    loaded = _connection(connection, shape.template(training), curve_class, data.device)
    found = loaded.predict(
        measured,
        num_points=points,
        attack=_attack(attack, eps, norm),
        recalibrate=training,
        seed=seed,
        progress=_bars(progress),
    )
    found.save(path)
    typer.echo(repr(found))
    typer.echo(f"Wrote {path}")


def _attack(name: str | None, eps: str, norm: str | None) -> Any:
    """Return the attack that options name, None for none."""
    if name is None:
        return None
    return modeconn.attacks.build(name, eps=parse.number(eps), norm=None if norm is None else parse.norm(norm))


@app.command(name="plane")
@grouped("augment", "train_examples", "input_shape", "outputs", "symmetries", "untie")
def measure_plane(
    networks: options.Files,
    data: DataOptions,
    shape: ModelOptions,
    out: Annotated[
        Path | None,
        typer.Option(help="Begin of the names of the JSON file and the figure; default: NAME.plane. - prints JSON."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Columns, and rows, of networks to measure.")] = 21,
    extent: Annotated[
        str | None,
        typer.Option(
            metavar="LEFT,RIGHT,BOTTOM,TOP", help="The window; default: what holds networks and curve, and some more."
        ),
    ] = None,
    refine: Annotated[int, typer.Option(min=0, max=4, help="How often cells that the curve passes are halved.")] = 0,
    times: Annotated[float, typer.Option(help="Colours and plane end at so many times the loss of the ends.")] = 5.0,
    attack: Annotated[
        str | None, typer.Option(help="What attacks the examples at each point, such as pgd20; default: nothing.")
    ] = None,
    eps: Annotated[str, typer.Option(metavar="8/255", help="Radius, in units of the pixel range.")] = "8/255",
    norm: Annotated[str | None, typer.Option(help="linf or l2; default: linf.", show_default=False)] = None,
    quantity: Annotated[str, typer.Option(help="What the figure shows: loss, accuracy or error.")] = "loss",
    export: Annotated[
        str | None, typer.Option(help="Other files to write: html, npz, vti, csv, pdf, svg, with commas between them.")
    ] = None,
    on: Annotated[str, typer.Option(help="test or train: what to measure on.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    overwrite: options.Overwrite = False,
    checkpoint: options.Finished = None,
    curve_class: options.CurveClass = None,
    progress: options.Progress = None,
) -> None:
    r"""Measure the networks of a plane through the ends and a control point of a connection, or through three networks.

    Batch norm is recalibrated at every point on training data. Prints what was found; writes all points as JSON, a
    figure, and what --export names. Stopped by Ctrl-C or by anything else, the same command goes on.

    For example:

        modeconn plane curve.safetensors --data digits --points 9 --refine 2

        modeconn plane a.safetensors b.safetensors b-aligned.safetensors \
            --data digits --points 9 --export npz,vti --out three
    """
    check_holds_networks(*networks)
    endings = _plane_endings(export)
    base = networks[0].with_name(f"{networks[0].stem}.plane") if out is None else out
    base = base.with_suffix("") if base.suffix == ".json" else base
    results = {} if out == _STDOUT else {ending: base.with_name(f"{base.name}.{ending}") for ending in endings}
    _check_outputs(*results.values())
    if results and not overwrite:
        _check_own(results["json"])
    if len(networks) not in (1, 3) or (len(networks) == 1) == is_network(networks[0]):
        raise ValueError(f"a plane goes through a connection or through three networks, got {len(networks)} files.")
    names = [path.stem for path in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"the three networks need names of their own, got {', '.join(names)}.")
    against, window = _attack(attack, eps, norm), None if extent is None else parse.extent(extent)
    training, measured = _training_and_measured(data, on)
    template = shape.template(training)
    subject: Any = {p.stem: options.read_network(p, template, shape.entry).to(data.device) for p in networks[1:]}
    if len(networks) == 1:
        subject = _connection(networks[0], template, curve_class, data.device)
    else:
        first = options.read_network(networks[0], template, shape.entry).to(data.device)
        subject = {networks[0].stem: first, **subject}
    kept = checkpoint or base.with_name(f"{base.name}.checkpoint")
    how = {"num_points": points, "extent": window, "refine": refine, "times": times, "attack": against, "seed": seed}
    with kept_until_done(kept, is_own=checkpoint is not None):
        found = modeconn.plane(
            subject, measured, recalibrate=training, checkpoint=kept, progress=_bars(progress), **how
        )
        _write_plane(found, quantity, results)


def _plane_endings(export: str | None) -> list[str]:
    known = ("html", "npz", "vti", "csv", "pdf", "svg")
    wanted = [one.strip() for one in export.split(",")] if export else []
    for one in wanted:
        if one not in known:
            raise ValueError(f"--export knows {', '.join(known)}, got {one!r}.")
    return ["json", "png", *dict.fromkeys(wanted)]


def _write_plane(found: modeconn.Plane, quantity: str, results: dict[str, Path]) -> None:
    """Write a plane in all formats that are asked for, and say so; without files, print the JSON alone."""
    from matplotlib.figure import Figure

    if not results:
        typer.echo(found.to_json(), nl=False)
        return
    write = {"json": found.to_json, "npz": found.to_npz, "vti": found.to_vti, "csv": found.to_csv}
    write["html"] = partial(found.to_html, quantity=quantity)
    for ending, path in results.items():
        if ending in write:
            write[ending](path)
            continue
        figure = Figure(figsize=(6.0, 4.4), layout="constrained")
        plot.plane(found, quantity=quantity, ax=figure.subplots())
        options.save_figure(figure, path)
    typer.echo(repr(found))
    typer.echo(f"Wrote {', '.join(map(str, results.values()))}")


@app.command()
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
    results = _result_files(connection.with_name(own), out, overwrite=overwrite)
    if wrt not in ("weights", "inputs", "both"):
        raise ValueError(f"--wrt must be weights, inputs or both, got {wrt!r}.")
    train_loader, measured = _training_and_measured(data, on)
    loaded = _connection(connection, shape.template(train_loader), curve_class, data.device)
    found = loaded.curvature(
        measured,
        wrt=wrt,  # type: ignore[arg-type]  # checked above
        num_points=points,
        num_steps=steps,
        recalibrate=train_loader,
        seed=seed,
        progress=_bars(progress),
    )
    _write_result(found, results)


@app.command()
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
    written = [] if out == _STDOUT else [out, out.with_suffix(".csv")]
    kept = checkpoint or out.with_name("comparison.checkpoint" if out == _STDOUT else out.name + ".checkpoint")
    _check_outputs(*written, kept)
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
            progress=_bars(progress),
        )
        if not written:
            typer.echo(found.to_json(), nl=False)
            return
        found.to_json(written[0])
        found.to_csv(written[1])
    typer.echo(repr(found))
    typer.echo(f"Wrote {', '.join(map(str, written))}")


@app.command(name="plot")
def draw(
    files: options.Files,
    out: Annotated[Path, typer.Option(help="The figure: .png, .pdf, .svg.")],
    figure: Annotated[
        str | None, typer.Option(help=f"What of them: {', '.join(FIGURES)}. Default: what one looks at first.")
    ] = None,
    quantity: Annotated[
        str | None,
        typer.Option(
            help="Of profiles and planes loss, accuracy, error or a metric, of a comparison a column, of a history "
            "loss, or what callbacks measured, such as accuracy. Default: the first.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Names for the legend, with commas between them; one with a comma in it in double quotes."),
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Light text on a dark background.")] = False,
) -> None:
    r"""Draw files of one kind.

    Results of modeconn evaluate, robustness and curvature are drawn along t (or as a spectrum); planes as maps (several
    of one --extent as mean-plane, and std-plane for their standard deviation); reports (of modeconn align) as
    correlations before and after; connections as the loss of their training (also history-by-t, or the turns of PAM);
    relabellings, also those of connections, as cycles of units or angles; a comparison (of modeconn compare)
    as one column of its table, by default the barriers of the straight line.

    For example:

        modeconn plot line.json curve.json --out profiles.pdf \
            --labels "line,curve" --quantity accuracy

        modeconn plot report.json --out correlations.png

        modeconn plot curve.safetensors --out history.png

        modeconn plot curve.safetensors --figure cycles --out cycles.png --dark
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    check_writable(out)
    with style.context("dark_background" if dark else []):
        drawn = Figure(figsize=(5.4, 3.6), layout="constrained")
        names = None if labels is None else _legend(labels)
        read = [(path, read_file(path)) for path in files]
        draw_files(read, drawn.subplots(), figure=figure, labels=names, quantity=quantity)
        options.save_figure(drawn, out)
    typer.echo(f"Wrote {out}")


@app.command()
def symmetry(
    model: Annotated[
        str, typer.Argument(help="A model file, a model of the zoo, or package.module:factory.", show_default=False)
    ],
    made_by: Annotated[
        str | None,
        typer.Option("--model", help="What made the model of a file that does not say it.", show_default=False),
    ] = None,
    model_arg: options.ModelArguments = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,C,H,W[:DTYPE]",
            help="Shape of an example input, such as 2,3,224,224 or 2,16:int64; repeat it for several inputs. "
            "Default: what the model says of itself.",
            show_default=False,
        ),
    ] = None,
    outputs: options.SelectedOutputs = None,
    symmetries: options.Symmetries = "permutation",
    untie: options.Untie = False,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave parameters of these names fixed.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Whether to compare every tensor with its predicted relabelling.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.", show_default=False)] = None,
    save_spec: Annotated[
        Path | None, typer.Option(help="Write the spec to this file, for Python.", show_default=False)
    ] = None,
    progress: options.Progress = None,
) -> None:
    """Find and prove the groups of units of a model that can be relabelled.

    Prints where each group appears, how many relabellings there are, and what stays fixed and why.

    For example:

        modeconn symmetry resnet20 --model-arg width=2

        modeconn symmetry torchvision.models:resnet18 --input-shape 2,3,224,224
    """
    _check_outputs(out, save_spec)
    arguments = parse.settings(model_arg)
    if Path(model).is_file():
        if arguments and made_by is None:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        template = None if made_by is None else parse.make_model(made_by, arguments, None)
        network = options.read_network(Path(model), template)
    elif made_by is not None or Path(model).suffix in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"there is no file {model!r}.")
    else:
        network = parse.make_model(model, arguments, None)
    example = None if input_shape is None else tuple(map(parse.example_input, input_shape))
    with progress_bars(_bars(progress)):
        settings = {"outputs": parse.outputs(outputs), "symmetries": symmetries, "untie": untie}
        spec = modeconn.discover(network, example, freeze=freeze or (), **settings)
        error = spec.verify(network, example) if verify else None
    typer.echo(repr(spec.report()))
    if error is not None:
        typer.echo(f"\nproved: no tensor differs from its prediction by more than {error:.1e} standard deviations")
    if out is not None:
        spec.report().to_json(out)
    if save_spec is not None:
        spec.save(save_spec)


@app.command(name="report")
def write_report(
    runs: Annotated[list[Path], typer.Argument(exists=True, show_default=False, help="Folders of runs, or files.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Of the page; default: the names of the runs.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write one page of HTML about everything that runs left, to look into without network.

    All results along curves stand in one figure, with a menu of quantities, values on hovering and a slider over t;
    then each file with its table, its figure, and how it was made. Files that cannot be read are named, and left out.

    For example:

        modeconn report modeconn-demo --out report.html
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} exists. Give --out another name, or --overwrite it.")
    check_writable(out)
    name = title or "modeconn: " + ", ".join(run.resolve().name for run in runs)
    write_text(report.report(report.parts_of(runs), name), out)
    typer.echo(f"Wrote {out}")


@app.command()
def info(
    file: Annotated[Path | None, typer.Argument(exists=True, show_default=False)] = None,
) -> None:
    """Say what a file is, or a folder of shards.

    Without a file: which versions are at work, and on which machine.

    For example:

        modeconn info curve.safetensors
    """
    typer.echo(_versions() if file is None else describe_file(file))


app.add_typer(deep_align.app, name="deepalign")
for _command in (tensor_files.interpolate, tensor_files.diff, tensor_files.shuffle, tensor_files.verify):
    app.command()(_command)
app.command(name="add-task")(tensor_files.add_task)
