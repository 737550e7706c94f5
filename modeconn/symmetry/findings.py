"""What a walk through the graphs of a model finds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from modeconn.symmetry.axes import Axis
from modeconn.symmetry.gains import Fold
from modeconn.symmetry.graph import ALL, Graph
from modeconn.symmetry.outputs import Outputs
from modeconn.symmetry.structure import Structure

if TYPE_CHECKING:
    from torch.fx import Node


@dataclass(frozen=True)
class UnknownOperator:
    """An operator without a rule and what it cost."""

    operator: str
    module: str
    num_axes: int
    num_units: int

    def __str__(self) -> str:
        place = f"in '{self.module}'" if self.module else "in the model itself"
        axes = "axis stays" if self.num_axes == 1 else "axes stay"
        return f"{self.operator} ({place}); its {self.num_axes} {axes} fixed ({self.num_units} units)"


@dataclass(frozen=True)
class Tap:
    """A tensor at the point where some of its units are summed over.

    Args:
        node: The graph node that makes it.
        axis: The axis that is summed over, or the part of it.
    """

    node: Node
    axis: Axis


@dataclass(frozen=True)
class Trace:
    """One exported mode with the axes of every tensor in it.

    Args:
        graph: The graph.
        axes: By node, the axes of its output: a tuple, or a list of tuples for several outputs.
        taps: Where units are summed over.
        model: A weak reference to the model that was exported.
    """

    graph: Graph
    axes: dict[Node, Any]
    taps: tuple[Tap, ...]
    model: weakref.ref[nn.Module]


@dataclass(frozen=True)
class Findings:
    """All that is known of a model's symmetries once its graphs are walked.

    Args:
        structure: The atoms, and what may vary with what.
        state: The axes of every saved parameter and floating buffer, by name.
        fixed: Why each of those axes is fixed, None where it moves, by name.
        unread: Parameters and buffers in neither graph; they stay as they are.
        unknown: Operators without a rule.
        traces: The exported graphs, eval mode first.
        freeze: Patterns of names whose axes were to stay fixed.
        rules: The rules of the walk, None for those of modeconn.
        outputs: Which outputs of the model count; what is computed for others alone may change.
        one_path: Whether they were found on one run of the model, and so hold for the path that it took.
        costs_of_outputs: How many hidden units outputs but the first keep fixed, by output.
        symmetries: The largest kind of group that was looked for.
        untied: Whether the groups are those of networks in which tied parameters have a tensor for each of their names.
        tied: The names of each parameter that has several; None if that is not known.
        positions: Buffers and plain attributes by which units are read, by name, and the whole numbers that they hold.
            The groups are those of networks that hold the same.
        folds: Gains that are ones in the networks that the groups are of, and what takes them up.
        limited: Why the group on each axis that moves is no larger than it is, None where it is as large as it may be,
            by name; empty if nothing but permutations was looked for.
        own_rules: What these have in place of modeconn's, ``module:name`` by operator.
    """

    structure: Structure
    state: dict[str, tuple[Axis, ...]]
    fixed: dict[str, tuple[str | None, ...]]
    unread: tuple[str, ...] = ()
    unknown: tuple[UnknownOperator, ...] = ()
    traces: tuple[Trace, ...] = ()
    freeze: tuple[str, ...] = ()
    rules: Mapping[Any, Any] | None = None
    own_rules: Mapping[str, str] = field(default_factory=dict)
    outputs: Outputs = ALL
    one_path: bool = False
    costs_of_outputs: Mapping[str, int] = field(default_factory=dict)
    symmetries: str = "permutation"
    untied: bool = False
    tied: tuple[tuple[str, ...], ...] | None = None
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    limited: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
