"""modeconn robustness: what attacks leave along a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn import plot
from modeconn.cli import options, parse
from modeconn.cli.files import check_holds_networks, is_network
from modeconn.cli.inputs import read_connection, training_and_measured
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped, kept_until_done
from modeconn.cli.outputs import STDOUT, check_outputs, check_own
from modeconn.tools.measurements import Records
from modeconn.tools.writing import made_folder


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
    if out == STDOUT and len(connections) > 1:
        raise ValueError(f"--out - prints one result, but there are {len(connections)} files.")
    check_holds_networks(*connections)
    endings = () if out == STDOUT else ("json", "csv", "png")
    own = "robust" if on == "test" else f"robust.{on}"
    folder = None if out is None or not endings else made_folder(out)
    bases = [(folder or path.parent) / f"{path.stem}.{own}" for path in connections]
    results = [[base.with_name(f"{base.name}.{ending}") for ending in endings] for base in bases]
    check_outputs(*(file for written in results for file in written))
    for written in results if endings and not overwrite else ():
        check_own(written[0])
    training, measured = training_and_measured(data, on)
    template = shape.template(training)
    if statistics == "adversarial":
        training = modeconn.AdversarialExamples(training, modeconn.attacks.build("pgd5", eps=radius, norm=ball))
    for path, base, written in zip(connections, bases, results, strict=True):
        kept = checkpoint or base.with_name(f"{base.name}.checkpoint")
        with Records(kept):  # another file than a checkpoint is refused here, before anything is said of it
            pass
        how = {"num_examples": examples, "checkpoint": kept, "seed": seed, "progress": bars(progress)}
        with kept_until_done(kept, is_own=checkpoint is not None):
            if is_network(path):
                network = options.read_network(path, template, shape.entry).to(data.device)
                found = modeconn.robustness(network, measured, attacks, **how)
            else:
                along = {"num_points": points, "recalibrate": training, "transfer": transfer}
                loaded = read_connection(path, template, curve_class, data.device)
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
