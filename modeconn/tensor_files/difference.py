"""What tells two models in files apart, tensor by tensor."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modeconn.tensor_files.reading import TensorFiles
from modeconn.tools import provenance
from modeconn.tools.door import checked
from modeconn.tools.json_files import KIND, to_json
from modeconn.tools.progress import progress_bar
from modeconn.tools.shown import Shown
from modeconn.tools.table import table

_SHOWN = 10
_CHUNK = 1 << 20  # entries that are compared at a time


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """What tells two models in files apart.

    Args:
        largest: By name of a tensor that both have, the largest absolute difference of its entries; infinite if only
            one of both is finite in some entry.
        relative: By name, the Euclidean norm of the difference as a share of the norm of a's tensor.
        missing: Names that b lacks.
        unexpected: Names that only b has.
        mismatching: By name, both shapes where they differ.
    """

    largest: Mapping[str, float]
    relative: Mapping[str, float]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatching: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    made_by: ClassVar[Mapping[str, Any] | None] = None
    """How the result came about: call or command, versions."""

    @property
    def is_none(self) -> bool:
        """Whether both hold the same numbers under the same names."""
        return not (self.missing or self.unexpected or self.mismatching or any(self.largest.values()))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything as JSON; also write it to ``path`` if given."""
        record = {
            KIND: "Difference",
            "largest": dict(self.largest),
            "relative": dict(self.relative),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatching": {name: [list(shape) for shape in both] for name, both in self.mismatching.items()},
            **provenance.entry(self),
        }
        return to_json(record, path)

    def __repr__(self) -> str:
        differing = sorted((name for name, value in self.largest.items() if value), key=self.relative.__getitem__)
        lines = [f"Difference({len(self.largest)} tensors in both, {len(differing)} of them differ)"]
        if differing:
            rows = [
                [name, f"{self.largest[name]:.3g}", f"{self.relative[name]:.3g}"]
                for name in differing[: -_SHOWN - 1 : -1]
            ]
            lines.append(table(["", "largest", "relative"], rows))
        for what, names in (("missing in b", self.missing), ("only in b", self.unexpected)):
            if names:
                lines.append(f"{what}: {len(names)}, such as {names[0]}")
        if self.mismatching:
            name, (ours, theirs) = next(iter(self.mismatching.items()))
            lines.append(f"of other shapes: {len(self.mismatching)}, such as {name}, {ours} and {theirs}")
        return "\n".join(lines)


@checked
def difference(a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: bool = False) -> Difference:
    """Compare two models in files, one tensor of each in memory at a time.

    Args:
        a: A safetensors file, a folder of shards, or a state dict of ``torch.save``.
        b: Another one.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a file is damaged.
        OSError: If a file is missing.
    """
    first, second = TensorFiles(a), TensorFiles(b)
    missing, unexpected, mismatching = first.compared(second)
    left_out = {*missing, *mismatching}
    largest, relative = {}, {}
    for name in progress_bar([name for name in first.entries if name not in left_out], show=progress, desc="compare"):
        largest[name], relative[name] = _apart(first.read(name), second.read(name))
    shapes = {name: (first.entries[name].shape, second.entries[name].shape) for name in mismatching}
    return Difference(largest, relative, tuple(missing), tuple(unexpected), shapes)


def _apart(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest difference of entries, and the norm of all as a share of that of ``x``."""
    largest = squares = own = 0.0
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    for ours, theirs in zip(x.reshape(-1).split(_CHUNK), y.reshape(-1).split(_CHUNK), strict=True):
        if torch.equal(ours, theirs) or bool((ours.isnan() & theirs.isnan() | (ours == theirs)).all()):
            own += float(ours.to(wide).abs().square().sum())
            continue
        ours, theirs = ours.to(wide), theirs.to(wide)
        alike = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinite entries may be equal
        gap = (ours - theirs).abs().nan_to_num(math.inf, math.inf).masked_fill(alike, 0.0)
        largest = max(largest, float(gap.max()) or sys.float_info.min)  # whole numbers may differ by less than doubles
        squares += float(gap.square().sum())
        own += float(ours.abs().square().sum())
    share = math.sqrt(squares)
    return largest, share / math.sqrt(own) if own else (math.inf if share else 0.0)
