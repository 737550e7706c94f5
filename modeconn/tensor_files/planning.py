"""What a command on files would do: groups, what files lack, bytes; no weight is read."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from modeconn.matching.blocks import LARGE
from modeconn.symmetry.groups import Group
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tensor_files.checkpoint import Architecture, Discovery, Factory, Lacks
from modeconn.tensor_files.reading import TensorFiles
from modeconn.tools.door import checked
from modeconn.tools.progress import bars
from modeconn.tools.shown import Shown


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What is known before any weight is read.

    Args:
        spec: The groups of units.
        files: For each model, its files and what they lack of the architecture.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    spec: PermutationSpec
    files: tuple[Lacks, ...]

    @property
    def is_ready(self) -> bool:
        """Whether all files hold the model."""
        return all(lacks.is_nothing for lacks in self.files)

    @property
    def num_bytes(self) -> int:
        """How many bytes the files hold together."""
        return sum(lacks.files.num_bytes for lacks in self.files)

    @property
    def working_bytes(self) -> int:
        """Bytes of what is largest in memory while matching: two tensors, and the costs of the largest group.

        Tensors are in single precision, and a third time while one is relabelled; where they are rotated or gains are
        folded also in double. Costs are in single precision, and twice in double.
        """
        sizes = [entry.num_bytes // entry.dtype.itemsize for one in self.files for entry in one.files.entries.values()]
        costs = [_num_costs(group) for group in self.spec.groups]
        for_each = 12 + 16 * (self.spec.has_rotations or bool(self.spec.folds))
        return for_each * max(sizes, default=0) + 20 * max(costs, default=0)

    def __repr__(self) -> str:
        lines = [repr(self.spec).replace("PermutationSpec(", "Plan(", 1)]
        for lacks in self.files:
            counts = Counter(entry.dtype for entry in lacks.files.entries.values())
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in counts.most_common())
            count, size = len(lacks.files.entries), lacks.files.num_bytes
            lines.append(f"{lacks.files.path}: {count} tensors, {size:,} bytes, {types}")
            lines += [f"  {what}" for what in lacks.told(limit=None)] or ["  holds the model"]
        lines.append(
            f"largest at one time: about {self.working_bytes:,} bytes, for two tensors and the costs of a group"
        )
        return "\n".join(lines)


def _num_costs(group: Group) -> int:
    units = math.prod(group.shape)
    return units * group.size if group.parents and units > LARGE else units**2


@checked
def plan(
    models: Sequence[str | os.PathLike[str]],
    *,
    model: Factory,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    progress: bool = False,
) -> Plan:
    """Look at models in files before they are aligned, merged or compared: no weight is read.

    Args:
        models: Safetensors files, folders of shards, or state dicts of ``torch.save``.
        model: A function that makes a model of the architecture, whose state dict has the names of the files. Its
            parameters are made one by one, and not kept.
        spec: What `modeconn.discover` found for this architecture. Default: it is discovered here.
        example_input: What the model takes; default: ``model().example_input()``, where the model has that method.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        progress: Whether to show progress bars.

    Returns:
        Groups, and everything that is missing, unexpected or of another shape.

    Raises:
        ValueError: If a file is damaged, or the model cannot be looked at.
        OSError: If a file is missing.
    """
    files = [TensorFiles(path) for path in models]
    architecture = Architecture(model)
    found = tuple(architecture.compared(one) for one in files)
    if files:
        architecture.take_whole_numbers(files[0])
    with bars(progress):
        groups = Discovery(spec, example_input, outputs, symmetries, untie).of(architecture.model, progress)
    return Plan(groups, found)
