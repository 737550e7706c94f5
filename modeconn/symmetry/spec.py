"""What discovery found: the groups of units of a model that may be relabelled."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeconn.symmetry.axes import Axis, atoms_of
from modeconn.symmetry.graph import Graph
from modeconn.symmetry.structure import Structure
from modeconn.tools import files as checkpoint

if TYPE_CHECKING:
    from torch.fx import Node

    from modeconn.symmetry.permutation import Permutation
    from modeconn.symmetry.report import SymmetryReport

FORMAT = 1


@dataclass(frozen=True)
class Group:
    """Units that are relabelled together.

    Args:
        name: After the first module that makes them.
        atom: Their number in the spec's structure.
        size: How many they are.
        parents: Sizes of what their relabelling may vary with, by the name of the group, or "" for a fixed axis:
            ``{"attention": 12}`` for the units of a head, of which each head has its own relabelling.
        places: Where they appear: ``(parameter or buffer, dimension)``.
    """

    name: str
    atom: int
    size: int
    parents: tuple[tuple[str, int], ...]
    places: tuple[tuple[str, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this group's ``perm``."""
        return (*(size for _, size in self.parents), self.size)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of its relabellings."""
        return math.prod(self.shape[:-1]) * math.lgamma(self.size + 1) / math.log(10)

    def __str__(self) -> str:
        return " in each of ".join([f"{self.size} units", *(f"{n} {name or 'places'}" for name, n in self.parents)])


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


class VerificationError(ValueError):
    """A relabelling changed a tensor in another way than predicted: the spec is wrong for this model."""


@dataclass(frozen=True, repr=False, eq=False)
class PermutationSpec:
    """Every group of hidden units of a model that may be relabelled, and where each appears.

    Made by `modeconn.discover`; prints as a table.

    Attributes:
        structure: The algebra behind the groups.
        state: The axes of every saved parameter and floating buffer, by name.
        fixed: Why each of those axes is fixed, None where it moves, by name.
        unread: Parameters and buffers in neither graph; they stay as they are.
        unknown: Operators without a rule.
        traces: The exported graphs, eval mode first; empty for a loaded spec.
    """

    structure: Structure
    state: dict[str, tuple[Axis, ...]]
    fixed: dict[str, tuple[str | None, ...]]
    unread: tuple[str, ...] = ()
    unknown: tuple[UnknownOperator, ...] = ()
    traces: tuple[Trace, ...] = ()

    # ---------------------------------------------------------------- reading

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order in which they first appear among the model's parameters."""
        places = {atom: [] for atom in self.structure.parents}
        for name, axes in self.state.items():
            for dim, axis in enumerate(axes):
                for atom in self.structure.moving_atoms(axis):
                    places[atom].append((name, dim))
        order = {name: i for i, name in enumerate(self.state)}
        depth = {atom: len(parents) for atom, parents in self.structure.parents.items()}
        atoms = sorted(places, key=lambda a: (min((d > 0, order[name], d) for name, d in places[a]), depth[a], a))
        names = _unique_names([_module_of(places[atom]) for atom in atoms])
        by_atom = dict(zip(atoms, names, strict=True))
        return tuple(
            Group(
                name=by_atom[atom],
                atom=atom,
                size=self.structure.sizes[atom],
                parents=tuple((by_atom.get(p, ""), self.structure.sizes[p]) for p in self.structure.parents[atom]),
                places=tuple(places[atom]),
            )
            for atom in atoms
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer the spec knows."""
        return {name: tuple(map(self.structure.size, axes)) for name, axes in self.state.items()}

    @property
    def num_units(self) -> int:
        """The number of units that can move, each head's counted."""
        return sum(math.prod(group.shape) for group in self.groups)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of relabellings."""
        return sum(group.log10_size for group in self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; the groups are {', '.join(g.name for g in self.groups)}")

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, PermutationSpec) else NotImplemented

    __hash__ = None

    def __repr__(self) -> str:
        count, units = len(self.groups), self.num_units
        head = f"PermutationSpec({count} group{'s' * (count != 1)}, {units:,} units)"
        width = max((len(g.name) for g in self.groups), default=0)
        sizes = max((len(str(g)) for g in self.groups), default=0)
        rows = [
            f"  {g.name:{width}}  {g!s:>{sizes}}  " + "  ".join(f"{name}[{dim}]" for name, dim in g.places)
            for g in self.groups
        ]
        return "\n".join([head, *rows])

    def report(self) -> SymmetryReport:
        """Return the groups, the size of the symmetry group, and what stayed fixed and why: prints, HTML, JSON."""
        from modeconn.symmetry.report import SymmetryReport

        return SymmetryReport.of(self)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    # ---------------------------------------------------------------- permutations

    def identity(self) -> Permutation:
        """Return the relabelling that moves nothing."""
        from modeconn.symmetry.permutation import Permutation

        return Permutation(self, {g.name: torch.arange(g.size).expand(g.shape).contiguous() for g in self.groups})

    def random(self, generator: torch.Generator | None = None) -> Permutation:
        """Return a relabelling drawn uniformly, with a CPU ``generator``."""
        from modeconn.symmetry.permutation import Permutation

        return Permutation(
            self,
            {g.name: torch.rand(g.shape, generator=generator, dtype=torch.float64).argsort(-1) for g in self.groups},
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError unless the model has the parameters and shapes this spec was made for."""
        tensors = dict(_named_state(model))
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"this spec is of another model: {type(model).__name__} has no '{name}'.")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"this spec is of another model: '{name}' has shape {tuple(tensors[name].shape)}, "
                    f"the spec was made for {shape}."
                )

    # ---------------------------------------------------------------- proof

    def verify(self, model: nn.Module, example_input: Any = None, *, tolerance: float = 1e-9, seed: int = 0) -> float:
        """Prove the spec on a model: compare every tensor of its graphs with its predicted relabelling.

        All groups are relabelled at once, a few times, until every place has had another unit, and another one than
        in any other group of that size. Parameters and buffers are redrawn in float64 so that nothing is hidden by
        zeros or equal values; both modes run, without dropout; integers and truth values must agree exactly. A model
        that is not the one the spec was found in is exported anew, and must make the same steps.

        Args:
            model: The model the spec was made for.
            example_input: As for `modeconn.discover`.
            tolerance: Largest difference of any entry, relative to the standard deviation of its tensor. A mistake
                shows as differences near 1, rounding in float64 as 1e-15: each operator is judged on exact inputs.
            seed: For the redrawn values and the relabelling.

        Returns:
            The largest relative difference met.

        Raises:
            VerificationError: With the first tensor that disagrees and the group behind it; or if the model fails, or
                makes nothing but NaN, on redrawn weights, so that nothing can be proved.
            ValueError: If the model, or the shape of the input, is not the one the spec was found for.
        """
        from modeconn.symmetry.verify import verify

        return verify(self, model, example_input, tolerance=tolerance, seed=seed)

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spec to a file, all or nothing; the graphs stay behind."""
        checkpoint.write(path, "spec", {}, {"spec": self.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationSpec:
        """Read what `save` wrote. Every use checks it against the names and shapes of the model.

        Raises:
            ValueError: If the file is no spec that modeconn wrote.
        """
        return cls.from_json(checkpoint.read(path, "spec")[1]["spec"])

    def to_json(self) -> str:
        """Return everything but the graphs as JSON."""
        structure = self.structure
        kept = _closure(structure, [axis for axes in self.state.values() for axis in axes])
        return json.dumps(
            {
                "format": FORMAT,
                "sizes": {str(a): structure.sizes[a] for a in sorted(kept)},
                "parents": {str(a): list(p) for a, p in structure.parents.items()},
                "families": {str(a): [p, members] for a, (p, members) in structure.families.items() if a in kept},
                "state": self.state,
                "fixed": self.fixed,
                "unread": self.unread,
                "unknown": [[u.operator, u.module, u.num_axes, u.num_units] for u in self.unknown],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Read what `to_json` wrote. It has no graphs: methods that run the model export it anew."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"the permutation spec has format {data['format']}; this version reads {FORMAT}.")
            structure = Structure(
                {int(a): n for a, n in data["sizes"].items()},
                {int(a): tuple(p) for a, p in data["parents"].items()},
                {int(a): (p, [_axis(m) for m in members]) for a, (p, members) in data["families"].items()},
            )
            state = {name: tuple(_axis(axis) for axis in axes) for name, axes in data["state"].items()}
            fixed = {name: tuple(why) for name, why in data["fixed"].items()}
            unknown = tuple(UnknownOperator(*u) for u in data["unknown"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no permutation spec: {type(error).__name__} {error}") from None
        return cls(structure, state, fixed, tuple(data["unread"]), unknown)


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _module_of(places: Sequence[tuple[str, int]]) -> str:
    """Name a group after the module of the first tensor that has it as its first axis, else as any."""
    name = min(places, key=lambda place: place[1] > 0)[0]
    return name.rpartition(".")[0] or name


def _unique_names(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _closure(structure: Structure, axes: Sequence[Axis]) -> set[int]:
    """Return the atoms of axes, of their families' members and of their parents."""
    found: set[int] = set()
    todo = [atom for axis in axes for atom in atoms_of(axis)]
    while todo:
        atom = todo.pop()
        if atom in found:
            continue
        found.add(atom)
        todo += structure.parents.get(atom, ())
        if atom in structure.families:
            over, members = structure.families[atom]
            todo += [over, *(a for member in members for a in atoms_of(member))]
    return found


def _axis(data: Any) -> Axis:
    return tuple(tuple(f if isinstance(f, int) else _axis(f) for f in segment) for segment in data)
