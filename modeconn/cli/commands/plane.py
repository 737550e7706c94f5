"""modeconn plane: networks of a plane in weight space."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import modeconn
from modeconn import plot
from modeconn.cli import options, parse
from modeconn.cli.files import check_holds_networks, is_network
from modeconn.cli.inputs import attack_named, read_connection, training_and_measured
from modeconn.cli.options import DataOptions, ModelOptions, bars, grouped, kept_until_done
from modeconn.cli.outputs import STDOUT, check_outputs, check_own


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
    quantity: Annotated[str, typer.Option(help="What the figure shows: loss, accuracy, error or a metric.")] = "loss",
    metric: options.Metrics = None,
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
    results = {} if out == STDOUT else {ending: base.with_name(f"{base.name}.{ending}") for ending in endings}
    check_outputs(*results.values())
    if results and not overwrite:
        check_own(results["json"])
    if len(networks) not in (1, 3) or (len(networks) == 1) == is_network(networks[0]):
        raise ValueError(f"a plane goes through a connection or through three networks, got {len(networks)} files.")
    names = [path.stem for path in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"the three networks need names of their own, got {', '.join(names)}.")
    metrics = parse.metrics(metric)
    known = ["loss", "accuracy", "error", *metrics]
    if quantity not in known:
        raise ValueError(f"--quantity must be one of {', '.join(known)}, got {quantity!r}; --metric measures others.")
    against, window = attack_named(attack, eps, norm), None if extent is None else parse.extent(extent)
    training, measured = training_and_measured(data, on)
    template = shape.template(training)
    subject: Any = {p.stem: options.read_network(p, template, shape.entry).to(data.device) for p in networks[1:]}
    if len(networks) == 1:
        subject = read_connection(networks[0], template, curve_class, data.device)
    else:
        first = options.read_network(networks[0], template, shape.entry).to(data.device)
        subject = {networks[0].stem: first, **subject}
    kept = checkpoint or base.with_name(f"{base.name}.checkpoint")
    how = {"num_points": points, "extent": window, "refine": refine, "times": times, "attack": against, "seed": seed}
    how["metrics"] = metrics
    with kept_until_done(kept, is_own=checkpoint is not None):
        found = modeconn.plane(subject, measured, recalibrate=training, checkpoint=kept, progress=bars(progress), **how)
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
