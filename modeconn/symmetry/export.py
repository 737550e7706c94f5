"""How a model becomes a graph: `torch.export` where it can follow, else one recorded run."""

from __future__ import annotations

import copy
import enum
import fnmatch
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decompositions
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from modeconn.network.batches import is_of_dtypes
from modeconn.network.copies import check_no_inference, copy_with, plain_tensors
from modeconn.symmetry.graph import ALL, Example, Graph, Program, State
from modeconn.symmetry.lower import levels_kept
from modeconn.symmetry.outputs import Outputs, leaf_names
from modeconn.symmetry.record import Recording, record
from modeconn.tools.rng import preserved, seeded
from modeconn.tools.warn import is_of_package

_LOGGER = logging.getLogger(__name__)


class ExportError(ValueError):
    """A model that runs, but that ``torch.export`` cannot follow."""


class UnreadableOutput(TypeError):
    """Something among the outputs in which no tensors can be found, such as a function."""


def export(
    model: nn.Module,
    example: Example,
    *,
    training: bool,
    outputs: Outputs = ALL,
    freeze: Sequence[str] = (),
) -> Graph:
    """Export a model in one mode, with a free batch size where it allows one.

    The model is not changed: a copy that shares its tensors is traced, and fake tensors stand in for them. What it
    computes for other ``outputs`` than those that count is not in the graph. Whole numbers that it holds are read as a
    part of the architecture, but for those that match a name or pattern of ``freeze``.

    Raises:
        ValueError: If the model cannot run on the example, or cannot be exported.
    """
    check_no_inference(model)
    unknown = {name: x for name, x in (*model.named_buffers(), *plain_tensors(model).items()) if x.is_meta}

    def as_graph(program: Program) -> Graph:
        constants = {name: unknown.get(name, x) for name, x in program.constants.items()}
        return Graph(replace(program, constants=constants), training=training, positions=_positions(model, freeze))

    shadow = _shadow(model).train(training)
    for module in shadow.modules():
        if isinstance(module, _NormBase) and module.momentum is None:
            module.momentum = 0.1  # else its average reads the number of batches, which export cannot follow
    shadow.register_forward_hook(lambda module, inputs, returned: _plain(outputs(returned)))
    _name_keywords(shadow, example)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with preserved(device if device.type != "meta" else "cpu"), _traceable():  # a model may seed generators itself
        try:
            graph = _exported(shadow, example, as_graph)
        except Exception as error:
            graph = None if _is_about_values(error) else _without_gradients(shadow, example, as_graph)
            graph = graph or (_recorded(shadow, example, as_graph) if _has_values(model) else None)
            if graph is None:
                raise _export_error(model, example, training, outputs, error) from error
    if not (outputs.are_all or graph.outputs):
        raise ValueError(
            f"outputs= selects no tensor of what {type(model).__name__} returns in {graph.mode} mode, so nothing would "
            f"have to stay as it is. Select the output that a loss reads."
        )
    return graph


def _positions(model: nn.Module, freeze: Sequence[str]) -> dict[str, Tensor | None]:
    whole = whole_numbers(model)
    frozen = {id(x) for name, x in whole.items() if any(fnmatch.fnmatchcase(name, each) for each in freeze)}
    return {name: None if id(x) in frozen else x.detach() for name, x in whole.items()}


def whole_numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers and plain attributes that may hold positions, by name."""
    held = {**plain_tensors(model), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: x for name, x in held.items() if x.dtype in _WHOLE}


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


_AsGraph = Callable[[Program], Graph]
"""Makes a graph, in one mode, of what was exported or recorded."""


def _exported(model: nn.Module, example: Example, as_graph: _AsGraph) -> Graph:
    batched = example.with_batch_of_two()
    if batched is None:
        return as_graph(_export(model, example, None))
    why = "it becomes a number on the way"
    try:
        graph = as_graph(_export(model, batched, _free_first_dims(model, batched)))
        if graph.free_batch:
            return graph
    except Exception as error:  # what is wrong with one of any size shows without it too
        why = first_line(error)
    graph = as_graph(_export(model, example, None))
    graph.why_batch_is_fixed = why
    _LOGGER.info("the batch size of %s is that of the example: %s", type(model).__name__, why)
    return graph


def _is_about_values(error: Exception) -> bool:
    """Whether export failed because a tensor's values decide, which no other way of exporting changes."""
    return "DataDependent" in type(error).__name__


def _without_gradients(model: nn.Module, example: Example, as_graph: _AsGraph) -> Graph | None:
    """Export a model of operators that have no gradients here, as flex_attention on the CPU; None if it is not that."""
    try:
        with torch.no_grad():
            return _exported(model, example, as_graph)
    except Exception as error:
        _LOGGER.debug("%s cannot be exported without gradients: %s", type(model).__name__, first_line(error))
        return None


def _export(model: nn.Module, example: Example, shapes: Any) -> Program:
    from torch.export import export

    return _of_export(export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False))


def _recorded(model: nn.Module, example: Example, as_graph: _AsGraph) -> Graph | None:
    """Return the graph of one run of a model that export cannot follow, None if it cannot be recorded either."""
    device = next((t.device for t in (*model.parameters(), *model.buffers(), *example.tensors())), None)
    graph = None
    for as_called in (True, False):
        try:
            with seeded(0, device or torch.device("cpu")):
                found = record(model, example.args, example.kwargs, as_called=as_called)
            graph = as_graph(_of_recording(model, found))
        except Exception as error:  # tracing raises errors of many types
            _LOGGER.debug("%s cannot be recorded: %s", type(model).__name__, first_line(error))
            continue
        if not found.has_derivatives:
            break  # else operators keep what they read for derivatives, which only what runs below autograd shows
    return graph


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
    if isinstance(value, type):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, seen) for item in value]
    if isinstance(value, (Tensor, torch.SymInt, int, float, bool, str, type(None))):
        return value
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    fields = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    if not fields and not isinstance(value, _WITHOUT_TENSORS):
        raise UnreadableOutput(f"a {type(value).__name__}")
    return _plain(fields, seen)


_WITHOUT_TENSORS = (torch.dtype, torch.device, torch.layout, complex, bytes, range, enum.Enum)


def _shadow(model: nn.Module) -> nn.Module:
    """Copy the modules but not the tensors; for those without values, make some that are never written or read.

    So they take no memory. A model on the meta device could not be traced if it made others elsewhere on the way.
    """
    tensors = [*model.parameters(), *model.buffers(), *plain_tensors(model).values()]
    return copy_with(model, {id(x): _on_cpu(x) if x.is_meta else x for x in tensors})


def _on_cpu(x: Tensor) -> Tensor:
    twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return nn.Parameter(twin, x.requires_grad) if isinstance(x, nn.Parameter) else twin


def _has_values(model: nn.Module) -> bool:
    return not any(x.is_meta for x in (*model.parameters(), *model.buffers()))


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
        with warnings.catch_warnings(), torch.enable_grad(), redirect_stderr(io.StringIO()), levels_kept():
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
        way_out = ""
        if isinstance(own, TypeError) and "argument" in str(own):
            way_out = ". Pass example_input=, a tuple of all positional inputs or a dict of keyword inputs."
        elif is_of_dtypes(str(own)):
            way_out = ". Inputs and weights have to be of one dtype: convert the inputs, or the network."
        return ValueError(f"{name} does not run on example_input {shapes}: {first_line(own)}{way_out}")
    try:
        outputs(found)
    except Exception as own:
        return own if is_of_package(own) else ValueError(f"outputs= fails on what {name} returns: {first_line(own)}")
    if isinstance(error, UnreadableOutput):
        return ValueError(
            f"{name} returns {error}, in which tensors cannot be found, so that it is not known what has to stay as it "
            f"is. Pass outputs=, the names of the outputs that count or a function that returns them."
        )
    return ExportError(
        f"torch.export cannot follow {name} in {'train' if training else 'eval'} mode: {first_line(error)} "
        "What usually helps: no branches on tensor values, no .item() or numpy inside forward."
    )


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _of_export(program: Any) -> Program:
    """Return what `torch.export` found."""
    state, outputs = dict(_read_state(program)), dict(_named_outputs(program))
    return Program(program.graph_module, state, program.constants, outputs, program.call_spec.in_spec)


def _of_recording(model: nn.Module, found: Recording) -> Program:
    """Return what one run did."""
    saved, buffers = set(model.state_dict()), dict(model.named_buffers())
    state = {
        node: State("parameter" if name not in buffers else "buffer" if name in saved else "constant", name)
        for node, name in found.state.items()
    }
    places = {(x.data_ptr(), x.shape): name for name, x in plain_tensors(model).items()}
    named = {node: places.get((x.data_ptr(), x.shape), node) for node, x in found.constants.items()}
    state |= {node: State("constant", name) for node, name in named.items()}
    constants = {name: buffer for name, buffer in buffers.items() if name not in saved}
    constants |= {named[node]: x for node, x in found.constants.items()}
    return Program(found.module, state, constants, found.outputs, found.structure, True, found.others)


def _read_state(program: Any) -> Iterator[tuple[str, State]]:
    from torch.export.graph_signature import InputKind

    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER:
            yield spec.arg.name, State("parameter", spec.target)
        elif spec.kind is InputKind.BUFFER:
            yield spec.arg.name, State("buffer" if spec.persistent else "constant", spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            yield spec.arg.name, State("constant", spec.target)


def _named_outputs(program: Any) -> Iterator[tuple[int, str]]:
    """Yield the place of each output that is a tensor among what the graph returns, and what the model calls it."""
    from torch.export.graph_signature import OutputKind, TensorArgument

    specs = enumerate(program.graph_signature.output_specs)
    made = [(place, spec.arg) for place, spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    for (place, argument), name in zip(made, leaf_names(program.call_spec.out_spec), strict=True):
        if isinstance(argument, TensorArgument):
            yield place, name
