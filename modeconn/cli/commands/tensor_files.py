"""Commands on files of models of any size, which are read tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from modeconn import models, tensor_files
from modeconn.cli import options, parse
from modeconn.cli.files import with_article
from modeconn.cli.options import AdversaryOptions, DataOptions, ModelOptions, bars, file_option, grouped
from modeconn.cli.recipes import Recipe, as_recipe
from modeconn.network import registry
from modeconn.network.saving import KIND
from modeconn.tools import files, provenance

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("float64", "float32", "float16", "bfloat16")

Model = Annotated[
    Path,
    typer.Argument(exists=True, show_default=False, help="A safetensors file, a folder of shards, or a state dict."),
]
Models = Annotated[
    list[Path],
    typer.Argument(exists=True, show_default=False, help="Safetensors files, folders of shards, or state dicts."),
]
Out = Annotated[Path | None, typer.Option(help="A folder, or a file that ends in .safetensors.", show_default=False)]


def bytes_of(text: str) -> int:
    """Return a size such as ``5GB`` in bytes.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) * _UNITS[found[2].upper()] < 1:
        raise ValueError(f"--out-shard-size must be a size such as 5GB or 500MB, got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class OutputOptions:
    """How models are written."""

    out_shard_size: Annotated[
        str | None, file_option("How large a file of a folder may be; default: 5GB.", metavar="SIZE")
    ] = None
    dtype: Annotated[
        str | None, file_option(f"{', '.join(_DTYPES)}; default: as in the files that were read.", metavar="TYPE")
    ] = None
    overwrite: Annotated[bool, file_option("Replace what --out holds.", "--overwrite")] = False

    def settings(self, progress: bool | None) -> dict[str, Any]:
        """Return what the library is told."""
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}.")
        return {
            "shard_bytes": bytes_of(self.out_shard_size or "5GB"),
            "dtype": None if self.dtype is None else getattr(torch, self.dtype),
            "overwrite": self.overwrite,
            "progress": bars(progress),
        }


@dataclass(frozen=True)
class StreamOptions(OutputOptions):
    """Whether networks are read tensor by tensor, and how they are written then."""

    stream: Annotated[
        bool,
        file_option("Read and write tensor by tensor, with no network in memory; folders are in any case.", "--stream"),
    ] = False
    dry_run: Annotated[
        bool, file_option("Say what would be done, and what the files lack; read and write no weight.", "--dry-run")
    ] = False

    def is_for(self, paths: Sequence[Path]) -> bool:
        """Whether to read files tensor by tensor.

        Raises:
            ValueError: If not, and something was asked for that is only done then.
        """
        if self.stream or any(path.is_dir() or path.name.endswith(".index.json") for path in paths):
            return True
        for name in ("out_shard_size", "dtype", "dry_run"):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} is for networks that are read by tensor: pass --stream.")
        return False


@dataclass(frozen=True)
class PlanOptions:
    """What to do before weights are read."""

    dry_run: Annotated[
        bool, file_option("Say what would be done, and what the files lack; read and write no weight.", "--dry-run")
    ] = False


def factory(shape: ModelOptions, paths: Sequence[Path]) -> Callable[[], nn.Module]:
    """Return what makes a model of the architecture that was named, or else that one of the files says.

    Raises:
        ValueError: If none was and none does, or one holds something else than a network.
    """
    for path in filter(Path.is_file, paths):
        kind = (files.description(path) or {}).get("kind", KIND)
        if kind != KIND:
            raise ValueError(f"{str(path)!r} is {with_article(kind)}, not a network.")
    if shape.entry is not None:
        raise ValueError("--entry is for files of torch.save that are read at once, not tensor by tensor.")
    if (called := shape.model) is not None:
        arguments = parse.settings(shape.model_arg)

        def make() -> nn.Module:
            return parse.make_model(called, arguments, None)
    else:
        if shape.model_arg:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        known = ((path, parse.enter_factory(path)) for path in filter(Path.is_file, paths))
        path, said = next(((path, said) for path, said in known if said is not None), (None, None))
        if path is None or said is None:
            for one in paths:
                tensor_files.TensorFiles(one)  # which says what is wrong with a file that is damaged
            raise ValueError("networks that are read tensor by tensor need --model, their architecture.")
        called, arguments = said
        shapes = {name: entry.shape for name, entry in tensor_files.TensorFiles(path).entries.items()}

        def make() -> nn.Module:
            return registry.rebuild(said, shapes, torch.float32)

    module, _, name = called.rpartition(":")  # by which results say what made them
    make.__module__, make.__qualname__ = module or models.__name__, name
    return make


def known(shape: ModelOptions, paths: Sequence[Path]) -> dict[str, Any]:
    """Return architecture and discovery as the library takes them."""
    return {"model": factory(shape, paths), **shape.how_to_discover()}


def matching(text: str | None) -> Any:
    """Return how to match weights.

    Raises:
        ValueError: If the method looks at more than weights.
    """
    chosen = None if text is None else parse.method(text)
    if chosen is not None and not hasattr(chosen, "match_weights"):
        raise ValueError(f"networks that are read tensor by tensor are aligned by --method weight, got {text!r}.")
    return chosen


def needed(out: Path | None) -> Path:
    """Return where to write.

    Raises:
        ValueError: If it was not said.
    """
    if out is None:
        raise ValueError("--out is missing, the file or folder to write.")
    return out


def planned(paths: Sequence[Path], shape: ModelOptions, progress: bool | None) -> None:
    """Print what would be done; the exit status is 1 if files lack something."""
    found = tensor_files.plan(list(paths), **known(shape, paths), progress=bars(progress))
    typer.echo(repr(found))
    if not found.is_ready:
        raise typer.Exit(1)


def recipe_of(context: typer.Context) -> Any:
    """Let what is written in the block hold the options of the command, as a recipe."""
    return provenance.recipe(as_recipe(context))


@grouped()
def interpolate(
    context: typer.Context,
    a: Model,
    b: Model,
    output: OutputOptions,
    out: Out = None,
    t: Annotated[float, typer.Option(help="Position on the line from a, 0, to b, 1.")] = 0.5,
    recipe: Recipe = None,
    progress: options.Progress = None,
) -> None:
    r"""Write the network at a point of the straight line between two models in files, as they are.

    Files of any size: no more than three tensors are in memory. A folder also gets a's
    configuration and tokenizer. Networks that were trained apart should be aligned first.

    For example:

        modeconn interpolate llama-a llama-b --t 0.3 --out llama-between --out-shard-size 2GB
    """
    with recipe_of(context):
        written = tensor_files.interpolate(a, b, needed(out), t=t, **output.settings(progress))
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


@grouped("entry")
def shuffle(
    context: typer.Context,
    a: Model,
    output: OutputOptions,
    shape: ModelOptions,
    plan: PlanOptions,
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Of the relabelling.")] = 0,
    permutation: Annotated[Path | None, typer.Option(help="File for the relabelling itself.")] = None,
    recipe: Recipe = None,
    progress: options.Progress = None,
) -> None:
    r"""Relabel the units of a network in files at random: the same function, which align has to find back.

    With --symmetries orthogonal units are also rotated, and gains of norms folded.

    For example:

        modeconn shuffle llama --model mine:llama --seed 1 --symmetries orthogonal --out shuffled
    """
    if plan.dry_run:
        planned([a], shape, progress)
        return
    with recipe_of(context):
        found = tensor_files.shuffle(a, needed(out), seed=seed, **known(shape, [a]), **output.settings(progress))
    if permutation is not None:
        found.permutation.save(permutation)
    typer.echo(f"{found.permutation!r}\nWrote {', '.join(map(str, filter(None, (found.path, permutation))))}")


@grouped("entry")
def verify(
    a: Model,
    b: Model,
    shape: ModelOptions,
    plan: PlanOptions,
    method: Annotated[str | None, typer.Option(help="weight[:KEY=VALUE,...], how b is relabelled.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Also run both on these: a safetensors file with one tensor, or keyword inputs by their names.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all numbers to this JSON file.")] = None,
    recipe: Recipe = None,
    progress: options.Progress = None,
) -> None:
    r"""Show that two networks in files are one function, by relabelling b until it is a, without running them.

    The exit status is 0 if they are one function, to rounding, and 1 if that was not shown: they may be one all the
    same, for the search is a local one. With --symmetries orthogonal units are also rotated, and gains folded.

    For example:

        modeconn verify llama shuffled --model mine:llama --symmetries orthogonal
    """
    if plan.dry_run:
        planned([a, b], shape, progress)
        return
    found = tensor_files.verify(
        a, b, method=matching(method), inputs=_inputs(inputs), **known(shape, [a, b]), progress=bars(progress)
    )
    if out is not None:
        found.to_json(out)
    typer.echo(repr(found))
    if out is not None:
        typer.echo(f"Wrote {out}")
    if not found.is_one_function:
        raise typer.Exit(1)


def _inputs(path: Path | None) -> Any:
    if path is None:
        return None
    held = tensor_files.TensorFiles(path)
    tensors = {name: held.read(name) for name in held.entries}
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


@grouped("entry")
def add_task(
    context: typer.Context,
    base: Model,
    tuned: Model,
    old_base: Model,
    output: OutputOptions,
    shape: ModelOptions,
    plan: PlanOptions,
    out: Out = None,
    scale: Annotated[float, typer.Option(help="How much of the change is added.")] = 1.0,
    method: Annotated[str | None, typer.Option(help="weight[:KEY=VALUE,...], how the old base is relabelled.")] = None,
    recipe: Recipe = None,
    progress: options.Progress = None,
) -> None:
    r"""Move what fine-tuning changed in one network to another that was trained apart.

    Writes base + scale * (tuned - old base), the latter two relabelled so that the old base agrees with the base.

    For example:

        modeconn add-task llama-b llama-a-tuned llama-a --model mine:llama --out llama-b-tuned
    """
    if plan.dry_run:
        planned([base, tuned, old_base], shape, progress)
        return
    how = {
        "scale": scale,
        "method": matching(method),
        **known(shape, [base, tuned, old_base]),
        **output.settings(progress),
    }
    with recipe_of(context):
        found = tensor_files.add_task(base, tuned, old_base, needed(out), **how)
    typer.echo(f"{found.permutation!r}\nWrote {found.path}")


def align(
    context: typer.Context,
    a: Path,
    b: Path,
    out: Path | None,
    out_a: Path | None,
    permutation: Path | None,
    method: str | None,
    shape: ModelOptions,
    stream: StreamOptions,
    progress: bool | None,
) -> None:
    """Align networks that are read tensor by tensor, as the command of that name was told."""
    if stream.dry_run:
        planned([a, b], shape, progress)
        return
    how = {"out_a": out_a, "method": matching(method), **known(shape, [a, b]), **stream.settings(progress)}
    with recipe_of(context):
        found = tensor_files.align(a, b, needed(out), **how)
    if permutation is not None:
        found.permutation.save(permutation)
    if out_a is None and found.permutation.spec.folds:
        typer.echo("b agrees with a whose gains are folded, too, which --out-a writes.", err=True)
    typer.echo(f"{found!r}\nWrote {', '.join(map(str, filter(None, (found.path, out_a, permutation))))}")


def merge(
    context: typer.Context,
    networks: Sequence[Path],
    out: Path | None,
    method: str,
    seed: int,
    weights: str | None,
    last: int | None,
    decay: float,
    shape: ModelOptions,
    stream: StreamOptions,
    progress: bool | None,
) -> None:
    """Merge networks that are read tensor by tensor, as the command of that name was told."""
    paths, shares = list(networks), numbers(weights)
    if last is not None or decay != 1:
        if shares is not None:
            raise ValueError("--weights says how each network counts, as --last and --decay do: give one or the other.")
        paths, shares = tensor_files.window(paths, last=last, decay=decay)
        told = [f"{path} {share:.3g}" for path, share in zip(paths, shares, strict=True)]
        typer.echo(f"Of these, with weights: {', '.join(told)}")
    if method == "none":
        if shape.model is not None:
            raise ValueError("--method none takes the mean of networks as they are, for which --model is not needed.")
        if stream.dry_run:
            raise ValueError("--dry-run says how networks are relabelled, and --method none leaves them as they are.")
        with recipe_of(context):
            written = tensor_files.average(paths, needed(out), weights=shares, **stream.settings(progress))
        typer.echo(f"Wrote {written}")
        return
    if stream.dry_run:
        planned(paths, shape, progress)
        return
    how = {
        "weights": shares,
        "method": matching(method),
        "seed": seed,
        **known(shape, paths),
        **stream.settings(progress),
    }
    with recipe_of(context):
        found = tensor_files.merge(paths, needed(out), **how)
    typer.echo(f"{found!r}\nWrote {found.path}")


def refuse_data(done: str, data: DataOptions, adversary: AdversaryOptions | None, *others: Any) -> None:
    """Raise a ValueError if networks that are read tensor by tensor are to be run."""
    attacked = adversary is not None and adversary.opponent() is not None
    if data.data is not None or attacked or any(one is not None for one in others):
        raise ValueError(
            f"networks that are read tensor by tensor are {done} by their weights, without data: leave out --data, "
            f"--adversary, --report, --start and --repair."
        )
    if data.device != "cpu":
        raise ValueError(f"networks that are read tensor by tensor are {done} on the CPU: leave out --device.")


def numbers(text: str | None) -> list[float] | None:
    """Return numbers that are written with commas between them.

    Raises:
        ValueError: If they are none.
    """
    if text is None:
        return None
    try:
        return [parse.number(one) for one in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights are numbers with commas between them, such as 2,1,1, got {text!r}.") from None
