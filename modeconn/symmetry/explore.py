"""Walk the exported graphs of a model, operator by operator, and settle which of its axes may move."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from modeconn.network.copies import in_one_storage, untied_copy
from modeconn.network.weights import device_of, named_state
from modeconn.symmetry.axes import Axis, atoms_of, expand
from modeconn.symmetry.export import ExportError, export, whole_numbers
from modeconn.symmetry.findings import Findings, Tap, Trace, UnknownOperator
from modeconn.symmetry.gains import Fold, Known, judged
from modeconn.symmetry.graph import Example, Graph
from modeconn.symmetry.kinds import FIXED, LINEAR, ORTHOGONAL_ONES, PERMUTATION, SYMMETRIES, Kind, check_symmetries
from modeconn.symmetry.lower import decompose
from modeconn.symmetry.outputs import Outputs, Selection
from modeconn.symmetry.rules import RULES
from modeconn.symmetry.rules.elementwise import pointwise
from modeconn.symmetry.rules.operators import is_written, name_of
from modeconn.symmetry.rules.ties import SAME_ENTRIES
from modeconn.symmetry.structure import Structure, dependencies
from modeconn.symmetry.walk import Rule, Traced, Use, Walk, module_of, traced_in
from modeconn.tools.progress import passing_bar
from modeconn.tools.warn import warn

if TYPE_CHECKING:
    from torch.fx import Node


_VIEWS = frozenset(
    "t transpose permute view reshape _to_copy to clone contiguous detach alias mT numpy_T unsqueeze squeeze flatten "
    "type_as _unsafe_view lift_fresh_copy".split()
)
"""Operators that arrange the entries of a tensor in another way, and do nothing else with them."""

_ABOUT_SIZES = (
    "sym_",
    "_assert",
    "_check",
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "_linalg_check",
    "_has_compatible_shallow_copy",
)
"""Beginnings of the names of operators without tensors among their outputs, which say nothing of units."""


def explore(
    model: nn.Module,
    example_input: Any = None,
    rules: Mapping[Any, Rule] = RULES,
    freeze: Sequence[str] = (),
    outputs: Selection | Outputs = None,
    symmetries: str = "permutation",
    untie: bool = False,
) -> Findings:
    """Export a model in both modes, walk its graphs, and return what was found.

    Args:
        model: Any module that `torch.export` can export.
        example_input: What ``model(...)`` takes; default ``model.example_input()``.
        rules: Rule by operator.
        freeze: Names of parameters or buffers, or patterns, all of whose axes stay fixed.
        outputs: Which outputs count, for `Outputs.of`.
        symmetries: The largest kind of group that is looked for, see `SYMMETRIES`.
        untie: Whether tied parameters get a tensor for each of their names first.

    Raises:
        ValueError: If the model is none, does not run on the example, cannot be exported, a pattern matches nothing, or
            a rule is no function or for no operator.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        what = f"a {type(model).__name__}"
        raise ValueError(f"model must be an ordinary nn.Module, which torch.export can follow, got {what}.")
    _check_rules(rules)
    check_symmetries(symmetries)
    freeze = (freeze,) if isinstance(freeze, str) else tuple(map(str, freeze))
    example = example_for(model, example_input)
    model = untied_copy(model) if untie else model
    outputs = Outputs.of(outputs)
    graphs = [export(model, example, training=False, outputs=outputs, freeze=freeze)]
    try:
        graphs.append(export(model, example, training=True, outputs=outputs, freeze=freeze))
    except ExportError as error:
        warn(f"{error} The groups hold for eval mode only.")
    is_of_one_path = any(graph.is_recorded for graph in graphs)
    if is_of_one_path:
        warn(
            f"torch.export cannot follow {type(model).__name__}, so one run on the example input was recorded, and the "
            f"groups hold for the path that it takes. They hold on other paths too, as long as these read the same "
            f"units as numbers and treat the others alike."
        )
    walk = Exploration(
        model, rules, frozenset().union(*(graph.written_state for graph in graphs)), SYMMETRIES[symmetries]
    )
    walk.freeze(freeze)
    for graph in graphs:
        walk.run(graph)
    found = walk.finish()
    return replace(
        found,
        freeze=freeze,
        rules=rules,
        own_rules=own_rules(rules),
        outputs=outputs,
        one_path=is_of_one_path,
        symmetries=symmetries,
        untied=untie,
    )


def _check_rules(rules: Mapping[Any, Rule]) -> None:
    for key, rule in rules.items():
        is_operator = isinstance(key, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket))
        if not (is_operator or (isinstance(key, str) and "::" in key)):
            raise ValueError(
                f"rules must be by operator, such as torch.ops.aten.linear or 'library::name', got {key!r}."
            )
        if not callable(rule) or isinstance(rule, type):
            raise ValueError(f"the rule for {key} must be a function, got {rule!r}.")


def own_rules(rules: Mapping[Any, Rule]) -> dict[str, str]:
    """Return what ``rules`` have in place of those of modeconn, ``module:name`` by operator; "none" for nothing."""
    operators = [op for op in {**RULES, **rules} if rules.get(op) is not RULES.get(op)]
    return {str(op): _place(rules[op]) if op in rules else "none" for op in sorted(operators, key=str)}


def _place(rule: Rule) -> str:
    named = rule if hasattr(rule, "__qualname__") else type(rule)  # a functools.partial has no name
    return f"{named.__module__}:{named.__qualname__}"


def example_for(model: nn.Module, example_input: Any = None) -> Example:
    """Return the example input: the one given, else the model's own."""
    if example_input is None and hasattr(model, "example_input"):
        example_input = model.example_input()
    if example_input is None:
        raise ValueError(
            f"{type(model).__name__} has to be run once to see how its units connect: pass example_input=, a tensor "
            "(or tuple, or dict of keyword inputs) that the model accepts."
        )
    device, example = device_of(model), Example.of(example_input)
    if device.type != "meta":
        return example.to(device)
    return Example(*pytree.tree_map(_with_values, (example.args, example.kwargs))).to("cpu")


def _with_values(leaf: Any) -> Any:
    """Return zeros for an input on the meta device: a model without values is traced on the CPU, and never run."""
    is_sketch = isinstance(leaf, torch.Tensor) and leaf.is_meta
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu") if is_sketch else leaf


@dataclass
class _Unknown:
    """An operator without a rule, as it was met."""

    operator: str
    module: str
    axes: list[Axis] = field(default_factory=list)


class Exploration(Walk):
    """The walk through the graphs of one model, in all of its modes."""

    def __init__(
        self, model: nn.Module, rules: Mapping[Any, Rule], written: Collection[str] = (), top: Kind = PERMUTATION
    ) -> None:
        super().__init__(top if top is PERMUTATION else LINEAR)
        self._largest = top
        self._untouchable: dict[str, str] = {}  # parameters that nothing may be folded into, and why
        self._whole = whole_numbers(model)
        self._first_name: dict[str, str] = {}  # the first name of each tensor of the state, by all of its names
        self._aliases: dict[str, list[str]] = {}  # all names of each tensor of the state, by the first
        self._rules = rules
        self._model = weakref.ref(model)
        self._written = written  # buffers that some graph mutates must not be treated as constants
        self._graphs: list[Graph] = []
        self._values: list[dict[Node, Any]] = []
        self._unknown: list[_Unknown] = []
        self._shapes_only: set[Node] = set()  # nodes of whose values nothing is read
        self._of_values: set[int] = set()  # atoms whose size depends on values
        self._told_apart: list[tuple[Graph, Node, Axis]] = []  # axes, and the positions by which they were cut
        self._asked: list[tuple[str, Axis]] = []  # what outputs but the first fixed
        self.state = self._place_state(model)

    # ---------------------------------------------------------------- the walk

    def _place_state(self, model: nn.Module) -> dict[str, tuple[Axis, ...]]:
        """Give each axis of each parameter and saved floating buffer its own atom; tied tensors share theirs."""
        saved = set(model.state_dict(keep_vars=True))
        by_tensor: dict[int, tuple[Axis, ...]] = {}
        state, tensors, first = {}, {}, {}
        for name, tensor in named_state(model):
            if name in saved and (tensor.is_floating_point() or tensor.is_complex()):
                if id(tensor) not in by_tensor:
                    by_tensor[id(tensor)] = tuple(self.free(n) for n in tensor.shape)
                    tensors[id(tensor)] = tensor
                    first[id(tensor)] = name
                state[name] = by_tensor[id(tensor)]
                self._first_name[name] = first[id(tensor)]
                self._aliases.setdefault(first[id(tensor)], []).append(name)
        for tied in in_one_storage(tensors.values()):
            self._tie(tied, by_tensor)
            names = [first[id(tensor)] for tensor in tied]
            why = f"'{names[0]}' lies in one memory with '{names[1]}': untie=True gives each a copy of its own"
            self._untouchable.update(dict.fromkeys(names, why))
        return state

    def _tie(self, tensors: Sequence[torch.Tensor], axes: Mapping[int, tuple[Axis, ...]]) -> None:
        """Let tensors in one memory move alike: a matrix and its transpose too; those that overlap otherwise stay."""
        for one, other in combinations(tensors, 2):
            if not _overlap(one, other):
                continue
            places = [
                {step: axis for step, axis, n in zip(t.stride(), axes[id(t)], t.shape, strict=True) if n > 1}
                for t in (one, other)
            ]
            is_one = one.storage_offset() == other.storage_offset() and one.numel() == other.numel()
            if is_one and places[0].keys() == places[1].keys() and 0 not in places[0]:
                for step, axis in places[0].items():
                    if self.size(axis) == self.size(places[1][step]):
                        self.unify(axis, places[1][step])
                        continue
                    self.fix(axis, _OVERLAP)
                    self.fix(places[1][step], _OVERLAP)
                continue
            for axis in (*axes[id(one)], *axes[id(other)]):
                self.fix(axis, _OVERLAP)

    def freeze(self, patterns: Sequence[str]) -> None:
        """Fix parameters and buffers that match a name or pattern; of whole numbers, the units that are read by them.

        Of frozen ones `export` makes no value known, and units that are read by unknown positions are fixed.
        """
        for pattern in patterns:
            names = [name for name in self.state if fnmatch.fnmatchcase(name, pattern)]
            if not names and not any(fnmatch.fnmatchcase(name, pattern) for name in self._whole):
                raise ValueError(
                    f"freeze={pattern!r} matches no parameter or buffer. The model has {_some(self.state)}."
                )
            for name in names:
                for axis in self.state[name]:
                    self.fix(axis, "frozen by request")
                self._untouchable[self._first_name[name]] = f"'{name}' is frozen by request"

    def run(self, graph: Graph) -> None:
        """Walk one mode; what it constrains adds to what earlier modes did."""
        self._graphs.append(graph)
        self._contracted.append([])
        values: dict[Node, Any] = {}
        self._values.append(values)
        self._shapes_only |= _read_for_shapes(graph.nodes)
        for node in passing_bar(graph.nodes, desc=f"discover, {graph.mode} mode", unit="operator"):
            if node.op == "placeholder":
                values[node] = self._placeholder(node, graph)
            elif node in self._shapes_only:
                values[node] = Traced(tuple(self.free(_hint(n)) for n in node.meta["val"].shape))
            else:  # get_attr: the body of a branch or loop
                values[node] = self._visit(node, values) if node.op == "call_function" else None
        first = next(iter(graph.outputs.values()), "")
        for node in sorted(graph.nodes, key=lambda node: graph.outputs.get(node.name) != first):
            if node.name in graph.outputs and isinstance(values.get(node), Traced):
                self._fix_output(values[node], graph.outputs[node.name], first)

    def _fix_output(self, output: Traced, name: str, first: str) -> None:
        """Fix an output; units that the first one leaves free and that a later layer reads are told of."""
        if name != first:
            self._asked.extend((name, axis) for axis in output.axes if not self.is_fixed(axis))
        why = "output" if name == first else f"output {name!r}"
        self._fix_all([output], why)
        self._fix_positions([output], why)

    def _placeholder(self, node: Node, graph: Graph) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value
        source = graph.state.get(node.name)
        if source is None:
            axes = [self.fixed(n, "input") if isinstance(n, int) else self.batch(_hint(n)) for n in value.shape]
        elif source.name in self.state and source.kind != "constant":
            axes = self.state[source.name]
        else:
            known = None if source.name in self._written else graph.constant(source)
            axes = [
                self.free(_hint(n)) if _equal_along(known, dim) else self.fixed(_hint(n), f"constant '{source.name}'")
                for dim, n in enumerate(value.shape)
            ]
            for axis in axes if known is not None and known.device.type != "meta" and bool(known.any()) else ():
                self.lower(axis, ORTHOGONAL_ONES, f"the constant '{source.name}' is the same for all of its units")
        return Traced(tuple(axes), node)

    def _visit(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """Return what a node makes, in terms of axes."""
        from torch.fx.node import map_aggregate

        args, kwargs = (
            _concrete(map_aggregate(a, lambda n: values[n] if isinstance(n, torch.fx.Node) else n))
            for a in (node.args, node.kwargs)
        )
        outputs = [out for out in _leaves(node.meta.get("val")) if isinstance(out, torch.Tensor)]
        if getattr(node.target, "__name__", "") == "getitem":
            item = args[0][args[1]]
            return Traced(item.axes, node, item.points_into) if isinstance(item, Traced) else item
        given, rule = traced_in((args, kwargs)), self._rule_for(node.target)
        self.arguments = _bind(node.target, args, kwargs)
        self.node = node if node.graph is self._graphs[-1].nodes[-1].graph else None
        own = traced_in(self.arguments.get(getattr(rule, "reads_positions", "")))
        counted = None
        if name_of(node.target) in SAME_ENTRIES and len(given) == 1:  # another reading of positions is one of positions
            own, counted = given, given[0].points_into
        self._fix_positions([t for t in given if t not in own], "its positions are read as numbers")
        self.shapes = [tuple(map(_hint, out.shape)) for out in outputs]
        if not outputs:
            packet = getattr(node.target, "overloadpacket", None)  # None for sums and products of sizes
            says_nothing = packet is None or packet.__name__.startswith(_ABOUT_SIZES)
            if not says_nothing and not all(self.is_fixed(axis) for tensor in given for axis in tensor.axes):
                self._unknown_operator(node, (args, kwargs))
            return _concrete(node.meta.get("val"))
        result = None
        if not any((*(t.axes for t in given), *self.shapes)):
            result = [[] for _ in outputs] if len(outputs) > 1 else []  # numbers have no axes
        elif rule is not None and (getattr(rule, "reads_shapes", False) or not _unknown_numbers((args, kwargs))):
            result = rule(self, *args, **kwargs)
        is_by_rule = result is not None
        if result is None:
            self._fix_positions(given, "its positions are read as numbers")
            result = self._visit_parts(node, args, kwargs)
        if result is None and rule is not None and _unknown_numbers((args, kwargs)):
            result = self._fixed_by_values(node, given)
        if result is None:
            result = self._unknown_operator(node, (args, kwargs))
        made = self._outputs(node, result, counted)
        if self.has_rotations and is_by_rule:
            self._leave(node, given, rule, made, outputs)
        return made

    def _leave(self, node: Node, given: Sequence[Traced], rule: Rule | None, made: Any, outputs: Sequence[Any]) -> None:
        """Lower all axes of an operator to what its rule says that it leaves; numbers of units have no directions."""
        kind = getattr(rule, "leaves", PERMUTATION)
        if not all(out.is_floating_point() for out in outputs):
            kind = PERMUTATION
        name = _called(node)
        why = f"{name} acts on each unit by itself" if rule is pointwise else f"{name} has no rule for rotations"
        for tensor in () if kind is LINEAR else (*given, *traced_in(_leaves(made))):
            for axis in tensor.axes:
                self.lower(axis, kind, why)

    def parameter(self, tensor: Traced) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view of; None of all others."""
        return None if tensor.node is None else self._parameter_at(tensor.node)

    def _parameter_at(self, node: Node) -> str | None:
        while _is_view(node):
            node = node.args[0]
        source = self._graphs[-1].state.get(node.name) if node.op == "placeholder" else None
        if source is None or source.kind != "parameter" or source.name not in self.state:
            return None
        return self._first_name[source.name]

    def gain_of(self, tensor: Traced) -> tuple[str, float] | None:
        """Return a parameter, and the number that is added to it, if a tensor is nothing else; None of all others."""
        node, offset = tensor.node, 0.0
        while node is not None and node.op == "call_function":
            name, args = name_of(node.target), node.args
            if not _is_vector(node.meta["val"]):
                return None
            if _is_view(node):
                node = args[0]
            elif name == "add" and not node.kwargs and sum(isinstance(arg, (int, float)) for arg in args) == 1:
                number, node = args if isinstance(args[0], (int, float)) else args[::-1]
                offset += number
            else:
                return None
        name = None if node is None or not _is_vector(node.meta["val"]) else self._parameter_at(node)
        return None if name is None else (name, offset)

    def is_vector(self, tensor: Traced) -> bool:
        """Whether a parameter, and each view of it that leads to a tensor, is one vector, whose order stays."""
        node = tensor.node
        while node is not None and _is_view(node):
            if not _is_vector(node.meta["val"]):
                return False
            node = node.args[0]
        return node is not None and _is_vector(node.meta["val"])

    def summed_dims(self) -> frozenset[int]:
        """Return the dimensions of what the operator at hand makes over which all that read it take sums."""
        if self.node is None or self.is_in_place or self.node.name in self._graphs[-1].outputs:
            return frozenset()
        rank, found = len(self.shape), None
        for user in self.node.users:
            if name_of(user.target) not in ("sum", "mean") or user.args[:1] != (self.node,):
                return frozenset()
            dims = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
            dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
            here = frozenset(dim % rank for dim in dims)
            found = here if found is None else found & here
        return found or frozenset()

    @property
    def is_in_place(self) -> bool:
        """Whether the operator at hand writes over one of its arguments."""
        schema = getattr(getattr(self.node, "target", None), "_schema", None)
        return schema is None or schema.is_mutable

    def _visit_parts(self, node: Node, args: Any, kwargs: Any) -> list[Traced] | None:
        """Walk the simpler operators that one without a rule consists of; None if it does not consist of any."""
        parts = decompose(node)
        if parts is None:
            return None
        placeholders = iter(traced_in((args, kwargs)))
        values: dict[Node, Any] = {}
        for part in parts.nodes:
            if part.op == "placeholder":
                values[part] = next(placeholders)
            elif part.op == "call_function":
                part.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
                values[part] = _without_node(self._visit(part, values))
        self.shapes = [tuple(map(_hint, out.shape)) for out in _leaves(node.meta["val"])]
        return [values[out] for out in _leaves(parts.output_node().args[0])]

    def values(self, tensor: Traced) -> torch.Tensor | None:
        """Return the entries of a small tensor that no weight and no input decides, None of all others."""
        return None if tensor.node is None else self._graphs[-1].known(tensor.node)

    def rely_on(self, tensor: Traced, axis: Axis) -> None:
        """Note that an axis was told apart by the entries that `values` returned of a tensor."""
        if tensor.node is not None:
            self._told_apart.append((self._graphs[-1], tensor.node, axis))

    def _rule_for(self, target: Any) -> Rule | None:
        packet = getattr(target, "overloadpacket", None)
        name = getattr(packet, "_qualified_op_name", None)
        if isinstance(target, torch._ops.HigherOrderOperator):
            name = f"higher_order::{target.name()}"
        for key in (target, packet, name):
            if key in self._rules:
                return self._rules[key]
        name = getattr(packet, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__")
        plain = getattr(torch.ops.aten, name.rstrip("_"), None) if is_in_place else None
        if plain in self._rules:  # the rule of the ordinary operator
            return self._rules[plain]
        tags = getattr(target, "tags", ())
        if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
            return pointwise
        if is_in_place:
            overloads = [getattr(plain, overload) for overload in plain.overloads()] if plain else []
            if any(torch.Tag.pointwise in overload.tags for overload in overloads):
                return pointwise
        return None

    def _fixed_by_values(self, node: Node, given: Sequence[Traced]) -> list[list[Axis]]:
        """Fix what an operator reads at a place, or in a size, that is a number that values decide."""
        why = f"read by {_called(node)} where values say"
        self._fix_all(given, why)
        return [[self.fixed(n, why) for n in shape] for shape in self.shapes]

    def _unknown_operator(self, node: Node, arguments: Any) -> list[list[Axis]]:
        known = _Unknown(_name_of(node.target), module_of(node))
        for tensor in traced_in(arguments):
            known.axes += [axis for axis in tensor.axes if not self.is_fixed(axis)]
        why = f"read by {known.operator}, which has no rule"
        self._fix_all(traced_in(arguments), why)
        self._unknown.append(known)
        return [[self.fixed(n, why) for n in shape] for shape in self.shapes]

    def _fix_all(self, tensors: Iterable[Traced], why: str) -> None:
        for tensor in tensors:
            for axis in tensor.axes:
                self.fix(axis, why)

    def _fix_positions(self, tensors: Iterable[Traced], why: str) -> None:
        """Fix the axes that tensors of positions count, since someone reads these."""
        for tensor in tensors:
            if tensor.points_into is not None:
                self.fix(tensor.points_into, why)

    def _outputs(self, node: Node, result: Any, counted: Axis | None = None) -> Any:
        """Check and record what a rule returned, in the structure that the node has; positions that count an axis."""
        single = isinstance(node.meta["val"], torch.Tensor)
        given = result if result and isinstance(result[0], (list, Traced)) else [result]
        traced = [t if isinstance(t, Traced) else Traced(tuple(t)) for t in given]
        traced = [Traced(t.axes, node if single else None, t.points_into or counted, t.only_summed) for t in traced]
        for out, tensor in zip(_leaves(node.meta["val"]), traced, strict=False):
            self._fix_sizes_of_values(out, tensor)
        made = [out for out in _leaves(node.meta["val"]) if isinstance(out, torch.Tensor)]
        traced = [self._in_sizes(tensor, out) for tensor, out in zip(traced, made, strict=True)]
        for tensor, shape in zip(traced, self.shapes, strict=True):
            if tuple(map(self.size, tensor.axes)) != shape:
                raise ValueError(
                    f"the symmetry rule for {node.target} returned axes of "
                    f"{tuple(map(self.size, tensor.axes))} positions for an output of shape {shape}."
                )
            self.show(tensor.axes)
        return traced[0] if single else traced

    def unify(self, x: Axis, y: Axis) -> None:
        """Learn that two axes are relabelled alike; if their size depends on values, it may be written in two ways."""
        if self.size(x) != self.size(y) and self._of_values & {*atoms_of(self.normal(x)), *atoms_of(self.normal(y))}:
            self.fix(x, _AS_MANY)
            self.fix(y, _AS_MANY)
            return
        super().unify(x, y)

    def _in_sizes(self, tensor: Traced, out: torch.Tensor) -> Traced:
        """Return a tensor with its axes in the sizes of another, where these depend on values and read differently."""
        axes = []
        for axis, size in zip(tensor.axes, out.shape, strict=True):
            by_values = is_unknown(size) or self._of_values.intersection(atoms_of(self.normal(axis)))
            if by_values and self.size(axis) != _hint(size):
                self.fix(axis, _AS_MANY)
                axis = self.fixed(_hint(size), _AS_MANY)
                self._of_values.update(atoms_of(axis))
            axes.append(axis)
        return replace(tensor, axes=tuple(axes))

    def _fix_sizes_of_values(self, out: Any, tensor: Traced) -> None:
        """Fix axes whose size depends on values; each part of that size stands for any other, as the batch does."""
        for size, axis in zip(getattr(out, "shape", ()), tensor.axes, strict=False):
            if is_unknown(size):
                self.fix(axis, _AS_MANY)
                unknown = {_hint(size)} if len(size.node.expr.free_symbols) == 1 else set()
                unknown |= {int(_number_for(symbol, size.node.shape_env)) for symbol in size.node.expr.free_symbols}
                self._of_values.update(atoms_of(self.normal(axis)))
                self._batch.update(a for a in atoms_of(self.normal(axis)) if self.atom_size(a) in unknown)

    # ---------------------------------------------------------------- the result

    def finish(self) -> Findings:
        """Settle what may vary with what, and read off the groups."""
        read = {name for graph in self._graphs for name in graph.used_state}
        self._fix_unread(read)
        folds = self._fold_gains() if self.has_rotations else []
        tensors = self.settle(self._shown | set(self.state.values()))
        self._fix_unseen()
        tensors = {tuple(map(self.normal, tensor)) for tensor in tensors}
        state = {name: tuple(map(self.normal, axes)) for name, axes in self.state.items()}
        structure = self._structure(state, tensors)
        return Findings(
            structure=structure,
            state=state,
            fixed={name: tuple(self.why_fixed(axis) for axis in axes) for name, axes in state.items()},
            unread=tuple(sorted(self._unread(read))),
            unknown=tuple(self._costs()),
            traces=tuple(self._trace(i, structure) for i in range(len(self._graphs))),
            costs_of_outputs=self._costs_of_outputs(),
            positions=self._relied_on(),
            tied=tuple(tuple(names) for names in self._aliases.values() if len(names) > 1),
            folds=tuple(folds),
            limited=self._limited(state, structure),
        )

    def _relied_on(self) -> dict[str, tuple[int, ...]]:
        """Return what the buffers hold by which units that move were told apart, or of which numbers were read.

        Not of those that some run writes to, such as counters: they differ between any two networks.
        """
        for graph, node, axis in self._told_apart:
            if not self.is_fixed(axis):
                graph.rely_on(node)
        relied = {name for graph in self._graphs for name in graph.relied_on}
        read = {name for graph in self._graphs for name in graph.read_as_numbers} - set(self._written)
        names = sorted(relied | read)
        return {name: tuple(self._whole[name].flatten().tolist()) for name in names}

    def _fold_gains(self) -> list[Fold]:
        """Let scaled units be the units that they were: of gains that can be folded nothing is left, others lower."""
        for gain in self.gains:  # one gain for all indices: one group
            self.join_members(gain.before)
            self.join_members(gain.after)
        state = {first: self.state[first] for first in self._aliases}
        model = self._model()
        bound = {first for first, names in self._aliases.items() if len({_holder(model, name) for name in names}) == 1}
        known = Known(self, state, cache(self._uses_of), self._aliases, bound, _made_by, self._untouchable)
        folds, refused = judged(self.gains, known)
        for gain in self.gains:
            self.unify(gain.after, gain.before)
            if gain not in refused:
                self.fix(gain.own, "its gain is folded, and one for all units")
            else:
                self.unify(gain.after, gain.own)
                self.lower(gain.after, PERMUTATION, f"the gain '{gain.name}' cannot be folded, since {refused[gain]}")
        for axis in {axis for tensor in (*self._shown, *self.state.values()) for axis in tensor}:
            self.lower(axis, self._largest, None)
        return folds

    def _uses_of(self, name: str) -> list[Use] | str:
        """Return what all operators that read a parameter do with it, or by what it is read that is no linear layer."""
        found: list[Use] = []
        for graph in self._graphs:
            live = set(graph.nodes)
            waiting = [node for node in graph.nodes if node.op == "placeholder" and self._is_called(node, graph, name)]
            while waiting:
                for user in waiting.pop().users:
                    if user not in live or user in self._shapes_only:
                        continue
                    uses = [use for use in self.uses.get(user, ()) if use.name == name]
                    found += uses
                    if uses:
                        continue
                    if user.name in graph.outputs:
                        return "is also an output of the model"
                    if name_of(user.target) not in (*_VIEWS, "add"):
                        return f"is also read by {_place_of(user)}"
                    waiting.append(user)
        return found

    def _is_called(self, node: Node, graph: Graph, name: str) -> bool:
        source = graph.state.get(node.name)
        return source is not None and self._first_name.get(source.name) == name

    def _limited(
        self, state: Mapping[str, tuple[Axis, ...]], structure: Structure
    ) -> dict[str, tuple[str | None, ...]]:
        """Return why the group on each axis of the state that moves is no larger than it is, by name."""
        if not self.has_rotations:
            return {}
        return {
            name: tuple(self.why_lowered(axis) if structure.moving_atoms(axis) else None for axis in axes)
            for name, axes in state.items()
        }

    def _fix_unread(self, read: set[str]) -> None:
        """A parameter in neither graph is used in ways not seen here: it stays as it is."""
        for name in self._unread(read):
            for axis in self.state[name]:
                self.fix(axis, "in neither graph")

    def _unread(self, read: set[str]) -> list[str]:
        """Return the parameters and buffers that no graph reads, under this name or one that they are tied to."""
        used = {self.state[name] for name in read & self.state.keys()}
        return [name for name, axes in self.state.items() if name not in read and (not axes or axes not in used)]

    def _fix_unseen(self) -> None:
        """Fix what this input leaves out: rows of a table that a longer sequence would read.

        What is free matters where it is summed over, and only there: all that reaches an output is fixed.
        """
        families = self.families()
        seen: set[int] = set()
        for axis in dict.fromkeys(map(self.normal, self._seen)):
            for part in expand((axis,), families):
                seen.update(atom for axis in part for atom in atoms_of(axis))
        for axes in self.state.values():
            for atom in {a for axis in axes for a in atoms_of(self.normal(axis))} - seen - families.keys():
                self.fix(((atom,),), "not used by this input")

    def _structure(self, state: dict[str, tuple[Axis, ...]], tensors: Iterable[tuple[Axis, ...]]) -> Structure:
        families = self.families()
        parts = [part for axes in dict.fromkeys(state.values()) for part in expand(axes, families)]
        free = {a for part in parts for axis in part for a in atoms_of(axis) if self.is_free_atom(a)}
        possible = dependencies(tensors, families, free, self._rows_of_groups())
        order = sorted(free, key=lambda a: (len(possible[a] & free), self.atom_size(a), a))
        parents: dict[int, tuple[int, ...]] = {}
        for atom in order:  # earlier atoms only, so that no two depend on each other
            mine = {p for p in possible[atom] if p in parents or not self.is_free_atom(p)}
            mine = {p for p in mine if self.atom_kind(p) in (FIXED, PERMUTATION)}  # others have no places to vary with
            mine = {p for p in mine if set(parents.get(p, ())) <= mine}
            parents[atom] = tuple(sorted(mine, key=lambda p: (p in parents, order.index(p) if p in parents else p)))
        atoms = range(self.num_atoms)
        kinds = {atom: self.atom_kind(atom) for atom in parents}
        return Structure({a: self.atom_size(a) for a in atoms}, parents, families, self.batch_atoms, kinds)

    def _rows_of_groups(self) -> list[tuple[frozenset[int], int]]:
        """Return which atoms say together the index of another: those of groups that one tensor alone counts off."""
        found: dict[int, dict[Node, set[frozenset[int]]]] = {}
        for rows, groups, by in self._told:
            rows, groups = self.normal(rows), self.normal(groups)
            is_plain = len(rows) == len(groups) == len(groups[0]) == 1 and all(isinstance(a, int) for a in rows[0])
            if is_plain:
                found.setdefault(groups[0][0], {}).setdefault(by, set()).add(frozenset(rows[0]))
        told = []
        for group, by_node in found.items():
            graphs = [node.graph for node in by_node]
            if len(set(graphs)) == len(graphs):  # else rows may be of one group here, and of another there
                told += [(rows, group) for all_rows in by_node.values() for rows in all_rows]
        return told

    def _costs_of_outputs(self) -> dict[str, int]:
        """Return how many hidden units, which some layer reads, outputs but the first fixed, by output."""
        hidden = {atom for axis in self._seen for atom in atoms_of(self.normal(axis))}
        costs: dict[str, int] = {}
        counted: set[int] = set()
        for name, axis in self._asked:
            lost = set(atoms_of(self.normal(axis))) & hidden - counted - self.batch_atoms
            counted |= lost
            if lost:
                costs[name] = costs.get(name, 0) + sum(map(self.atom_size, lost))
        return costs

    def _costs(self) -> Iterable[UnknownOperator]:
        """Sum up the units that each unknown operator fixed, by operator."""
        for operator in dict.fromkeys(u.operator for u in self._unknown):
            met = [u for u in self._unknown if u.operator == operator]
            lost = {axis for u in met for axis in map(self.normal, u.axes)}
            yield UnknownOperator(operator, met[0].module, len(lost), sum(map(self.size, lost)))

    def _trace(self, number: int, structure: Structure) -> Trace:
        def final(value: Any) -> Any:
            if isinstance(value, Traced):
                unread = value.points_into is not None and not self.is_fixed(value.points_into)
                unread |= bool(value.only_summed)
                axes = tuple(map(self.normal, value.axes))
                return None if unread or not structure.can_place(axes) else axes
            return [final(v) for v in value] if isinstance(value, list) else None

        axes = {node: None if node in self._shapes_only else final(v) for node, v in self._values[number].items()}
        taps = dict.fromkeys(
            Tap(node, self.normal(axis))
            for node, axis in self._contracted[number]
            if not self.is_fixed(axis) and axes.get(node) is not None
        )
        return Trace(self._graphs[number], axes, tuple(taps), self._model)


def _is_view(node: Node) -> bool:
    """Whether a tensor holds the entries of another one, and nobody writes to it: no cast rounds them further."""
    if node.op != "call_function" or name_of(node.target) not in _VIEWS or not isinstance(node.args[0], torch.fx.Node):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    if before is not after:
        if not (before.is_floating_point and after.is_floating_point):
            return False
        if torch.finfo(after).eps > torch.finfo(before).eps:
            return False
    return not is_written(node)


def _is_vector(value: torch.Tensor) -> bool:
    return sum(not (isinstance(size, int) and size == 1) for size in value.shape) <= 1


def _made_by(node: Node | None) -> Node | None:
    """Return the operator whose entries a tensor holds, but for their arrangement; None if they are written to."""
    while node is not None and not is_written(node):
        if not (_is_view(node) or name_of(node.target) in ("dropout", "select", "to", "_to_copy")):
            return node
        node = node.args[0]
    return None


def _read_for_shapes(nodes: Sequence[Node]) -> set[Node]:
    """Return the tensors that others take their shape and type from, and of whose entries nothing is made."""
    live, found = set(nodes), set()
    for node in reversed(nodes):
        readers = [user for user in node.users if user in live]
        only = all(user in found or (name_of(user.target) in _LIKE and user.args[:1] == (node,)) for user in readers)
        schema = getattr(node.target, "_schema", None)
        is_pure = schema is not None and not schema.is_mutable and isinstance(node.meta.get("val"), torch.Tensor)
        if is_pure and readers and only:
            found.add(node)
    return found


_LIKE = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty "
    "sym_size".split()
)
"""Operators that read nothing of their first input but its shape and type."""


def _name_of(target: Any) -> str:
    """Return the name of an operator, the same in every process."""
    if isinstance(target, torch._ops.OperatorBase):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _called(node: Node) -> str:
    """Return what users call an operator."""
    return name_of(node.target) or _name_of(node.target)


def _place_of(node: Node) -> str:
    """Return an operator and the module that calls it, in words."""
    return f"{_called(node)} {module_of(node, in_words=True)}"


def _holder(model: nn.Module, name: str) -> int:
    """Return the identity of the module that holds a tensor, which has several names where its module has."""
    return id(model.get_submodule(name.rpartition(".")[0]))


def _without_node(value: Any) -> Any:
    """Forget where a tensor comes from, if that is inside an operator of the graph: it cannot be read there."""
    if isinstance(value, Traced):
        return Traced(value.axes, None, value.points_into)
    return [_without_node(v) for v in value] if isinstance(value, list) else value


_AS_MANY = "as many as values say"
_OVERLAP = "in one memory with another tensor"


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage may have an entry in common."""
    ranges = []
    for tensor in (one, other):
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.storage_offset() * tensor.itemsize
        ranges.append((begin, begin + (last + 1) * tensor.itemsize))
    (begin, end), (start, stop) = ranges
    return begin < stop and start < end


def _hint(size: Any) -> int:
    """Return a size as a number, also where export keeps it symbolic; no guard is set.

    Of one that depends on values, as what a mask chooses, any number is as good as another. It is a prime that no other
    size has, so that sizes which are multiples of it are seen to be that.
    """
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    if known is not None:
        return int(known)
    if size.node.hint is not None:
        return int(size.node.hint)
    numbers = {symbol: _number_for(symbol, size.node.shape_env) for symbol in size.node.expr.free_symbols}
    return int(size.node.expr.xreplace(numbers))


def _number_for(symbol: Any, environment: Any) -> Any:
    import sympy

    name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"  # before torch 2.12
    known = getattr(environment, name)
    if symbol in known:
        return known[symbol]
    same = _equal_to(symbol, environment)
    number = min((int(name) for s in same if (name := s.name.lstrip("u")).isdecimal()), default=0)
    return sympy.Integer(sympy.prime(_FIRST_PRIME + number))


def _equal_to(symbol: Any, environment: Any) -> set[Any]:
    """Return the symbols that export has found to be the same number as one, which it checks at each run."""
    import sympy

    claims = [claim.expr for claims in environment.deferred_runtime_asserts.values() for claim in claims]
    pairs = [set(claim.args) for claim in claims if isinstance(claim, sympy.Eq)]
    pairs = [pair for pair in pairs if all(side.is_Symbol for side in pair)]
    same = {symbol}
    while any(pair & same and not pair <= same for pair in pairs):
        same |= {side for pair in pairs if pair & same for side in pair}
    return same


_FIRST_PRIME = 26
"""Sizes that depend on values are primes from this one on, 101."""


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _concrete(value: Any) -> Any:
    """Replace symbolic sizes by numbers in nested arguments."""
    if isinstance(value, (list, tuple)):
        return type(value)([_concrete(v) for v in value])
    if isinstance(value, dict):
        return {key: _concrete(v) for key, v in value.items()}
    return _hint(value) if isinstance(value, torch.SymInt) and not is_unknown(value) else value


def is_unknown(value: Any) -> bool:
    """Whether a number depends on values, as that of ``item()`` does."""
    return isinstance(value, torch.SymInt) and value.node.maybe_as_int() is None and value.node.hint is None


def _unknown_numbers(arguments: Any) -> bool:
    return any(map(is_unknown, pytree.tree_leaves(arguments)))


def _bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by their names in the operator's schema."""
    schema = getattr(target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} if schema else {}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _equal_along(values: torch.Tensor | None, dim: int) -> bool:
    """Whether a tensor is known and the same at every position of a dimension."""
    if values is None or values.device.type == "meta" or not values.numel():
        return False
    return bool((values == values.narrow(dim, 0, 1)).all())


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(repr(n) for n in names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
