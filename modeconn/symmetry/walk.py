"""What rules work with: tensors of the graph as axes, and the walk that they tell what they know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from modeconn.symmetry.axes import UNIT, Axis, Space
from modeconn.symmetry.kinds import PERMUTATION, Kind

if TYPE_CHECKING:
    from torch.fx import Node

Rule = Callable[..., Any]
"""``rule(walk, *args, **kwargs)``, see `modeconn.symmetry.rules`."""


@dataclass(frozen=True)
class Traced:
    """A tensor of the graph.

    Args:
        axes: One axis per dimension.
        node: The graph node that made it.
        points_into: For a tensor of positions (argmax), the axis they count: whoever reads them fixes it.
        only_summed: Dimensions along which it holds products of which nothing but their sum is read: it is the inside
            of a contraction, and no relabelling of the units acts on it.
    """

    axes: tuple[Axis, ...]
    node: Any = None
    points_into: Axis | None = None
    only_summed: frozenset[int] = frozenset()

    def without(self, *dims: int) -> list[Axis]:
        """Return the axes but for some dimensions."""
        drop = {dim % len(self.axes) for dim in dims}
        return [axis for dim, axis in enumerate(self.axes) if dim not in drop]

    def replace(self, changes: dict[int, Axis]) -> list[Axis]:
        """Return the axes with some dimensions exchanged."""
        changes = {dim % len(self.axes): axis for dim, axis in changes.items()}
        return [changes.get(dim, axis) for dim, axis in enumerate(self.axes)]


def traced_in(values: Any) -> list[Traced]:
    """Return every tensor in nested arguments."""
    if isinstance(values, Traced):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return [t for v in values for t in traced_in(v)] if isinstance(values, (list, tuple, type({}.values()))) else []


Role = Literal["contracted", "made", "bias", "added", "gain"]
"""What an operator does with a parameter along an axis: it sums over it, makes it, adds to what it makes, adds to
something else, or scales it."""


@dataclass(frozen=True)
class Use:
    """What one operator does with one parameter.

    Args:
        name: The parameter.
        role: What the axis is to the operator.
        axis: One of the axes of the parameter.
        bias: Which other parameter is added to the sums.
        reader: The operator.
        source: What it reads beside parameters.
    """

    name: str
    role: Role
    axis: Axis
    bias: str | None
    reader: Node
    source: Node | None


@dataclass(frozen=True)
class Gain:
    """A vector that scales each unit of an axis.

    Args:
        name: The parameter.
        offset: What is added to it first: 1 where it holds the gain less one.
        bias: A parameter that is added after it.
        before: The axis that it scales.
        after: The axis that comes out: the same units, if it can be folded.
        own: The axis of the vector, whose entries are all one if it is folded.
        node: The operator that scales.
    """

    name: str
    offset: float
    bias: str | None
    before: Axis
    after: Axis
    own: Axis
    node: Node


def module_of(node: Node, *, in_words: bool = False) -> str:
    """Return the name of the module in which an operator is called."""
    name = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][0]
    if not in_words:
        return name
    return f"in '{name}'" if name else "in the model itself"


def _only_axis(tensor: Traced) -> Axis:
    """Return the one axis of a vector, which may have others of one position."""
    return next((axis for axis in tensor.axes if axis != UNIT), UNIT)


class Walk(Space):
    """A space of atoms on its way through the graphs of a model, as rules see it: their first argument.

    Rules tell it what they know by the methods of `Space` and by `show` and `contract`.

    Attributes:
        shapes: The shapes of the outputs of the operator at hand.
        arguments: The arguments of the operator at hand, by their names in its schema.
        node: The operator at hand as a node of the graph; None inside of another one.
        gains: Vectors that scale an axis, in the order in which they were met.
        uses: What linear layers do with parameters, by the operator.
    """

    def __init__(self, top: Kind = PERMUTATION) -> None:
        super().__init__(top)
        self.gains: list[Gain] = []
        self.uses: dict[Node, list[Use]] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.arguments: dict[str, Any] = {}
        self.node: Node | None = None
        self._shown: set[tuple[Axis, ...]] = set()
        self._seen: list[Axis] = []  # contracted, so they matter though no output has them
        self._contracted: list[list[tuple[Node, Axis]]] = []  # one list for each graph
        self._told: list[tuple[Axis, Axis, Node]] = []  # rows, the groups that they belong to, and what says to which

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shapes[0]

    def show(self, axes: Iterable[Axis]) -> None:
        """Record a tensor that an operator forms inside."""
        self._shown.add(tuple(axes))

    def contract(self, tensor: Traced, axis: Axis) -> None:
        """Record that an operator sums over ``axis``, which is an axis of ``tensor`` or part of one: a tap."""
        if axis == UNIT:
            return
        self._seen.append(axis)
        if tensor.node is not None:
            self._contracted[-1].append((tensor.node, axis))

    def tell(self, rows: Axis, groups: Axis, by: Node) -> None:
        """Learn that the values of a node say which index of the axis ``groups`` each of some rows is of: both stay.

        So what belongs to a group may be relabelled on its own though a tensor has rows in its place.
        """
        if UNIT in (rows, groups):
            return
        for axis in (rows, groups):
            self.fix(axis, "grouped by number")
        for other_rows, other_groups, other in self._told:  # what the same values say is of the same rows and groups
            if (
                other is by
                and self.size(other_groups) == self.size(groups)
                and self.size(other_rows) == self.size(rows)
            ):
                self.unify(rows, other_rows)
                self.unify(groups, other_groups)
        self._told.append((rows, groups, by))

    @property
    def has_rotations(self) -> bool:
        """Whether larger groups than permutations are looked for."""
        return self._top is not PERMUTATION

    def parameter(self, tensor: Traced) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view of; None of all others."""
        return None

    def gain_of(self, tensor: Traced) -> tuple[str, float] | None:
        """Return a parameter, and the number that is added to it, if a tensor is nothing else; None of all others."""
        return None

    def is_vector(self, tensor: Traced) -> bool:
        """Whether a parameter, and each view of it that leads to a tensor, is one vector, whose order stays."""
        return False

    def summed_dims(self) -> frozenset[int]:
        """Return the dimensions of what the operator at hand makes over which all that read it take sums."""
        return frozenset()

    @property
    def is_in_place(self) -> bool:
        """Whether the operator at hand writes over one of its arguments."""
        return False

    def use(
        self, tensor: Traced, role: Role, axis: Axis, bias: Traced | None = None, source: Traced | None = None
    ) -> None:
        """Record what an operator does with a parameter along an axis: foldable gains are those that it can take up.

        Args:
            tensor: The parameter or a view of it; others are passed over.
            role: What the axis is to the operator.
            axis: One of the axes of the tensor.
            bias: What the operator adds to the sums, if it adds nothing else and pads nothing.
            source: What it reads beside parameters.
        """
        if not self.has_rotations or self.node is None:
            return
        name = self.parameter(tensor)
        if name is None and role == "gain":
            name, _ = self.gain_of(tensor) or (None, 0.0)
        if name is not None:
            added = None if bias is None or not self.is_vector(bias) else self.parameter(bias)
            self.uses.setdefault(self.node, []).append(
                Use(name, role, axis, added, self.node, None if source is None else source.node)
            )

    def scale(self, axis: Axis, gain: Traced, bias: Traced | None = None) -> Axis:
        """Return the axis after a vector of parameters has scaled it, and another one was added.

        Where the gain can be folded into layers before or after it, it leaves rotations; whether it can be is known
        when all of the model has been seen (`modeconn.symmetry.gains`).
        """
        known = self.gain_of(gain) if self.has_rotations and self.node is not None else None
        vectors = [tensor for tensor in (gain, bias) if tensor is not None]
        if known is None or (bias is not None and not (self.parameter(bias) and self.is_vector(bias))):
            for axis_of_vector in (_only_axis(tensor) for tensor in vectors):
                self.unify(axis, axis_of_vector)
            self.lower(axis, PERMUTATION, "scaled unit by unit")
            return axis
        after = self.free(self.size(axis))
        for other_place in [other for other in self.gains if (other.name, other.offset) == known]:
            self.unify(after, other_place.after)  # one norm at several places: all that read it take up one gain
        for tensor in vectors:
            self.use(tensor, "gain", after)
        if bias is not None:
            self.unify(after, _only_axis(bias))
        name_of_bias = None if bias is None else self.parameter(bias)
        self.gains.append(Gain(*known, name_of_bias, axis, after, _only_axis(gain), self.node))
        return after

    def values(self, tensor: Traced) -> torch.Tensor | None:
        """Return the entries of a small tensor that no weight and no input decides, None of all others.

        Rules that decide something by them say so by `rely_on`.
        """
        return None

    def rely_on(self, tensor: Traced, axis: Axis) -> None:
        """Note that an axis was told apart by the entries that `values` returned of a tensor."""

    def dtype(self, tensor: Traced) -> torch.dtype | None:
        """Return the type of a tensor of the graph."""
        return None if tensor.node is None else tensor.node.meta["val"].dtype
