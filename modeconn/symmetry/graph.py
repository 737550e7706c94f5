"""A model as the graph of tensor operations that ``torch.export`` sees, and a way to run it node by node."""

from __future__ import annotations

import copy
import enum
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._decomp import decompositions
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from modeconn.network.batches import to_device
from modeconn.network.copies import check_no_inference, copy_with, plain_tensors
from modeconn.symmetry.outputs import Outputs, leaf_names
from modeconn.symmetry.record import Recording, record
from modeconn.tools.rng import one_thread, seeded
from modeconn.tools.warn import is_of_package

if TYPE_CHECKING:
    from torch.fx import Node

_LOGGER = logging.getLogger(__name__)
_UNINITIALISED = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided")
}
"""Operators whose values mean nothing until something is written there."""
ALL = Outputs()
"""Every output counts."""

_RESHAPE, _VIEW = torch.ops.aten.reshape.default, torch.ops.aten.view.default
_VIEWS = (_VIEW, torch.ops.aten._unsafe_view.default)
"""Reshapes that ask for one layout in memory, in which another device or memory format may not put tensors."""
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


class ExportError(ValueError):
    """A model that runs, but that ``torch.export`` cannot follow."""


class InputMismatch(ValueError):
    """Inputs that are not those of the example with which a model was exported."""


@dataclass(frozen=True)
class Program:
    """The operators of one mode of a model, however they were found.

    Args:
        module: The graph, and what it calls.
        state: Where placeholders take their tensors from, by their names.
        constants: Tensors that are neither parameters nor saved buffers, by the names that ``state`` gives them.
        outputs: The node that makes each output, and what the model calls it.
        structure: Of the inputs.
        is_recorded: Whether it was recorded on one run.
        others: Of a recorded one, the inputs that are no tensors; no placeholder stands for them.
    """

    module: Any
    state: dict[str, State]
    constants: Mapping[str, Any]
    outputs: list[tuple[str, str]]
    structure: Any
    is_recorded: bool = False
    others: tuple[Any, ...] = ()

    @classmethod
    def exported(cls, program: Any) -> Program:
        """Return what `torch.export` found."""
        state, outputs = dict(_read_state(program)), list(_named_outputs(program))
        return cls(program.graph_module, state, program.constants, outputs, program.call_spec.in_spec)

    @classmethod
    def recorded(cls, model: nn.Module, found: Recording) -> Program:
        """Return what one run did."""
        saved, buffers = set(model.state_dict()), dict(model.named_buffers())
        state = {
            node: State("parameter" if name not in buffers else "buffer" if name in saved else "constant", name)
            for node, name in found.state.items()
        }
        state |= {node: State("constant", node) for node in found.constants}
        constants = {name: buffer for name, buffer in buffers.items() if name not in saved} | found.constants
        return cls(found.module, state, constants, found.outputs, found.structure, True, found.others)


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
    """

    def __init__(self, program: Program, training: bool) -> None:
        self.training = training
        self.is_recorded = program.is_recorded
        self._program = program
        self.state = program.state
        self.outputs: dict[str, str] = {}
        for node, name in program.outputs:
            self.outputs.setdefault(node, name)
        self.nodes = _live_nodes(_inline_regions(program.module), with_readings=program.is_recorded)
        read = {source for node in self.nodes for source in node.all_input_nodes}
        self.used_state = {self.state[node.name].name for node in read if node.name in self.state}
        self._last_use = _last_uses(self.nodes)
        written = {_storage_of(source) for node in self.nodes for source in _written_by(node)}
        self.written_state = {self.state[node.name].name for node in written if node.name in self.state}
        self._safe_to_copy = {node for node in self.nodes if _storage_of(node) not in written}
        self.free_batch = any(_is_free(n) for input in self._inputs() for n in input.shape)

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
                    value = value.to(_in_precision(value.dtype, dtype))
            elif node.op == "get_attr":
                value = getattr(self._program.module, node.target)
                value = value.to(device) if isinstance(value, Tensor) else value
            else:
                target = _RESHAPE if node.target == _VIEW and node in self._safe_to_copy else node.target
                with torch.no_grad():  # not around the yield: two runs in step would restore each other's state
                    value = _call(node, target, env, device, dtype, running_statistics)
            env[node] = value
            yield node, value
            for done in self._last_use.get(node, ()):
                del env[done]

    def is_like(self, other: Graph, ignore: Collection[str] = ()) -> bool:
        """Whether another graph makes the same steps from the same constants, but for those to ignore.

        How tensors lie in memory does not count: it differs between devices, and decides what is copied on the way.
        """
        if self._steps() != other._steps():
            return False
        kept = [source for source in self.state.values() if source.name not in ignore]
        pairs = ((self.constant(source), other.constant(source)) for source in kept)
        return all(x is None or y is None or x.is_meta or torch.equal(x.to(y.device), y) for x, y in pairs)

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


def export(model: nn.Module, example: Example, *, training: bool, outputs: Outputs = ALL) -> Graph:
    """Export a model in one mode, with a free batch size where it allows one.

    The model is not changed: a copy that shares its tensors is traced, and fake tensors stand in for them. What it
    computes for other ``outputs`` than those that count is not in the graph.

    Raises:
        ValueError: If the model cannot run on the example, or cannot be exported.
    """
    check_no_inference(model)
    shadow = _shadow(model).train(training)
    for module in shadow.modules():
        if isinstance(module, _NormBase) and module.momentum is None:
            module.momentum = 0.1  # else its average reads the number of batches, which export cannot follow
    shadow.register_forward_hook(lambda module, inputs, returned: _plain(outputs(returned)))
    _name_keywords(shadow, example)
    with one_thread(), _traceable():
        graph = _with_free_batch(shadow, example, training)
        try:
            graph = graph or Graph(_export(shadow, example, None), training)
        except Exception as error:
            failed = _export_error(model, example, training, outputs, error)
            if not isinstance(failed, ExportError):
                raise failed from error
            graph = _recorded(shadow, example, training)
            if graph is None:
                raise failed from error
    if not (outputs.are_all or graph.outputs):
        raise ValueError(
            f"outputs= selects no tensor of what {type(model).__name__} returns in {graph.mode} mode, so nothing would "
            f"have to stay as it is. Select the output that a loss reads."
        )
    return graph


def _with_free_batch(model: nn.Module, example: Example, training: bool) -> Graph | None:
    """Return None for a model that fixes its batch size: what is wrong with one of any size shows without it too."""
    batched = example.with_batch_of_two()
    if batched is None:
        return None
    try:
        graph = Graph(_export(model, batched, _free_first_dims(model, batched)), training)
    except Exception as error:
        _LOGGER.debug("%s cannot be exported for any batch size: %s", type(model).__name__, first_line(error))
        return None
    return graph if graph.free_batch else None


def _export(model: nn.Module, example: Example, shapes: Any) -> Program:
    from torch.export import export

    return Program.exported(export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False))


def _recorded(model: nn.Module, example: Example, training: bool) -> Graph | None:
    """Return the graph of one run of a model that export cannot follow, None if it cannot be recorded either."""
    device = next((t.device for t in (*model.parameters(), *model.buffers(), *example.tensors())), None)
    if device is not None and device.type == "meta":
        return None
    try:
        with seeded(0, device or torch.device("cpu")):
            return Graph(Program.recorded(model, record(model, example.args, example.kwargs)), training)
    except Exception as error:  # tracing raises errors of many types
        _LOGGER.debug("%s cannot be recorded: %s", type(model).__name__, first_line(error))
        return None


def _free_first_dims(model: nn.Module, example: Example) -> Any:
    """Return, in the structure of the arguments of ``forward``, which dimensions have any size."""
    from torch.export import Dim

    def free(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and example.has_batch(leaf) else None

    arguments = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    return pytree.tree_map(free, dict(arguments))


def _plain(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Return outputs as nested lists and dicts of tensors: also those of data classes, caches and other objects."""
    if id(value) in seen:
        return None
    seen = (*seen, id(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, seen) for item in value]
    if isinstance(value, (Tensor, torch.SymInt, int, float, bool, str, type(None))):
        return value
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    fields = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    if not fields and not isinstance(value, _WITHOUT_TENSORS):
        raise TypeError(f"the outputs hold a {type(value).__name__}, in which tensors cannot be found.")
    return _plain(fields, seen)


_WITHOUT_TENSORS = (torch.dtype, torch.device, torch.layout, complex, bytes, range, enum.Enum, type)


def _shadow(model: nn.Module) -> nn.Module:
    """Copy the modules but not the tensors."""
    tensors = [*model.parameters(), *model.buffers(), *plain_tensors(model)]
    return copy_with(model, {id(tensor): tensor for tensor in tensors})


def _name_keywords(model: nn.Module, example: Example) -> None:
    """Turn the ``**kwargs`` of ``forward`` into parameters: inside it, export takes no free sizes."""
    inner = model.forward
    signature = inspect.signature(inner)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) == len(signature.parameters):
        return
    names = {p.name for p in named}
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in example.kwargs if n not in names]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
    model.forward = forward


@contextmanager
def _traceable() -> Iterator[None]:
    """Keep attention in separate operators, and export's own warnings to itself."""
    fast = torch.backends.mha.get_fastpath_enabled()
    logs = [
        logging.getLogger(f"torch.{name}")
        for name in ("fx.experimental.symbolic_shapes", "_subclasses.fake_tensor", "_export.non_strict_utils")
    ]
    levels = [log.level for log in logs]
    torch.backends.mha.set_fastpath_enabled(False)
    lstm = decompositions.one_layer_lstm
    decompositions.one_layer_lstm = _one_layer_lstm
    detect = getattr(transformer, _DETECT, None)
    if detect is not None:
        setattr(transformer, _DETECT, _is_said_to_be_causal)
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.enable_grad(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        decompositions.one_layer_lstm = lstm
        if detect is not None:
            setattr(transformer, _DETECT, detect)
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


_DETECT = "_detect_is_causal_mask"
"""What torch's transformers call to find out, from its values, whether a mask is the causal one."""


def _is_said_to_be_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Return whether the caller says that a mask is causal: else it is applied as it is, with the same result."""
    return is_causal is True


def _one_layer_lstm(inputs: Tensor, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute what torch's decomposition does, with final states of the right shape: torch 2.11 adds a dimension."""
    outputs, finals = _TORCH_ONE_LAYER_LSTM(inputs, hidden, *args, **kwargs)
    return outputs, tuple(x if x.shape == h.shape else x.reshape(h.shape) for x, h in zip(finals, hidden, strict=True))


_TORCH_ONE_LAYER_LSTM = decompositions.one_layer_lstm


def _export_error(model: nn.Module, example: Example, training: bool, outputs: Outputs, error: Exception) -> ValueError:
    """Tell a wrong example input from a model that export cannot follow, by running the model itself."""
    name = type(model).__name__
    shapes = ", ".join(str(tuple(t.shape)) for t in example.tensors())
    shapes = f"of shape {shapes}" if shapes else f"{(*example.args, example.kwargs)}, which holds no tensor"
    try:
        with torch.no_grad():
            found = _shadow(model).train(training)(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    except Exception as own:
        return ValueError(f"{name} does not run on example_input {shapes}: {first_line(own)}")
    try:
        outputs(found)
    except Exception as own:
        return own if is_of_package(own) else ValueError(f"outputs= fails on what {name} returns: {first_line(own)}")
    return ExportError(
        f"torch.export cannot follow {name} in {'train' if training else 'eval'} mode: {first_line(error)} "
        "What usually helps: no branches on tensor values, no .item() or numpy inside forward."
    )


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _is_free(size: Any) -> bool:
    """Whether a size is neither a number nor a symbol that export found to be one."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def _read_state(program: Any) -> Iterator[tuple[str, State]]:
    from torch.export.graph_signature import InputKind

    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER:
            yield spec.arg.name, State("parameter", spec.target)
        elif spec.kind is InputKind.BUFFER:
            yield spec.arg.name, State("buffer" if spec.persistent else "constant", spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            yield spec.arg.name, State("constant", spec.target)


def _named_outputs(program: Any) -> Iterator[tuple[str, str]]:
    """Yield the node that makes each output that is a tensor, and what the model calls it."""
    from torch.export.graph_signature import OutputKind

    made = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    for argument, name in zip(made, leaf_names(program.call_spec.out_spec), strict=True):
        if hasattr(argument, "name"):
            yield argument.name, name


def decompose(node: Node) -> Any:
    """Return the graph of simpler operators that an operator consists of, None if torch knows of none.

    Its placeholders are the tensors among the node's arguments, in their order.
    """
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    def value(leaf: Any) -> Any:
        return leaf.meta["val"] if isinstance(leaf, torch.fx.Node) else leaf

    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    leaves, structure = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
    leaves = [value(leaf) for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return node.target(*args, **kwargs)

    tensors = [leaves[place] for place in places]
    for table in (dict, core_aten_decompositions):  # the second takes seconds to build, and is rarely needed
        try:
            graph = make_fx(call, table())(*tensors).graph
        except Exception:  # tracing an operator without a decomposition raises errors of many types
            return None
        graph.eliminate_dead_code()
        calls = [part.target for part in graph.nodes if part.op == "call_function"]
        if node.target not in calls and not any(part.op == "get_attr" for part in graph.nodes):
            return graph
    return None


def _inline_regions(module: Any) -> Any:
    """Return the graph with the bodies of regions (no_grad, autocast) in the place of the regions."""
    bodies = {n for n in module.graph.nodes if n.op == "get_attr" and hasattr(getattr(module, n.target, None), "graph")}
    regions = {n for n in module.graph.nodes if str(n.target).startswith("wrap_with_") and bodies & set(n.args)}
    if not regions:
        return module.graph
    graph = torch.fx.Graph()
    copies: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node in regions:
            at = next(i for i, arg in enumerate(node.args) if arg in bodies)
            body = getattr(module, node.args[at].target)
            inputs = [copies[arg] for arg in node.args[at + 1 :]]
            places = [n for n in body.graph.nodes if n.op == "placeholder"]
            copies[node] = graph.graph_copy(_inline_regions(body), dict(zip(places, inputs, strict=True)))
        elif node.op == "call_function" and node.args and isinstance(copies.get(node.args[0]), (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]  # an item of a region's outputs
        elif node not in bodies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


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
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _step(target: Any, arguments: Any) -> str:
    text = f"{target} {arguments}"
    # The device does not matter: the two models may be on different ones.
    return re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device", text)


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
    schema = getattr(node.target, "_schema", None)
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


def _call(
    node: Node,
    target: Any,
    env: dict[Node, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    running_statistics: bool,
) -> Any:
    from torch.fx.node import map_aggregate

    if getattr(node.target, "__name__", "").startswith("_assert"):
        return None  # export's own checks of dtypes, which a run in another precision does not meet

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, torch.fx.Node):
            return env[leaf]
        if isinstance(leaf, torch.device):
            return device
        return _in_precision(leaf, dtype) if dtype is not None and isinstance(leaf, torch.dtype) else leaf

    args, kwargs = map_aggregate(node.args, resolve), map_aggregate(node.kwargs, resolve)
    settings = _settings(node, running_statistics)
    names = [argument.name for argument in node.target._schema.arguments] if settings else []
    args = [settings.get(name, value) for name, value in zip(names, args, strict=False)] if settings else args
    tensors_in = [env[n] for n in node.all_input_nodes if isinstance(env[n], Tensor)]
    has_precision = any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors_in)
    target = _grouped_matmul if dtype == torch.float64 and target == _GROUPED_MATMUL else target
    if dtype is not None and target == torch.ops.aten.view.dtype:
        args = (args[0], _type_read(node, args[0].dtype))
    if dtype == torch.float64 and "fake_quantize" in str(target):
        target = partial(_in_single, target)
    value = target(*args, **{name: settings.get(name, value) for name, value in kwargs.items()})
    if dtype is not None and not has_precision and isinstance(value, Tensor):
        value = value.to(_in_precision(value.dtype, dtype))  # made of nothing or of integers, in torch's default type
    # What stands in memory that nobody has written to is not the same in two runs.
    return value.zero_() if getattr(node.target, "overloadpacket", None) in _UNINITIALISED else value


def _in_precision(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """Return the floating or complex type of a precision, such as float64; other types as they are."""
    return precision.to_complex() if dtype.is_complex else precision if dtype.is_floating_point else dtype


def _type_read(node: Node, given: torch.dtype) -> torch.dtype:
    """Return as what type to read the bytes of numbers of another precision than in the graph: one of as many parts."""
    source, wanted = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    size = given.itemsize * wanted.itemsize // source.itemsize
    for dtype in (wanted, _INTEGERS.get(size), torch.float64, torch.complex128):
        same_kind = dtype is not None and (
            (dtype.is_floating_point, dtype.is_complex) == (wanted.is_floating_point, wanted.is_complex)
        )
        if same_kind and dtype.itemsize == size:
            return dtype
    return wanted


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""


def _in_single(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator that torch has in single precision alone, which does not matter to what is rounded anyway."""

    def cast(before: torch.dtype, after: torch.dtype, values: Any) -> Any:
        return pytree.tree_map(lambda x: x.to(after) if isinstance(x, Tensor) and x.dtype == before else x, values)

    single = cast(torch.float64, torch.float32, (args, kwargs))
    return cast(torch.float32, torch.float64, target(*single[0], **single[1]))


_GROUPED_MATMUL = torch.ops.aten._grouped_mm.default


def _grouped_matmul(x: Tensor, y: Tensor, offsets: Tensor | None = None, *settings: Any, **more: Any) -> Tensor:
    """Multiply consecutive groups of rows or columns with a matrix each, which torch does not do in float64."""
    if offsets is None:
        return x @ y
    groups = list(enumerate(pairwise([0, *offsets.tolist()])))
    if x.dim() == y.dim():
        return torch.stack([x[:, a:b] @ y[a:b] for _, (a, b) in groups])
    if x.dim() == 2:
        return torch.cat([x[a:b] @ y[g] for g, (a, b) in groups])
    return torch.cat([x[g] @ y[:, a:b] for g, (a, b) in groups], 1)


def _argument(node: Node, name: str) -> Any:
    """Return an argument of an operator by its name in the schema."""
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name)


def _settings(node: Node, running_statistics: bool) -> dict[str, Any]:
    """Return the arguments of an operator that are not to be taken from the graph."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = {argument.name for argument in schema.arguments}
    if "dropout" in schema.name:
        return {"p": 0.0}
    if "rrelu" in schema.name:
        return {"training": False}
    if running_statistics and {"running_mean", "training"} <= names and _argument(node, "running_mean") is not None:
        return {"training": False}
    return {name: 0.0 for name in ("dropout", "dropout_p") if name in names}
