"""The verb: prove that two networks in files are one function, without running them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.matching.weight_matching import WeightMatching
from modeconn.symmetry.graph import Example
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tensor_files.checkpoint import Checkpoint, Discovery, Factory, as_pair, opened
from modeconn.tools import provenance
from modeconn.tools.door import checked
from modeconn.tools.json_files import KIND, to_json
from modeconn.tools.progress import bars, progress_bar
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.table import table

_SHOWN = 5


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """Whether two networks in files are one function.

    Args:
        relative: By name of a tensor, the largest Euclidean norm, of all its slices at one index of one dimension, of
            what tells b, relabelled, from a, as a share of the norm of a's slice; along dimensions whose units are
            rotated, of the typical norm of slices. 1 for whole numbers that differ.
        allowed: By name, how much of it may be rounding. Zero where entries are moved as they are; where units are
            rotated or gains are folded, twice the distance from one to the next larger number in the precision of the
            tensor, and 64 times that in the precision in which rotations are found.
        permutation: The relabelling of b that was found.
        outputs: The largest difference of outputs on the inputs that were given, as a share of their standard
            deviation; None if there were none.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    relative: Mapping[str, float]
    allowed: Mapping[str, float]
    permutation: Relabelling
    outputs: float | None = None

    @property
    def is_one_function(self) -> bool:
        """Whether b, relabelled, is a up to rounding: then they are one function. If not, they may be one still."""
        return not self.differing

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the tensors that differ by more than rounding."""
        return tuple(name for name, value in self.relative.items() if not value <= self.allowed[name])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all numbers as JSON; also write it to ``path`` if given."""
        record = {
            KIND: "Verdict",
            "is_one_function": self.is_one_function,
            "relative": dict(self.relative),
            "allowed": dict(self.allowed),
            "outputs": self.outputs,
            **provenance.entry(self),
        }
        return to_json(record, path)

    def __repr__(self) -> str:
        largest = max(self.relative.values(), default=0.0)
        if self.is_one_function:
            rounding = f"to {largest:.1e} of each row's norm, its rounding" if largest else "to the bit"
            lines = [f"Verdict(one function: relabelled, b is a {rounding}; {self.permutation!r})"]
        else:
            worst = sorted(self.differing, key=self.relative.__getitem__)[: -_SHOWN - 1 : -1]
            rows = [[name, f"{self.relative[name]:.3g}", f"{self.allowed[name]:.1g}"] for name in worst]
            lines = [
                f"Verdict(not shown: {len(self.differing)} of {len(self.relative)} tensors differ from a's under the "
                f"best relabelling that was found, {self.permutation!r})",
                table(["", "relative", "allowed"], rows),
            ]
        if self.outputs is not None:
            lines.append(f"outputs differ by at most {self.outputs:.2g} of their standard deviation")
        return "\n".join(lines)


@checked
def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    model: Factory,
    method: WeightMatching | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    inputs: Any = None,
    progress: bool = False,
) -> Verdict:
    """Find out whether two networks in files are one function, by relabelling, without running them.

    If some relabelling of b gives the weights of a, they are one function on all inputs. It is looked for by weights;
    that none is found proves nothing, for the search is a local one, and networks can be one function in other ways.

    Args:
        a: A safetensors file, a folder of shards, or a state dict of ``torch.save``.
        b: Another one.
        model: A function that makes a model of this architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept; but for ``inputs``.
        method: How to match. Default: `modeconn.WeightMatching`.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes; default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs count, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        inputs: Also run both networks on these, one after the other in memory, in eval mode and in the precision of the
            model: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If files do not hold the model, weights are not finite, or files are damaged.
        OSError: If a file is missing.
    """
    discovery = Discovery(spec, example_input, outputs, symmetries, untie)
    (first, second), found = opened((a, b), model, discovery, progress=progress)
    how = WeightMatching() if method is None else method
    with bars(progress), seeded(0, torch.device("cpu")):
        match = how.match_weights(found, first.parameters, **as_pair(first, second))
    relative, allowed = {}, {}
    precision = max((network.precision for network in (first, second)), key=lambda dtype: torch.finfo(dtype).bits)
    held = [network.entries() for network in (first, second)]
    for name in progress_bar(list(held[0]), show=progress, desc="compare", unit="tensor"):
        x, y = first.relabelled(name, None), second.relabelled(name, match.permutation)
        relative[name] = _apart(x, y, first.turned_dims(name), precision)
        dtypes = [entries[name].dtype for entries in held]
        eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
        is_rounded = first.is_rounded(name) and eps > 0
        allowed[name] = 2 * eps + 64 * torch.finfo(precision).eps if is_rounded else 0.0
        del x, y
    differing = None if inputs is None else _outputs_apart(model, first, second, inputs, found)
    return Verdict(relative, allowed, match.permutation, differing)


def _apart(x: Tensor, y: Tensor, turned: Sequence[bool], precision: torch.dtype) -> float:
    """Return how far the slices of two tensors are apart: the largest share of the norm of the first one's slice.

    Slices are those at each index of each dimension, so that a row that differs is not lost in a large tensor. Along
    dimensions that are turned, rounding of one slice comes into others, and the share is that of their typical norm.
    """
    if x.shape != y.shape:
        return math.inf
    if torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all()):
        return 0.0
    if not x.is_floating_point():
        return 1.0
    gaps = (x.to(precision) - y.to(precision)).square_().nan_to_num_(math.inf, math.inf)
    own = x.to(precision).square()
    worst = 0.0 if x.dim() else float((gaps / own).sqrt())
    for dim, is_turned in enumerate(turned):
        others = [other for other in range(x.dim()) if other != dim]
        gap, norm = (z.sum(others).sqrt() if others else z.sqrt() for z in (gaps, own))
        norm = norm.square().mean().sqrt().expand_as(norm) if is_turned else norm
        worst = max(worst, float(torch.where(gap > 0, gap / norm, 0.0).max()))
    return worst


def _outputs_apart(model: Factory, first: Checkpoint, second: Checkpoint, inputs: Any, spec: PermutationSpec) -> float:
    """Return the largest difference of outputs that count, as a share of their standard deviation."""
    example = Example.of(inputs)
    made = [_outputs(network.loaded(model()), example, spec) for network in (first, second)]
    worst = 0.0
    for x, y in zip(*made, strict=True):
        gap, spread = (x - y).abs().max(), x.std(correction=0)
        worst = max(worst, float(gap / spread) if float(spread) else float(gap))
    return worst


def _outputs(network: nn.Module, example: Example, spec: PermutationSpec) -> list[Tensor]:
    with torch.no_grad():
        found = spec.outputs(network.eval()(*example.args, **example.kwargs))
    leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.double() for leaf in leaves if leaf.numel()]
