"""modeconn align: b relabelled so that its units agree with those of a."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import modeconn
from modeconn import models
from modeconn.cli import options, parse
from modeconn.cli.commands import tensor_files
from modeconn.cli.files import CORRELATIONS
from modeconn.cli.options import AdversaryOptions, DataOptions, ModelOptions, bars, grouped
from modeconn.cli.outputs import check_new
from modeconn.cli.recipes import Recipe as Recipe_
from modeconn.tools import provenance
from modeconn.tools.json_files import KIND, to_json


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
        tensor_files.refuse_data("aligned", data, adversary, report)
        tensor_files.align(context, a, b, out, out_a, permutation, method, shape, stream, progress)
        return
    out = tensor_files.needed(out)
    check_new(out, out_a, permutation, report, read=[a, b], overwrite=stream.overwrite)
    chosen = _under_attack(None if method is None else parse.method(method), adversary.opponent())
    loader, _ = data.load_if_given()
    networks = shape.read((a, b), loader, data.device)
    how = {"method": chosen, **shape.how_to_discover(), "progress": bars(progress)}
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


def _under_attack(method: Any, adversary: Any) -> Any:
    """Return the way to align that compares units under attack, if there is an adversary."""
    if adversary is None:
        return method
    if not isinstance(adversary, modeconn.AdversarialTraining) or adversary.clean_weight:
        raise ValueError(f"networks are aligned under an attack, --adversary pgd[:KEY=VALUE,...], got {adversary!r}.")
    if not isinstance(method, modeconn.ActivationMatching | None):
        raise ValueError(f"--adversary is for --method activation, which looks at data, got {method!r}.")
    return replace(method or modeconn.ActivationMatching(), adversary=adversary.attack)
