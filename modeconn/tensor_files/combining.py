"""The verbs: combine several networks in files, as they are or with their units under common names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modeconn.matching.weight_matching import WeightMatching
from modeconn.network.batch_norm import norm_layers
from modeconn.network.weights import are_finite
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tensor_files.checkpoint import Checkpoint, Discovery, Factory, as_pair, in_one_precision, opened
from modeconn.tensor_files.reading import Entry, TensorFiles, in_dtype, narrowed, widened
from modeconn.tensor_files.relabelling import configuration
from modeconn.tensor_files.writing import SHARD_BYTES, check_target, write
from modeconn.tools.door import checked
from modeconn.tools.progress import bars, passing_bar
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn

_CHUNK = 1 << 20  # entries that are computed at a time


@checked
def average(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write the weighted mean of networks in files as they are, such as checkpoints of one run.

    Tensors of floating point are summed in single precision at least; all others are those of the first network, with a
    warning where others have others. A sum, a tensor that is added to it and a few megabytes are in memory. Networks
    that were trained apart should be merged, see `merge`.

    Args:
        models: Safetensors files, folders of shards, or state dicts of ``torch.save``, of the same names and shapes.
        out: A file that ends in ``.safetensors``, or a folder, which also gets the first one's configuration and
            tokenizer.
        weights: One for each network, which are divided by their sum; default: all alike. See `window`.
        dtype: What tensors of floating point are written in; default: as they are in the first network.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there is no network, they differ in names or shapes (all that differ are named), or weights are
            not one for each network or sum to nothing; or a file is damaged.
        OSError: If a file is missing, or ``out`` cannot be written or exists.
    """
    check_target(out, overwrite=overwrite, read=models)
    shares = shares_of(weights, len(models))
    first, *others = networks = [TensorFiles(path) for path in models]
    for other in others:
        first.check_like(other)
    first.warn_of_statistics("averaged")
    terms = [(network.read, share) for network, share in zip(networks, shares, strict=True)]
    entries = in_dtype(first.entries, dtype)
    beside = {"like": first}
    return _write_sum(out, entries, terms, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress, **beside)


@checked
def window(
    checkpoints: Sequence[str | os.PathLike[str]], *, last: int | None = None, decay: float = 1.0
) -> tuple[list[Path], list[float]]:
    r"""Return the last checkpoints of one run and their weights, :math:`w_k \propto \text{decay}^{\text{age}}`.

    Args:
        checkpoints: Of one run, in any order: they are sorted by the numbers in their names, so that ``step-900`` comes
            before ``step-1000``.
        last: How many to keep; default: all.
        decay: Weight of each beside the one after it, in (0, 1]; 1 weighs all alike.

    Returns:
        What `average` takes, the oldest first.

    Raises:
        ValueError: If there are fewer than ``last``, or the decay is out of range.

    Example:
        >>> window(["step-1000", "step-200", "step-900"], last=2, decay=0.5)[1]
        [0.5, 1.0]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay= must lie in (0, 1], got {decay}.")
    if last is not None and not 1 <= last <= len(checkpoints):
        raise ValueError(f"last= must lie in 1..{len(checkpoints)}, the number of checkpoints, got last={last}.")
    found = sorted(map(Path, checkpoints), key=_in_natural_order)[-(last or len(checkpoints)) :]
    return found, [decay**age for age in reversed(range(len(found)))]


def _in_natural_order(path: Path) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]


@dataclass(frozen=True, repr=False)
class MergedFiles(Shown):
    """The mean of several networks in files, once their units are under the same names.

    Args:
        path: Where it was written, with the first network's names.
        permutations: One for each network, by which it was relabelled; the first is the identity.
        history: The weighted sum of squared distances of the relabelled networks from their mean, as they came and
            after each step.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    path: Path
    permutations: tuple[Relabelling, ...]
    history: tuple[float, ...]

    def __repr__(self) -> str:
        return (
            f"MergedFiles({str(self.path)!r}, {len(self.permutations)} networks, squared distance from their mean "
            f"{self.history[0]:.4g} -> {self.history[-1]:.4g} in {len(self.history) - 1} steps)"
        )


@checked
def merge(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: Factory,
    weights: Sequence[float] | None = None,
    method: WeightMatching | None = None,
    num_rounds: int = 100,
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
) -> MergedFiles:
    r"""Bring networks in files under common names and write their mean (MergeMany, Git Re-Basin, algorithm 3).

    In each round every network, in random order, is aligned with the weighted mean of the others, until a round changes
    nothing. A step is taken only if it brings the networks closer. What `modeconn.merge_many` does in memory is done
    here with one tensor of each network at a time, which is read as often as it is needed.

    Args:
        models: Two or more networks of one architecture: safetensors files, folders of shards, or state dicts of
            ``torch.save``.
        out: A file that ends in ``.safetensors``, or a folder, which also gets the first one's configuration and
            tokenizer.
        model: A function that makes a model of this architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept.
        weights: Positive, one for each network, which are divided by their sum; default: all alike.
        method: How to match. Default: `modeconn.WeightMatching`.
        num_rounds: Stop after so many rounds at the latest.
        seed: For the order of the networks.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes; default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`. Where groups rotate, gains are folded first.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        dtype: What tensors of floating point are written in; default: as they are in the first network.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If there are fewer than two networks, files do not hold the model, or it has batch norm, whose
            statistics need data: merge such networks in memory.
        OSError: If a file is missing, or ``out`` cannot be written or exists.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836
    """
    check_target(out, overwrite=overwrite, read=models)
    if len(models) < 2:
        raise ValueError(f"there is nothing to merge in fewer than two networks, got {len(models)}.")
    if num_rounds < 0:
        raise ValueError(f"num_rounds must be at least 0, got num_rounds={num_rounds}.")
    shares = shares_of(weights, len(models))
    if min(shares) <= 0:
        raise ValueError(f"weights= must be positive where networks are aligned with their mean, got {list(weights)}.")
    discovery = Discovery(spec, example_input, outputs, symmetries, untie)
    networks, found = opened(models, model, discovery, progress=progress)
    _check_no_batch_norm(networks[0], "modeconn.merge_many(models, loader)")
    names = _CommonNames(networks, shares, found)
    how = WeightMatching() if method is None else method
    with bars(progress), seeded(seed, torch.device("cpu")):
        history = [names.spread(), *names.follow_the_others(how, num_rounds, seed)]
    back = names.permutations[0].inverse()
    permutations = tuple(back @ permutation for permutation in names.permutations)
    terms = [
        (_reader(network, permutation), share)
        for network, permutation, share in zip(networks, permutations, shares, strict=True)
    ]
    entries = networks[0].entries(dtype)
    beside = {"like": networks[0].files, "instead": configuration(networks[0], dtype)}
    path = _write_sum(out, entries, terms, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress, **beside)
    return MergedFiles(path, permutations, tuple(history))


@dataclass(frozen=True, repr=False)
class TaskFiles(Shown):
    """A network in files to which a task vector was added.

    Args:
        path: Where it was written.
        permutation: The relabelling that brought the task vector under the names of the network.
        history: The inner product of the weights of both bases, step by step.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    path: Path
    permutation: Relabelling
    history: tuple[float, ...]

    def __repr__(self) -> str:
        return f"TaskFiles({str(self.path)!r}, {self.permutation!r})"


@checked
def add_task(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    old_base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: Factory,
    scale: float = 1.0,
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
) -> TaskFiles:
    r"""Move what fine-tuning changed in one network to another one that was trained apart, and write that.

    .. math:: \theta = \theta_{\text{base}} + \text{scale} \cdot P (\theta_{\text{tuned}} - \theta_{\text{old base}})

    The relabelling ``P`` brings the old base's units under the names of the base's, by their weights. Where groups
    rotate, gains of all three are folded first.

    Args:
        base: The network that is changed: a safetensors file, a folder of shards, or a state dict of ``torch.save``.
        tuned: A network that was fine-tuned from ``old_base``.
        old_base: Of the same architecture.
        out: A file that ends in ``.safetensors``, or a folder, which also gets the base's configuration and tokenizer.
        model: A function that makes a model of this architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept.
        scale: How much of the change is added.
        method: How to match. Default: `modeconn.WeightMatching`.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes; default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        dtype: What tensors of floating point are written in; default: as they are in the base.
        shard_bytes: How large a shard of a folder may be.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If files do not hold the model, weights are not finite, or files are damaged.
        OSError: If a file is missing, or ``out`` cannot be written or exists.

    References:
        Ilharco et al., 2023, https://arxiv.org/abs/2212.04089
    """
    check_target(out, overwrite=overwrite, read=(base, tuned, old_base))
    discovery = Discovery(spec, example_input, outputs, symmetries, untie)
    networks, found = opened((base, tuned, old_base), model, discovery, progress=progress)
    new, changed, old = networks
    _check_no_batch_norm(new, "modeconn.align and modeconn.recalibrate")
    how = WeightMatching() if method is None else method
    with bars(progress), seeded(0, torch.device("cpu")):
        match = how.match_weights(found, new.parameters, **as_pair(new, old))
    terms = [
        (_reader(new, None), 1.0),
        (_reader(changed, match.permutation), scale),
        (_reader(old, match.permutation), -scale),
    ]
    beside = {"like": new.files, "instead": configuration(new, dtype)}
    written = {"shard_bytes": shard_bytes, "overwrite": overwrite, "progress": progress, **beside}
    return TaskFiles(_write_sum(out, new.entries(dtype), terms, **written), match.permutation, match.history)


def _check_no_batch_norm(network: Checkpoint, way_out: str) -> None:
    """Raise a ValueError if a sum of networks would need data for statistics of batch norm."""
    if norm_layers(network.model):
        raise ValueError(
            f"the mean of networks needs statistics of training data for batch norm. In memory, with data: {way_out}."
        )


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the shares of so many networks in their mean.

    Raises:
        ValueError: If there is no network, or weights are not one for each, or sum to nothing.
    """
    if not count:
        raise ValueError("there is no network: pass at least one.")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = sum(given)
    if len(given) != count or not 0 < abs(total) < float("inf"):
        raise ValueError(f"weights= must be {count} finite numbers that do not sum to zero, got {given}.")
    return [weight / total for weight in given]


class _CommonNames:
    """Networks in files on their way to common names.

    Attributes:
        permutations: By which they are relabelled now.
    """

    def __init__(self, networks: Sequence[Checkpoint], shares: Sequence[float], spec: PermutationSpec) -> None:
        self.permutations: list[Relabelling] = [spec.identity() for _ in networks]
        self._networks = networks
        self._shares = shares
        self._spec = spec
        self._readers = in_one_precision(*networks)

    def spread(self) -> float:
        """Return the weighted sum of squared distances from the mean."""
        names = passing_bar(self._networks[0].parameters, desc="measure", unit="tensor")
        return sum(map(self._spread_of, names)) * len(self._networks)

    def _spread_of(self, name: str) -> float:
        """Return what a parameter has of the spread: of x_i with shares w_i, sum w_i |x_i|^2 - |sum w_i x_i|^2.

        All are taken from the first, so that of equal networks nothing is left.
        """
        first = self._lying(0, name)
        total, squares = torch.zeros_like(first), 0.0
        for number in range(1, len(self._networks)):
            apart = self._lying(number, name).sub_(first)
            squares += self._shares[number] * _square(apart)
            total.add_(apart, alpha=self._shares[number])
            del apart
        return squares - _square(total)

    def _lying(self, number: int, name: str) -> Tensor:
        """Return a parameter of a network as it is relabelled now, which may be written over."""
        given = self._readers[number](name)
        relabelling = self.permutations[number]
        moved = given if relabelling.is_identity else relabelling.relabel({name: given})[name]
        return moved.clone() if moved is given else moved

    def _mean_of_others(self, number: int, name: str) -> Tensor:
        rest = 1 - self._shares[number]
        total: Tensor | None = None
        for other in (other for other in range(len(self._networks)) if other != number):
            moved = self._lying(other, name).mul_(self._shares[other] / rest)
            total = moved if total is None else total.add_(moved)
        return total

    def follow_the_others(self, method: WeightMatching, num_rounds: int, seed: int) -> Iterator[float]:
        """Align every network with the mean of the others, round after round; yield the spread after each step."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.spread()
        parameters, eps = self._networks[0].parameters, max(network.eps for network in self._networks)
        for _ in range(num_rounds):
            begin = spread
            for i in torch.randperm(len(self._networks), generator=generator).tolist():
                a, b = (_partial(read, i) for read in (self._mean_of_others, self._lying))
                step = method.match_weights(self._spec, parameters, a, b, eps=eps).permutation
                before = self.permutations[i]
                self.permutations[i] = step @ before
                now = self.spread()
                if now < (1 - 1e-6) * spread:
                    spread = now
                    yield now
                else:
                    self.permutations[i] = before
            if spread == begin:
                break


def _partial(read: Callable[[int, str], Tensor], number: int) -> Callable[[str], Tensor]:
    return lambda name: read(number, name)


def _square(x: Tensor) -> float:
    flat = x.reshape(-1)
    return sum(float(part.double().square().sum()) for part in flat.split(_CHUNK))


def _reader(network: Checkpoint, relabelling: Relabelling | None) -> Callable[[str], Tensor]:
    return lambda name: network.relabelled(name, relabelling)


def _write_sum(
    out: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    terms: Sequence[tuple[Callable[[str], Tensor], float]],
    **how: Any,
) -> Path:
    """Write the sum of tensors of several networks, each times its factor; whole numbers are those of the first."""
    kept: dict[str, None] = {}

    def make(name: str) -> Tensor:
        (read, share), *others = terms
        first = read(name)
        if not (first.is_floating_point() or first.is_complex()):
            if not all(torch.equal(first, other(name)) for other, _ in others):
                kept[name] = None
            return first
        if not others and share == 1:
            return narrowed(name, first, entries[name].dtype)
        total = first.to(widened(first.dtype), copy=True).mul_(share).contiguous()
        for other, factor in others:
            _add(total, other(name), factor)
        if not are_finite(total):
            raise ValueError(f"{name!r} became NaN or infinite: look for such weights in the networks.")
        return narrowed(name, total, entries[name].dtype)

    written = write(out, entries, make, **how)
    if kept:
        warn(
            f"{len(kept)} tensors of whole numbers differ, such as {next(iter(kept))!r}: those of the first were kept."
        )
    return written


def _add(total: Tensor, term: Tensor, factor: float) -> None:
    """Add a tensor times a factor, a part at a time: a wide copy of the whole would be as large as the sum."""
    for part, given in zip(total.view(-1).split(_CHUNK), term.reshape(-1).split(_CHUNK), strict=True):
        part.add_(given.to(total.dtype), alpha=factor)
