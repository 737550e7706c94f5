"""What discovery found, the groups of units that may be relabelled, and a relabelling: apply, compose, undo, keep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of, plain_tensors, untied_copy
from modeconn.network.weights import named_state
from modeconn.symmetry.axes import Axis, atoms_of
from modeconn.symmetry.explore import explore, own_rules
from modeconn.symmetry.findings import Findings, UnknownOperator
from modeconn.symmetry.gains import folded, from_plain, to_plain
from modeconn.symmetry.graph import ALL, Example
from modeconn.symmetry.groups import Group, groups_of, identity_perms, random_perms
from modeconn.symmetry.kinds import KINDS, ORTHOGONAL_ONES
from modeconn.symmetry.outputs import Outputs
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.report import SymmetryReport, some
from modeconn.symmetry.rules import RULES
from modeconn.symmetry.rules.operators import operator_of
from modeconn.symmetry.structure import Structure
from modeconn.symmetry.verify import verify
from modeconn.symmetry.walk import Rule
from modeconn.tools import files, provenance
from modeconn.tools.door import check, check_settings, checked, looked_at, shortened

FORMAT = 1
_LARGEST = 2**28  # units of a group, whose relabelling takes eight bytes each


@dataclass(frozen=True, repr=False, eq=False)
class PermutationSpec(Findings):
    """Every group of hidden units of a model that may be relabelled, and where each appears.

    Made by `modeconn.discover`; prints as a table.

    Attributes:
        structure: The algebra behind the groups.
        state: The axes of every saved parameter and floating buffer, by name.
        fixed: Why each of those axes is fixed, None where it moves, by name.
        unread: Parameters and buffers in neither graph; they stay as they are.
        unknown: Operators without a rule.
        traces: The exported graphs, eval mode first; empty for a loaded spec.
        outputs: Which outputs of the model count.
        one_path: Whether they were found on one run of the model, and so hold for the path that it took.
        costs_of_outputs: How many hidden units outputs but the first keep fixed, by output; empty for a loaded spec.
        symmetries: The largest kind of group that `modeconn.discover` was asked for.
        untied: Whether the groups are those of networks in which tied parameters have a tensor for each of their names.
        positions: Buffers and plain attributes by which units are read, by name, and the whole numbers that they hold.
            The groups are those of networks that hold the same.
        folds: Gains that are ones in the networks that the groups are of, and what takes them up.
        limited: Why the group on each axis that moves is no larger than it is, by name.
        freeze: What `modeconn.discover` was told to leave fixed.
        rules: The rules it was given; a loaded spec has those of modeconn, unless `load` was given others.
        own_rules: The operators for which these are not modeconn's, and the rules as ``module:name``.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    @classmethod
    def of(cls, findings: Findings) -> PermutationSpec:
        """Return what a walk through the graphs of a model found as a spec."""
        return cls(**vars(findings))

    # ---------------------------------------------------------------- reading

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order in which they first appear among the model's parameters."""
        return groups_of(self.structure, self.state)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer the spec knows."""
        return {name: tuple(map(self.structure.size, axes)) for name, axes in self.state.items()}

    @property
    def fixed_batch(self) -> str | None:
        """Why the groups were found for batches of the example's size alone; None if they hold for any.

        Where a batch size becomes a number on the way, as ``len(x)`` and ``.view(4, -1)`` make it (``x.shape[0]`` stays
        free), other sizes are looked at anew where they are needed. A spec that was loaded does not say it.
        """
        return next((trace.graph.why_batch_is_fixed for trace in self.traces if trace.graph.why_batch_is_fixed), None)

    @property
    def num_units(self) -> int:
        """The number of units that can move, each head's counted."""
        return sum(math.prod(group.shape) for group in self.groups)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of relabellings, those of groups that rotate left out."""
        return sum(group.log10_size for group in self.groups)

    @property
    def dimension(self) -> int:
        """The number of directions in which rotations can be moved a little; 0 if there are permutations alone."""
        return sum(group.dimension for group in self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; the groups are {', '.join(g.name for g in self.groups)}")

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, PermutationSpec) else NotImplemented

    __hash__ = None

    def __deepcopy__(self, memo: Any) -> PermutationSpec:
        return self  # nothing of it ever changes

    def __reduce__(self) -> Any:
        """Let a spec be pickled as it is saved, without its graphs; its own rules go by reference, as functions do."""
        rules = RULES if self.rules is None else self.rules
        own = {str(key): rule for key, rule in rules.items() if str(key) in self.own_rules}
        return _unpickled, (self.to_json(), own, self.outputs), provenance.entry(self)

    def __fingerprint__(self) -> str:
        """Return what tells one spec from another, as `modeconn.tools.fingerprint` asks: all but the graphs."""
        return self.to_json()

    def __repr__(self) -> str:
        count, units = len(self.groups), self.num_units
        head = f"PermutationSpec({count} group{'s' * (count != 1)}, {units:,} units{', of one path' * self.one_path})"
        width = max((len(g.name) for g in self.groups), default=0)
        sizes = max((len(str(g)) for g in self.groups), default=0)
        rows = [
            f"  {g.name:{width}}  {g!s:>{sizes}}  " + some([f"{name}[{dim}]" for name, dim in g.places])
            for g in self.groups
        ]
        return "\n".join([head, *rows])

    def report(self) -> SymmetryReport:
        """Return the groups, the size of the symmetry group, and what stayed fixed and why: prints, HTML, JSON."""
        return SymmetryReport.of(self.groups, self.shapes, self.fixed, self.unread, self.unknown, self.limited)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def trees(self) -> list[list[Group]]:
        """Return the groups in sets that can be relabelled one after another: a group and all that vary with it."""
        found: list[list[Group]] = []
        for group in sorted(self.groups, key=lambda g: len(g.parents)):
            names = {name for name, _ in group.parents if name}
            home = [tree for tree in found if names & {g.name for g in tree}]
            merged = [g for tree in home for g in tree] + [group]
            found = [tree for tree in found if tree not in home] + [merged]
        return found

    # ---------------------------------------------------------------- permutations

    def identity(self) -> Permutation | Orthogonal:
        """Return the relabelling that moves nothing."""
        return self.relabelling(identity_perms(self.groups))

    @looked_at
    def random(self, generator: torch.Generator | None = None) -> Permutation | Orthogonal:
        """Return a relabelling drawn uniformly, with a CPU ``generator``."""
        return self.relabelling(random_perms(self.groups, generator))

    @property
    def has_rotations(self) -> bool:
        """Whether some group rotates its units."""
        return any(group.rotates for group in self.groups)

    def relabelling(self, elements: Mapping[str, Tensor]) -> Permutation | Orthogonal:
        """Return what moves each group by its element: a `Permutation`, if no group rotates."""
        return (Orthogonal if self.has_rotations else Permutation)(self, elements)

    @property
    def prepares(self) -> bool:
        """Whether the groups are of networks with other weights than those that they are found in: see `prepared`."""
        return bool(self.folds or self.untied)

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model of which the groups hold: untied where they ask for it, its gains folded.

        Raises:
            ValueError: If a bias has to be divided by a gain that is zero or nearly.
        """
        self.check_model(model)
        twin = untied_copy(model) if self.untied else copy_of(model)
        if self.folds:
            given, folding = ({n: x for n, x in named_state(m) if n in self.state} for m in (model, twin))
            with torch.no_grad():
                for name, tensor in folded(given, self.folds):
                    folding[name].copy_(tensor)
        return twin

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError unless the model has the parameters, shapes and ties this spec was made for."""
        tensors = dict(named_state(model))
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"this spec is of another model: {type(model).__name__} has no '{name}'.")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"this spec is of another model: '{name}' has shape {tuple(tensors[name].shape)}, "
                    f"the spec was made for {shape}."
                )
        if self.tied is not None and not self.untied:
            self._check_ties(tensors)
        held = {**plain_tensors(model), **tensors} if self.positions else {}
        for name in self.positions:
            if name not in held:
                raise ValueError(f"this spec is of another model: it has no tensor '{name}', by which units were read.")
        self.check_positions(held)

    def check_positions(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise a ValueError if one of these tensors, by which units are read, holds other positions than it did."""
        for name, positions in self.positions.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.is_meta or tensor.flatten().tolist() == list(positions):
                continue
            raise ValueError(
                f"this spec is of another model: '{name}', by which units are read, holds other positions "
                f"than in the model that the spec was found in. Pass freeze=['{name}'] to discover, and align with "
                f"that spec: units that it tells apart then stay in place, and numbers that are read of it count as "
                f"alike."
            )

    def _check_ties(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise a ValueError if names are one tensor here that may move in different ways, as they were two before.

        Or if they were one before and are two here, of which gains would be folded into or out of the first alone.
        """
        known = {name: names for names in self.tied or () for name in names}
        folding = {name for fold in self.folds for name in fold.names}
        for names in self.tied or ():
            if set(names) & folding and len({id(tensors[name]) for name in names if name in tensors}) > 1:
                raise ValueError(
                    f"this spec is of another model: '{names[0]}' and '{names[1]}' are two tensors here, and were one "
                    f"in the model that it was found in. Discover this one anew."
                )
        first: dict[int, str] = {}
        for name in filter(tensors.__contains__, self.state):
            other = first.setdefault(id(tensors[name]), name)
            if other in known.get(name, (name,)):
                continue
            moves = any(self.structure.moving_atoms(axis) for one in (name, other) for axis in self.state[one])
            if moves or {name, other} & folding:
                raise ValueError(
                    f"this spec is of another model: '{other}' and '{name}' are one tensor here, and were two in the "
                    f"model that it was found in. Discover this one anew."
                )

    # ---------------------------------------------------------------- proof

    @checked
    def verify(self, model: nn.Module, example_input: Any = None, *, tolerance: float = 1e-9, seed: int = 0) -> float:
        """Prove the spec on a model: compare every tensor of its graphs with its predicted relabelling.

        All groups are relabelled at once, a few times, until every place has had another unit, and another one than
        in any other group of that size. Parameters and buffers are redrawn in float64 so that nothing is hidden by
        zeros or equal values; both modes run, without dropout; integers and truth values must agree exactly. A model
        that is not the one the spec was found in is exported anew, and must make the same steps.

        Args:
            model: The model the spec was made for.
            example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword
                inputs. Default: ``model.example_input()``, where the model has that method.
            tolerance: Largest difference of any entry, relative to the standard deviation of its tensor. A mistake
                shows as differences near 1, rounding in float64 as 1e-15: each operator is judged on exact inputs.
            seed: For the redrawn values and the relabelling.

        Returns:
            The largest relative difference met.

        Raises:
            VerificationError: With the first tensor that disagrees and the group behind it; or if the model fails, or
                makes nothing but NaN, on redrawn weights, so that nothing can be proved.
            ValueError: If the model is not the one the spec was found for, or has other groups on inputs of this shape.
        """
        return verify(self, model, example_input, tolerance=tolerance, seed=seed)

    def with_traces(self, model: nn.Module, example_input: Any = None) -> PermutationSpec:
        """Return the same spec with graphs that run on such inputs.

        A graph is of one length of sequences, or one size of images, and mostly of any batch size. A spec that was
        loaded has none, and one that was found with inputs of another shape has others: ``model`` is exported anew.

        Args:
            model: The model that the spec was found in.
            example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword
                inputs. Default: that of the graphs there are, else ``model.example_input()``, where the model has
                that method.

        Raises:
            ValueError: If discovery does not find the groups of this spec in the model with such inputs, or needs rules
                that the file did not hold.
        """
        is_of_another = self.one_path and any(trace.model() is not model for trace in self.traces)  # has its own path
        if not is_of_another and ((self.traces and example_input is None) or self.runs_on(example_input)):
            return self
        rules = RULES if self.rules is None else self.rules
        self._check_rules(rules)
        self.outputs.check_known()
        settings = (rules, self.freeze, self.outputs, self.symmetries, self.untied)
        fresh = PermutationSpec.of(explore(model, example_input, *settings))
        if fresh != self and not (self.traces and fresh._moves_as(self)):
            given = "with inputs of this shape" if self.traces else "now (another model or version)"
            if is_of_another:
                given = (
                    "on these inputs, where it is another model or takes another path than the one that was recorded"
                )
            raise ValueError(
                f"the spec is not what discover finds in this {type(model).__name__} {given}; run discover again, with "
                "an example input as the data have it."
            )
        return fresh

    def runs_on(self, example_input: Any) -> bool:
        """Whether the spec has graphs, and they run on inputs of these shapes."""
        return bool(self.traces) and all(trace.graph.takes(Example.of(example_input)) for trace in self.traces)

    def _moves_as(self, other: PermutationSpec) -> bool:
        """Whether the groups are those of another spec of this model, whatever numbers their atoms have."""
        return [replace(group, atom=0) for group in self.groups] == [replace(group, atom=0) for group in other.groups]

    def _check_rules(self, rules: Mapping[Any, Rule]) -> None:
        """Raise unless ``rules`` have rules of their own for the operators for which those of the discovery had."""
        odd = sorted(own_rules(rules).keys() ^ self.own_rules.keys())
        if odd:
            known = f"({self.own_rules[odd[0]]})" if odd[0] in self.own_rules else "(modeconn's own rule)"
            raise ValueError(
                f"the saved spec was found with another rule for {odd[0]} {known}, and files hold no rules. Pass "
                f"PermutationSpec.load(path, rules=), what discover was given."
            )

    # ---------------------------------------------------------------- files

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spec to a file, all or nothing; the graphs stay behind."""
        files.write(path, "spec", {}, {"spec": self.to_json(), **provenance.entry(self)})

    @classmethod
    @checked
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        rules: Mapping[Any, Rule] | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> PermutationSpec:
        """Read what `save` wrote. Every use checks it against the names and shapes of the model.

        Args:
            path: The file.
            rules: What `modeconn.discover` was given, which files do not hold; needed by methods that run the model.
            outputs: The function that `modeconn.discover` was given; files hold names of outputs, and no functions.

        Raises:
            ValueError: If the file is no spec that modeconn wrote, the rules are for other operators, or it was found
                with another function.
        """
        with files.opened(path, "spec") as (_, about):
            spec = cls.from_json(about["spec"])
        if rules is not None:
            spec._check_rules(rules)
            spec = replace(spec, rules=rules)
        if outputs is not None:
            spec = spec._with_outputs(outputs)
        provenance.keep(spec, about.get(provenance.ATTRIBUTE))
        return spec

    def _with_outputs(self, outputs: Callable[[Any], Any]) -> PermutationSpec:
        given = Outputs.of(outputs)
        if given.place != self.outputs.place:
            known = self.outputs.place or list(self.outputs.names) or "all of them"
            raise ValueError(f"the saved spec was found with the outputs {known}, not those of {given.place}.")
        return replace(self, outputs=given)

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
                "kinds": {str(a): structure.kind(a).name for a in structure.parents},
                "state": self.state,
                "fixed": self.fixed,
                "unread": self.unread,
                "freeze": self.freeze,
                "rules": dict(self.own_rules),
                "outputs": self.outputs.to_plain(),
                "one_path": self.one_path,
                "tied": self.tied,
                **self._beyond_permutations(),
                "unknown": [[u.operator, u.module, u.num_axes, u.num_units] for u in self.unknown],
            }
        )

    def _beyond_permutations(self) -> dict[str, Any]:
        """Return what versions that know permutations alone cannot read; empty where a spec has nothing of the kind."""
        if self.symmetries == "permutation" and not self.untied and not self.positions:
            return {}
        return {
            "format": FORMAT + 1,
            "positions": dict(self.positions),
            "symmetries": self.symmetries,
            "untied": self.untied,
            "folds": to_plain(self.folds),
            "limited": dict(self.limited),
        }

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Read what `to_json` wrote. It has no graphs: methods that run the model export it anew."""
        try:
            data = json.loads(text)
            if data["format"] not in (FORMAT, FORMAT + 1):
                raise ValueError(
                    f"the permutation spec has format {data['format']!r:.60}; this version reads {FORMAT} and "
                    f"{FORMAT + 1}."
                )
            structure = Structure(
                {int(a): n for a, n in data["sizes"].items()},
                {int(a): tuple(p) for a, p in data["parents"].items()},
                {int(a): (p, [_axis(m) for m in members]) for a, (p, members) in data["families"].items()},
                kinds={int(a): KINDS[name] for a, name in data.get("kinds", {}).items()},  # older files do not say it
            )
            state = {name: tuple(_axis(axis) for axis in axes) for name, axes in data["state"].items()}
            fixed = {name: tuple(why) for name, why in data["fixed"].items()}
            unknown = tuple(UnknownOperator(*u) for u in data["unknown"])
            freeze, rules = tuple(data.get("freeze", ())), data.get("rules", {})  # older files do not say it
            more = {"freeze": freeze, "own_rules": rules, "outputs": Outputs.from_plain(data.get("outputs"))}
            more["one_path"] = bool(data.get("one_path", False))
            more["symmetries"], more["untied"] = data.get("symmetries", "permutation"), bool(data.get("untied", False))
            tied = data.get("tied")  # older files do not say it
            more["tied"] = None if tied is None else tuple(tuple(map(str, names)) for names in tied)
            read_by = data.get("positions", {})
            more["positions"] = {str(name): tuple(map(int, held)) for name, held in read_by.items()}
            more["folds"] = from_plain(data.get("folds", ()))
            more["limited"] = {name: tuple(why) for name, why in data.get("limited", {}).items()}
            found = cls(structure, state, fixed, tuple(data["unread"]), unknown, **more)
            found._check_consistency()
            return found
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
            if isinstance(error, ValueError) and "spec" in str(error):
                raise
            raise ValueError(f"this is no permutation spec: {type(error).__name__} {shortened(error)}") from None

    def _check_consistency(self) -> None:
        """Raise unless what was read fits together, and the memory of a relabelling is what a model may need."""
        sizes = self.structure.sizes.values()
        if not all(type(size) is int and 0 <= size <= _LARGEST for size in sizes):
            raise ValueError(f"this is no permutation spec: an axis has a size out of 0..{_LARGEST}.")
        names = {**self.own_rules, **dict.fromkeys([*self.unread, *self.freeze])}
        if not all(isinstance(name, str) for name in [*names, *self.own_rules.values()]):
            raise ValueError("this is no permutation spec: its names are no texts.")
        for name, why in self.fixed.items():
            if len(why) != len(self.shapes[name]) or not all(one is None or isinstance(one, str) for one in why):
                raise ValueError(f"this is no permutation spec: it says of {name!r} what is fixed of other axes.")
        if any(math.prod(group.shape) > _LARGEST for group in self.groups):
            raise ValueError(f"this is no permutation spec: a group has more than {_LARGEST} units.")
        repr(self.report())  # a spec that cannot be shown holds something else than was written


def _unpickled(text: str, own: Mapping[str, Rule], outputs: Outputs = ALL) -> PermutationSpec:
    spec = replace(PermutationSpec.from_json(text), outputs=outputs)
    if not own:  # modeconn's rules; or a spec from a file, which knows but the names of the rules it was found with
        return spec
    kept = {key: rule for key, rule in RULES.items() if str(key) not in spec.own_rules}
    return replace(spec, rules=kept | {operator_of(name): rule for name, rule in own.items()})


@dataclass(frozen=True, eq=False, repr=False)
class Permutation(Relabelling):
    """One permutation per group of a spec.

    Unit ``perm[i]`` takes place ``i``: ``w.index_select(dim, perm)``, as a matrix ``P[i, perm[i]] = 1``. The units of a
    group with parents (a head, say) have one permutation for each place of the parents, ``perm`` of shape
    ``(*parent sizes, n)``, so that place ``(h, i)`` holds what was unit ``(perm_parent[h], perm[h, i])``.

    Args:
        spec: The groups.
        perms: By group name, int64 of the group's shape, on the CPU.

    Raises:
        ValueError: If a group is missing or unknown, or its ``perm`` is not a permutation of that group.
    """

    kind: ClassVar[str] = "permutation"

    spec: PermutationSpec
    perms: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_settings(self)
        _check_names(self.spec, self.perms, self.kind)
        for group in self.spec.groups:
            _check_perm(group, self.perms[group.name])

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers with their units moved; names that the spec does not know stay."""
        return self.spec.structure.relabel_all(tensors, self.spec.state, self.by_atom())

    def by_atom(self) -> dict[int, Tensor]:
        """Return the perms under the numbers that the spec's structure uses."""
        return {group.atom: self.perms[group.name] for group in self.spec.groups}

    def sources(self, name: str) -> Tensor:
        """Return the source of every unit of a group, blocks and units inside them numbered row-major, ``(N,)``."""
        group = self.spec[name]
        flat = torch.zeros(group.shape, dtype=torch.int64, device="cpu")
        for source, size in zip([*self._parent_sources(group), self.perms[name]], group.shape, strict=True):
            flat = flat * size + source
        return flat.flatten()

    def inverse(self) -> Permutation:
        """Return the relabelling that undoes this one."""
        return Permutation(self.spec, {g.name: self._inverse(g) for g in self.spec.groups})

    def _inverse(self, group: Group) -> Tensor:
        perm = self.perms[group.name]
        inverse = torch.empty_like(perm)
        inverse[(*self._parent_sources(group), perm)] = torch.arange(group.size, device="cpu").expand(group.shape)
        return inverse

    def after(self, first: Permutation) -> Permutation:
        """Return the relabelling that makes ``first`` and then this one."""
        return Permutation(
            self.spec,
            {g.name: first.perms[g.name][(*self._parent_sources(g), self.perms[g.name])] for g in self.spec.groups},
        )

    def _parent_sources(self, group: Group) -> list[Tensor]:
        """For each parent, which of its units stands at each place of the group, in shapes that broadcast."""
        return [source[..., None] for source in self.sources_of_parents(self.spec.structure, group)]

    def sources_of_parents(self, structure: Structure, group: Group) -> list[Tensor]:
        """For each parent, which of its units stands at each place of all parents, in shapes that broadcast."""
        by_atom = self.by_atom()
        parents = structure.parents[group.atom]
        here = [
            torch.arange(structure.sizes[p], device="cpu").view([-1 if d == i else 1 for d in range(len(parents))])
            for i, p in enumerate(parents)
        ]
        sources = []
        for i, parent in enumerate(parents):
            if parent in by_atom:
                above = [here[parents.index(p)] for p in structure.parents[parent]]
                sources.append(by_atom[parent][(*above, here[i])])
            else:
                sources.append(here[i])
        return sources

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation):
            return NotImplemented
        return self.perms.keys() == other.perms.keys() and all(
            torch.equal(perm, other.perms[name]) for name, perm in self.perms.items()
        )

    __hash__ = None

    @property
    def num_moved(self) -> int:
        """The number of units that are not in their own place."""
        return sum(int((perm != torch.arange(perm.shape[-1], device="cpu")).sum()) for perm in self.perms.values())

    def __repr__(self) -> str:
        groups = f"{len(self.perms)} group{'s' * (len(self.perms) != 1)}"
        return f"Permutation({groups}, {self.num_moved:,} of {self.spec.num_units:,} units moved)"

    @property
    def is_identity(self) -> bool:
        """Whether every unit is in its own place."""
        return self.num_moved == 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the perms by group name."""
        return dict(self.perms)

    @classmethod
    def restore(cls, spec: str, tensors: Mapping[str, Tensor]) -> Permutation:
        """Return the permutation of these perms, with its spec as JSON."""
        return cls(PermutationSpec.from_json(spec), tensors)


@dataclass(frozen=True, eq=False, repr=False)
class Orthogonal(Relabelling):
    """One element for each group of a spec that rotates units: orthogonal matrices, and permutations.

    A group of permutations has a ``perm`` as in `Permutation`. One that rotates has a matrix ``G`` for each place of
    its parents, ``(*parent sizes, n, n)``, so that place ``(h, i)`` holds the sum over ``j`` of ``G[h, i, j]`` times
    unit ``j`` of block ``perm_parent[h]``; where the spec says so, ``G`` keeps the vector of ones. Entries of weights
    are permuted as they are; rotations are computed in double precision and rounded to the model's precision, in which
    the relabelled network is the same function: of float32 weights, outputs differ by some 1e-5 of their size.

    Groups are those of networks whose gains are folded: `apply` folds them first, where they are not.

    Args:
        spec: The groups.
        elements: By group name, on the CPU: int64 of the group's shape, or float64 with one axis more.

    Raises:
        ValueError: If a group is missing or unknown, or its element is none of that group.
    """

    kind: ClassVar[str] = "orthogonal"

    spec: PermutationSpec
    elements: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_settings(self)
        _check_names(self.spec, self.elements, "relabelling")
        for group in self.spec.groups:
            (_check_rotation if group.rotates else _check_perm)(group, self.elements[group.name])

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers of a folded network relabelled; names the spec does not know stay."""
        return self.spec.structure.relabel_all(tensors, self.spec.state, self.by_atom())

    def by_atom(self) -> dict[int, Tensor]:
        """Return the elements under the numbers that the spec's structure uses."""
        return {group.atom: self.elements[group.name] for group in self.spec.groups}

    def inverse(self) -> Orthogonal:
        """Return the relabelling that undoes this one."""
        back = self._permuting().inverse().perms
        for group in self.spec.groups:
            if group.rotates:
                turned = self.elements[group.name].transpose(-1, -2)
                back[group.name] = self.blocks(group, turned, Permutation(self._frame(), self._perms(back)))
        return Orthogonal(self.spec, back)

    def after(self, first: Orthogonal) -> Orthogonal:
        """Return the relabelling that makes ``first`` and then this one."""
        own = self._permuting()
        found = own.after(first._permuting()).perms
        for group in self.spec.groups:
            if group.rotates:
                inner = self.blocks(group, first.elements[group.name], own)
                found[group.name] = nearest(group, self.elements[group.name] @ inner)
        return Orthogonal(self.spec, found)

    def _frame(self) -> PermutationSpec:
        """Return the spec of the groups that permute, which say where the blocks of the others lie."""
        structure = self.spec.structure
        parents = {a: p for a, p in structure.parents.items() if not self._rotates(a)}
        frozen = replace(self.spec, structure=replace(structure, parents=parents))
        vars(frozen)["groups"] = tuple(group for group in self.spec.groups if not group.rotates)
        return frozen

    def _rotates(self, atom: int) -> bool:
        return any(group.atom == atom and group.rotates for group in self.spec.groups)

    def _perms(self, elements: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {group.name: elements[group.name] for group in self.spec.groups if not group.rotates}

    def _permuting(self) -> Permutation:
        return Permutation(self._frame(), self.perms)

    @property
    def perms(self) -> dict[str, Tensor]:
        """The perms of the groups that are permuted, by name, as a `Permutation` has them."""
        return self._perms(self.elements)

    def blocks(self, group: Group, matrices: Tensor, moved: Permutation | None = None) -> Tensor:
        """Return the matrices of the blocks that take the places of a group's parents here, or as ``moved`` says."""
        sources = (moved or self._permuting()).sources_of_parents(self.spec.structure, group)
        return matrices[tuple(sources)] if sources else matrices

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Orthogonal):
            return NotImplemented
        return self.elements.keys() == other.elements.keys() and all(
            torch.equal(element, other.elements[name]) for name, element in self.elements.items()
        )

    __hash__ = None

    def angles(self) -> dict[str, Tensor]:
        """Return by how much each group that rotates turns its units: the angles of the eigenvalues of its matrices.

        Returns:
            By group name float64 ``(*parent sizes, n)``, from 0 (a direction that stays) to pi (one that is turned
            round), rising. Those of a matrix drawn at random lie evenly between.
        """
        turning = [group for group in self.spec.groups if group.rotates]
        found = {group.name: torch.linalg.eigvals(self.elements[group.name]).angle().abs() for group in turning}
        return {name: angles.sort(-1).values for name, angles in found.items()}

    def sources(self, name: str) -> Tensor | None:
        """Return which unit takes each place of a group, ``(N,)``; None of a group that rotates its units."""
        return None if self.spec[name].rotates else self._permuting().sources(name)

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, up to the rounding of matrices."""
        still = identity_perms(self.spec.groups)
        return all(torch.allclose(element, still[name], atol=1e-12) for name, element in self.elements.items())

    @property
    def num_moved(self) -> int:
        """The number of units, of groups that permute, that are not in their own place."""
        return self._permuting().num_moved

    def __repr__(self) -> str:
        rotating = [group for group in self.spec.groups if group.rotates]
        return f"Orthogonal({len(rotating)} groups that rotate, {len(self.elements) - len(rotating)} that permute)"

    def tensors(self) -> dict[str, Tensor]:
        """Return the elements by group name."""
        return dict(self.elements)

    @classmethod
    def restore(cls, spec: str, tensors: Mapping[str, Tensor]) -> Orthogonal:
        """Return the relabelling of these elements, with its spec as JSON."""
        return cls(PermutationSpec.from_json(spec), tensors)


def nearest(group: Group, matrices: Tensor) -> Tensor:
    """Return the elements nearest to products of elements, which drift by their rounding."""
    identity = torch.eye(group.size, dtype=matrices.dtype, device=matrices.device)
    return matrices @ (1.5 * identity - 0.5 * matrices.transpose(-1, -2) @ matrices)  # one step of Newton's method


def _check_rotation(group: Group, matrices: Tensor) -> None:
    check(f"elements[{group.name!r}]", matrices, Tensor)
    shape = (*group.shape, group.size)
    if matrices.dtype != torch.float64 or tuple(matrices.shape) != shape:
        raise ValueError(
            f"the element of group '{group.name}' must be float64 of shape {shape}, "
            f"got {str(matrices.dtype).removeprefix('torch.')} of shape {tuple(matrices.shape)}."
        )
    identity = torch.eye(group.size, dtype=torch.float64, device=matrices.device)
    if not bool(((matrices @ matrices.transpose(-1, -2) - identity).abs() < _ORTHOGONAL).all()):
        raise ValueError(f"the element of group '{group.name}' is not orthogonal: it changes lengths.")
    if group.kind is ORTHOGONAL_ONES and not bool(((matrices.sum(-1) - 1).abs() < _ORTHOGONAL).all()):
        raise ValueError(f"the element of group '{group.name}' does not keep the vector of ones, as layer norm asks.")


_ORTHOGONAL = 1e-8
"""Largest entry of ``G G^T - 1``."""


def _check_names(spec: PermutationSpec, elements: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError unless there is one element for each group of a spec, and no other."""
    names = {group.name for group in spec.groups}
    if names != elements.keys():
        unknown, missing = sorted(elements.keys() - names), sorted(names - elements.keys())
        if unknown:
            raise ValueError(f"group '{unknown[0]}' is no group of this spec.")
        raise ValueError(f"group '{missing[0]}' is missing from the {what}.")


def _check_perm(group: Group, perm: Tensor) -> None:
    check(f"perms[{group.name!r}]", perm, Tensor)
    if perm.dtype != torch.int64 or tuple(perm.shape) != group.shape:
        raise ValueError(
            f"permutation for group '{group.name}' must be int64 of shape {group.shape}, "
            f"got {str(perm.dtype).removeprefix('torch.')} of shape {tuple(perm.shape)}."
        )
    ordered = perm.sort(-1).values
    if not torch.equal(ordered, torch.arange(group.size, device="cpu").expand(group.shape)):
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        what = f"uses unit {int(twice[0])} twice" if len(twice) else f"uses unit {int(ordered.flatten()[-1])}"
        raise ValueError(
            f"permutation for group '{group.name}' {what}; it must contain each of 0..{group.size - 1} once."
        )


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
