"""A model as the graph of tensor operations that ``torch.export`` sees, and a way to run it node by node."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.network.batches import to_device
from modeconn.symmetry.cuts import cut_before_views
from modeconn.symmetry.execute import call, in_precision
from modeconn.symmetry.lower import inlined
from modeconn.symmetry.outputs import Outputs

if TYPE_CHECKING:
    from torch.fx import Node


ALL = Outputs()
"""Every output counts."""

_RESHAPE, _VIEW = torch.ops.aten.reshape.default, torch.ops.aten.view.default
_VIEWS = (_VIEW, torch.ops.aten._unsafe_view.default)
"""Reshapes that ask for one layout in memory, in which another device or memory format may not put tensors."""
_SMALL = 4096
"""Entries of the largest tensor whose values are looked at before any run."""
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default)
"""Copies that exports hold or leave out, according to the layout."""


@dataclass(frozen=True)
class Example:
    """The inputs that a model is exported with.

    Args:
        args: Positional inputs.
        kwargs: Keyword inputs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_input: Any) -> Example:
        """Read what a user passes: one tensor, a tuple of positional inputs, or a mapping of keyword inputs."""
        if isinstance(example_input, Example):
            return example_input
        if isinstance(example_input, Mapping):  # also those of tokenizers, which are no dict
            return cls((), dict(example_input.items()))
        if isinstance(example_input, (tuple, list)):
            return cls(tuple(example_input), {})
        return cls((example_input,), {})

    def to(self, device: torch.device | str) -> Example:
        """Return the same inputs on ``device``."""
        return Example(to_device(self.args, device), to_device(self.kwargs, device))

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the inputs."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def has_batch(self, tensor: Tensor) -> bool:
        """Whether a tensor's first dimension has the size of the first input's."""
        first = next((t for t in self.tensors() if t.dim()), None)
        return first is not None and tensor.dim() > 0 and tensor.shape[0] == first.shape[0]

    def with_batch_of_two(self) -> Example | None:
        """Return the inputs with at least two entries in their batch, since export takes a size of one for a constant.

        None if no input has a first dimension.
        """
        if not any(t.dim() for t in self.tensors()):
            return None

        def widen(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not self.has_batch(leaf):
                return leaf
            return leaf.repeat(2, *[1] * (leaf.dim() - 1)) if leaf.shape[0] == 1 else leaf.clone()

        return Example(*pytree.tree_map(widen, (self.args, self.kwargs)))


@dataclass(frozen=True)
class State:
    """Where a placeholder of the graph that is no input takes its tensor from.

    Args:
        kind: "parameter", "buffer", or "constant" (a tensor made inside ``forward``, or a buffer that is not saved).
        name: The name in the model; of a constant, in the graph.
    """

    kind: str
    name: str


class InputMismatch(ValueError):
    """Inputs that are not those of the example with which a model was exported."""


@dataclass(frozen=True)
class Program:
    """The operators of one mode of a model, however they were found.

    Args:
        module: The graph, and what it calls.
        state: Where placeholders take their tensors from, by their names.
        constants: Tensors that are neither parameters nor saved buffers, by the names that ``state`` gives them.
        outputs: What the model calls each output, by its place among what the graph returns.
        structure: Of the inputs.
        is_recorded: Whether it was recorded on one run.
        others: Of a recorded one, the inputs that are no tensors; no placeholder stands for them.
    """

    module: Any
    state: dict[str, State]
    constants: Mapping[str, Any]
    outputs: Mapping[int, str]
    structure: Any
    is_recorded: bool = False
    others: tuple[Any, ...] = ()


class Graph:
    """One mode of a model, exported or recorded.

    Attributes:
        training: The mode.
        nodes: Live nodes in order of execution, placeholders first.
        state: Parameters, buffers and constants by the name of their placeholder.
        outputs: What the model calls each output, by the name of the node that makes it; "" for a lone one.
        used_state: Names of what some operator reads.
        written_state: Names of what some operator writes to.
        free_batch: Whether it runs for any batch size, or only for that of the example.
        is_recorded: Whether it is of one run, and so of one path through the model.
        why_batch_is_fixed: Why the batch size is that of the example, where that could have been another.
        relied_on: Names of the buffers and attributes whose values decided what is in the graph or was found in it.
        read_as_numbers: Names of those of which a number was read in a recorded run, which holds for that number.

    Args:
        program: What was exported or recorded.
        training: The mode.
        positions: Buffers and plain attributes of whole numbers by name, which may be taken for constants; None for
            those that may not.
    """

    def __init__(self, program: Program, training: bool, positions: Mapping[str, Tensor | None]) -> None:
        self.training = training
        self.why_batch_is_fixed: str | None = None
        self.is_recorded = program.is_recorded
        self._program = program
        self.state = program.state
        self._known: dict[Node, Tensor | None] = {}
        self._positions = positions
        self.relied_on: set[str] = set()
        graph = inlined(program.module)
        self._read(graph)
        if cut_before_views(graph, self.nodes, self.known, self.rely_on):
            self._read(graph)
        self.read_as_numbers = {
            name
            for node in self.nodes
            if self.is_recorded and _is_reading(node)
            for given in node.all_input_nodes
            if self.known(given) is not None
            for name in self._buffers_behind(given)
        }
        (returned,) = self.nodes[-1].args
        self.outputs: dict[str, str] = {}
        for place, name in program.outputs.items():
            self.outputs.setdefault(returned[place].name, name)
        self.free_batch = any(_is_free(n) for input in self._inputs() for n in input.shape)

    def _read(self, graph: Any) -> None:
        """Take the live nodes of a graph, and find out what they read and write."""
        self.nodes = _live_nodes(graph, with_readings=self.is_recorded)
        read = {source for node in self.nodes for source in node.all_input_nodes}
        self.used_state = {self.state[node.name].name for node in read if node.name in self.state}
        self._last_use = _last_uses(self.nodes)
        written = {_storage_of(source) for node in self.nodes for source in _written_by(node)}
        self.written_state = {self.state[node.name].name for node in written if node.name in self.state}
        self._safe_to_copy = {node for node in self.nodes if _storage_of(node) not in written}

    @property
    def mode(self) -> str:
        """The mode as a word."""
        return "train" if self.training else "eval"

    def run(
        self,
        state: Mapping[str, Tensor],
        example: Example,
        *,
        dtype: torch.dtype | None = None,
        running_statistics: bool = False,
    ) -> Iterator[tuple[Node, Any]]:
        """Execute node by node, without gradients and without dropout.

        Args:
            state: Parameters and buffers by name; buffers are copied before a node may change them.
            example: Inputs on the device of ``state``; any batch size if `free_batch`.
            dtype: Every cast to a floating type inside the graph goes to this one; None leaves them.
            running_statistics: Let batch norm use them also in train mode: what eval mode computes, for every branch
                that train mode has.

        Yields:
            ``node, value`` right after each node ran, before a later in-place operation changes the value. Values
            are dropped after their last use.
        """
        device = next((t.device for t in (*state.values(), *example.tensors())), torch.device("cpu"))
        inputs = iter(self._flat_inputs(example))
        env: dict[Node, Any] = {}
        for node in self.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                value = self._state_value(node, state, device) if node.name in self.state else next(inputs)
                if dtype and isinstance(value, Tensor):
                    value = value.to(in_precision(value.dtype, dtype))
            elif node.op == "get_attr":
                value = getattr(self._program.module, node.target)
                value = value.to(device) if isinstance(value, Tensor) else value
            else:
                target = _RESHAPE if node.target == _VIEW and node in self._safe_to_copy else node.target
                with torch.no_grad():  # not around the yield: two runs in step would restore each other's state
                    value = call(node, target, env, device, dtype, running_statistics)
                    value = value.detach() if isinstance(value, Tensor) else value  # regions may record gradients
            env[node] = value
            yield node, value
            for done in self._last_use.get(node, ()):
                del env[done]

    def is_like(self, other: Graph, ignore: Collection[str] = ()) -> bool:
        """Whether another graph makes the same steps from the same constants, but for those to ignore.

        How tensors lie in memory does not count: it differs between devices, and decides what is copied on the way. Nor
        does the precision: a model may make its constants in that of its weights.
        """
        if self._steps() != other._steps():
            return False
        kept = [source for source in self.state.values() if source.name not in ignore]
        pairs = ((self.constant(source), other.constant(source)) for source in kept)
        return all(x is None or y is None or x.is_meta or _is_same(x.to(y.device), y) for x, y in pairs)

    def _steps(self) -> list[str]:
        """Return what each node does to what, as text, without copies that change no value."""
        names: dict[Node, Any] = {}
        steps = []
        for node in self.nodes:
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if node.target in _COPIES and {node, source} <= self._safe_to_copy:
                names[node] = names[source]
                continue
            names[node] = len(steps) if node.op == "call_function" else node.name
            arguments = torch.fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: names.get(leaf, leaf))
            steps.append(_step(_RESHAPE if node.target in _VIEWS else node.target, arguments))
        return steps

    def takes(self, example: Example) -> bool:
        """Whether inputs have the shapes that the model was exported for, but for a free batch.

        Raises:
            InputMismatch: If there are others than those that the model was exported with.
        """
        given_tensors = [leaf for leaf in self._flat_inputs(example) if isinstance(leaf, Tensor)]
        others = [leaf for leaf in pytree.tree_leaves((example.args, example.kwargs)) if not isinstance(leaf, Tensor)]
        if self.is_recorded and tuple(others) != self._program.others:
            return False
        return all(
            given.dim() == traced.dim()
            and all(_is_free(n) or int(n) == m for n, m in zip(traced.shape, given.shape, strict=True))
            for given, traced in zip(given_tensors, self._inputs(), strict=False)
        )

    def _inputs(self) -> list[Tensor]:
        """Return the tensors that stand for the inputs."""
        inputs = [n.meta.get("val") for n in self.nodes if n.op == "placeholder" and n.name not in self.state]
        return [value for value in inputs if isinstance(value, Tensor)]

    def constant(self, source: State) -> Tensor | None:
        """Return the value of a constant, None for what the model's state holds."""
        return self._program.constants.get(source.name) if source.kind == "constant" else None

    def known(self, node: Node) -> Tensor | None:
        """Return the value of a node that is small, and made of constants alone; None for all others.

        Buffers and attributes of whole numbers count as constants: what such a value decides is told to `rely_on`.
        """
        if node not in self._known:
            value = self._value_of_constants(node)
            self._known[node] = None if value is None or value.is_meta else value.cpu()
        return self._known[node]

    def rely_on(self, node: Node) -> None:
        """Note that what is found holds for networks whose buffers hold what a known node is made of."""
        self.relied_on.update(self._buffers_behind(node))

    def _buffers_behind(self, node: Node) -> set[str]:
        """Return the names of the buffers that a known node is made of."""
        found, seen, waiting = set(), {node}, [node]
        while waiting:
            node = waiting.pop()
            source = self.state.get(node.name)
            if source is not None and source.name in self._positions:
                found.add(source.name)
            waiting += [given for given in node.all_input_nodes if given not in seen]
            seen.update(node.all_input_nodes)
        return found

    def _value_of_constants(self, node: Node) -> Tensor | None:
        made = node.meta.get("val")
        if node not in self._safe_to_copy or not isinstance(made, Tensor) or any(map(_is_free, made.shape)):
            return None
        if made.numel() > _SMALL:
            return None
        if node.op == "placeholder":
            source = self.state.get(node.name)
            if source is not None and source.name in self._positions:
                return self._positions[source.name]
            return None if source is None else self.constant(source)
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or _schema(node) is None or torch.Tag.nondeterministic_seeded in tags:
            return None
        given = {source: self.known(source) for source in node.all_input_nodes}
        if any(value is None for value in given.values()):
            return None
        on_cpu = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda leaf: torch.device("cpu") if isinstance(leaf, torch.device) else leaf
        )  # so that a model on the meta device has the groups that it has elsewhere
        args, kwargs = torch.fx.node.map_arg(on_cpu, given.__getitem__)
        with torch.device("cpu"):
            return node.target(*args, **kwargs)

    def _state_value(self, node: Node, state: Mapping[str, Tensor], device: torch.device) -> Tensor:
        source = self.state[node.name]
        if source.kind == "parameter":
            value = state[source.name]  # an embedding with max_norm writes to its table
            return value.clone() if source.name in self.written_state else value
        if source.name in state:
            return state[source.name].clone()
        value = self._program.constants[source.name]
        if value.device.type == "meta":
            raise ValueError(
                f"the model makes the tensor '{source.name}' on the meta device, so it has no values to run with. "
                "Build the model on a real device."
            )
        return value.to(device, copy=True)

    def _flat_inputs(self, example: Example) -> list[Any]:
        """Return the inputs one by one, in the order of their placeholders; keywords that the model lacks are left out.

        Raises:
            InputMismatch: If there are others than those that the model was exported with.
        """
        spec = self._program.structure
        positional, keywords = spec.children() if hasattr(spec, "children") else spec.children_specs
        named = {name: example.kwargs[name] for name in keywords.context if name in example.kwargs}
        leaves = [pytree.tree_leaves(part) for part in (example.args, named)]
        if [len(part) for part in leaves] != [part.num_leaves for part in (positional, keywords)]:
            wanted = _listed(positional.num_leaves, keywords.context)
            raise InputMismatch(
                f"this model runs on {wanted}, as in the example input, got {_listed(len(leaves[0]), example.kwargs)}. "
                f"Pass a loader whose batches are the model's inputs, or a method that reads no data, such as "
                f"WeightMatching()."
            )
        flat = [leaf for part in leaves for leaf in part]
        return [leaf for leaf in flat if isinstance(leaf, Tensor)] if self.is_recorded else flat


def _listed(num_positional: int, names: Iterable[str]) -> str:
    """Write inputs as words."""
    by_name = ", ".join(map(repr, names))
    parts = [f"{num_positional} without a name"] * bool(num_positional) + [f"those named {by_name}"] * bool(by_name)
    return f"inputs: {' and '.join(parts) or 'none'}"


def _live_nodes(graph: Any, *, with_readings: bool = False) -> list[Node]:
    """Drop nodes that nothing depends on: what is computed and thrown away must not constrain a symmetry.

    In a recorded graph numbers that were read have decided what follows, though no node depends on them.
    """
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        is_read = with_readings and _is_reading(node)
        if node.op in ("placeholder", "output") or node in live or _mutates(node) or is_read:
            live.add(node)
            live.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in live]


def _is_reading(node: Node) -> bool:
    """Whether a node makes a number of a tensor."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _mutates(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable and node.target is not torch.ops.aten.detach_.default


def _schema(node: Node) -> Any:
    return getattr(node.target, "_schema", None)


def _step(target: Any, arguments: Any) -> str:
    text = f"{target} {arguments}"
    # The device and the precision do not matter: the two models may have different ones.
    text = re.sub(r"torch\.(b?float\d+)\b", "float", text)
    return re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device", text)


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two constants are equal, to the lower precision of the two."""
    if x.dtype == y.dtype or not (x.is_floating_point() and y.is_floating_point()):
        return torch.equal(x, y)
    lower = max((x.dtype, y.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return x.shape == y.shape and torch.allclose(x.to(lower).double(), y.to(lower).double(), equal_nan=True)


def _written_by(node: Node) -> list[Node]:
    """Return the tensors that a node changes in place."""
    if not _mutates(node):
        return []
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    changed = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = pytree.tree_leaves([given.get(name) for name in changed])
    return [leaf for leaf in leaves if isinstance(leaf, torch.fx.Node)]


def _storage_of(node: Node) -> Node:
    """Return the tensor that a view, or one of several views, is a view of."""
    while node.target is operator.getitem or any(r.alias_info for r in _returns(node)):
        node = node.all_input_nodes[0]
    return node


def _returns(node: Node) -> list[Any]:
    schema = _schema(node)
    return [] if schema is None else schema.returns


def _last_uses(nodes: list[Node]) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    ends: dict[Node, list[Node]] = {}
    for node, end in last.items():
        ends.setdefault(end, []).append(node)
    return ends


def _is_free(size: Any) -> bool:
    """Whether a size is neither a number nor a symbol that export found to be one."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None
