"""The verbs: relabel networks in files, after another one or at random."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modeconn.matching.weight_matching import WeightMatching
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tensor_files.checkpoint import Checkpoint, Discovery, Factory, as_pair, opened
from modeconn.tensor_files.reading import narrowed
from modeconn.tensor_files.writing import SHARD_BYTES, check_target, write
from modeconn.tools.door import checked
from modeconn.tools.progress import bars
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown

_UNTIED, _TYPES = "tie_word_embeddings", ("dtype", "torch_dtype")  # keys of a config.json


@dataclass(frozen=True, repr=False)
class AlignedFiles(Shown):
    """A network in files whose units were brought under the names of another's.

    Args:
        path: Where b was written, relabelled: the same function as b.
        path_a: Where the network was written that it agrees with, a with its gains folded; None if it is a itself, or
            was not asked for.
        permutation: The relabelling of b.
        history: The inner product of the weights of both, step by step.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    path: Path
    path_a: Path | None
    permutation: Relabelling
    history: tuple[float, ...] = ()

    def __repr__(self) -> str:
        first, last = self.history[0], self.history[-1]
        return (
            f"AlignedFiles({str(self.path)!r}, {self.permutation!r}, inner product of weights {first:.4g} -> "
            f"{last:.4g} in {len(self.history) - 1} steps)"
        )


@checked
def align(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: Factory,
    out_a: str | os.PathLike[str] | None = None,
    method: WeightMatching | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> AlignedFiles:
    """Relabel the units of a network in files so that it agrees with another one, and write it: the same function.

    No network is ever in memory: the groups are found in the model without values, then weights are read one of each
    network at a time, as often as they are needed, and what is written is relabelled tensor by tensor. Beside these
    there are the products and costs of one group's units. The groups follow from the rules alone; prove them with
    `modeconn.PermutationSpec.verify` on a model of the same architecture that is small enough.

    Args:
        a: The reference: a safetensors file, a folder of shards, or a state dict of ``torch.save``.
        b: A network of the same architecture.
        out: For b relabelled: a file that ends in ``.safetensors``, or a folder, which also gets b's configuration and
            tokenizer.
        model: A function that makes a model of this architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept.
        out_a: For a with its gains folded, which b agrees with where groups rotate.
        method: How to match. Default: `modeconn.WeightMatching`.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            Default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`; a folder's ``config.json``
            then says that they are not tied.
        dtype: What tensors of floating point are written in; default: as they are in b.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` and ``out_a`` hold.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the files do not hold the model, all that differs is named; weights are not finite, or files are
            damaged.
        OSError: If a file is missing, or ``out`` cannot be written or exists.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836; with rotations, Theus et al., 2025,
        https://arxiv.org/abs/2506.22712
    """
    for target in filter(None, (out, out_a)):
        check_target(target, overwrite=overwrite, read=(a, b))
    if out_a is not None:
        _check_apart(a, b, out, out_a)
    discovery = Discovery(spec, example_input, outputs, symmetries, untie)
    (first, second), found = opened((a, b), model, discovery, progress=progress)
    with bars(progress), seeded(0, torch.device("cpu")):
        how = WeightMatching() if method is None else method
        match = how.match_weights(found, first.parameters, **as_pair(first, second))
    how_written = {"dtype": dtype, "shard_bytes": shard_bytes, "overwrite": overwrite, "progress": progress}
    if out_a is not None:
        written_as(out_a, first, None, **how_written)
    path = written_as(out, second, match.permutation, **how_written)
    return AlignedFiles(path, None if out_a is None else Path(out_a), match.permutation, match.history)


def _check_apart(a: Any, b: Any, out: Any, out_a: Any) -> None:
    """Raise a ValueError if one of what is written would take the place of what is read or written after it."""
    places = {name: Path(path).resolve() for name, path in (("a", a), ("b", b), ("out", out), ("out_a", out_a))}
    for name, other in (("out_a", "out"), ("out_a", "b"), ("out", "a")):
        if places[name] == places[other]:
            raise ValueError(f"{name}= and {other} are one place, {str(places[name])!r}. Choose another name.")


@dataclass(frozen=True, repr=False)
class ShuffledFiles(Shown):
    """A network in files whose units were relabelled at random.

    Args:
        path: Where it was written: the same function.
        permutation: The relabelling.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    path: Path
    permutation: Relabelling

    def __repr__(self) -> str:
        return f"ShuffledFiles({str(self.path)!r}, {self.permutation!r})"


@checked
def shuffle(
    a: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: Factory,
    seed: int = 0,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> ShuffledFiles:
    """Write a network in files with its units relabelled at random: the same function, which `align` must find back.

    Args:
        a: The network: a safetensors file, a folder of shards, or a state dict of ``torch.save``.
        out: A file that ends in ``.safetensors``, or a folder, which also gets a's configuration and tokenizer.
        model: A function that makes a model of this architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept.
        seed: Of the relabelling.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes; default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" reorders units, "orthogonal" also rotates them, see `modeconn.discover`. Where groups
            rotate, gains are folded.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        dtype: What tensors of floating point are written in; default: as they are in a.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the files do not hold the model: all that differs is named; or files are damaged.
        OSError: If a file is missing, or ``out`` cannot be written or exists.
    """
    check_target(out, overwrite=overwrite, read=(a,))
    discovery = Discovery(spec, example_input, outputs, symmetries, untie)
    (network,), found = opened((a,), model, discovery, progress=progress)
    drawn = found.random(torch.Generator().manual_seed(seed))
    how_written = {"dtype": dtype, "shard_bytes": shard_bytes, "overwrite": overwrite, "progress": progress}
    return ShuffledFiles(written_as(out, network, drawn, **how_written), drawn)


def written_as(
    out: str | os.PathLike[str],
    network: Checkpoint,
    relabelling: Relabelling | None,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    overwrite: bool,
    progress: bool,
) -> Path:
    """Write a network relabelled; without a relabelling, as it is with its gains folded."""
    entries = network.entries(dtype)

    def make(name: str) -> Tensor:
        return narrowed(name, network.relabelled(name, relabelling), entries[name].dtype)

    return write(
        out,
        entries,
        make,
        shard_bytes=shard_bytes,
        like=network.files,
        instead=configuration(network, dtype),
        overwrite=overwrite,
        progress=progress,
    )


def configuration(network: Checkpoint, dtype: torch.dtype | None) -> dict[str, str]:
    """Return files beside the weights that must say something else: that they are not tied, or of another type."""
    changed: dict[str, Any] = {}
    if network.is_untied:
        changed[_UNTIED] = False
    if dtype is not None:
        changed |= dict.fromkeys(_TYPES, str(dtype).removeprefix("torch."))
    found = {}
    for path in network.files.beside_weights():
        if path.name != "config.json" or not changed:
            continue
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found[path.name] = json.dumps(_with(told, changed), indent=2) + "\n"
    return found


def _with(told: Any, changed: Mapping[str, Any]) -> Any:
    """Return what a configuration says with other values for some of its keys, wherever it has them."""
    if isinstance(told, list):
        return [_with(one, changed) for one in told]
    if not isinstance(told, dict):
        return told
    return {key: changed[key] if key in changed else _with(value, changed) for key, value in told.items()}
