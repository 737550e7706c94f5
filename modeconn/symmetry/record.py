"""A second way to a graph: the operators of one run, where `torch.export` cannot follow values.

Numbers that a model reads from its tensors (``.item()``, ``if``, ``.tolist()``) are taken as they are on the example:
the graph is that of one path. What is read stays in the graph, so that whoever walks it sees which tensors decide.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from modeconn.symmetry.outputs import leaf_names


@dataclass(frozen=True)
class Recording:
    """The operators of one run.

    Args:
        module: The graph, with placeholders for the state, for tensors made on the way, and for inputs, in this order.
        state: The parameter or buffer that a placeholder stands for, by the placeholder's name.
        constants: Tensors that the model makes of nothing or holds as attributes, by the name of their placeholder.
        outputs: The name of each output, by its place among what the graph returns.
        structure: That of the inputs.
        others: The inputs that are no tensors.
        has_derivatives: Whether the run took derivatives.
    """

    module: Any
    state: dict[str, str]
    constants: dict[str, Tensor]
    outputs: dict[int, str]
    structure: pytree.TreeSpec
    others: tuple[Any, ...]
    has_derivatives: bool


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, as_called: bool = True) -> Recording:
    """Run a model once and return what it did.

    Args:
        model: A module that returns nested lists and dicts of tensors; buffers that it writes to are copies.
        args: Positional inputs.
        kwargs: Keyword inputs.
        as_called: Whether to keep operators as models call them; else those that they consist of, which can also be
            recorded where derivatives are taken inside ``torch.vmap``.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    state = dict(model.named_parameters()) | dict(model.named_buffers())
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names: list[str] = []

    def run(values: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        again = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        positional, keywords = pytree.tree_unflatten(again, structure)
        with _Readings():
            returned = torch.func.functional_call(model, dict(zip(state, values, strict=True)), positional, keywords)
        found, made = pytree.tree_flatten(returned)
        pairs = [(x, name) for x, name in zip(found, leaf_names(made), strict=True) if isinstance(x, Tensor)]
        names[:] = [name for _, name in pairs]
        return [x for x, _ in pairs]

    copies = [tensor.detach().clone() for tensor in state.values()]
    traced = make_fx(run, pre_dispatch=as_called, _error_on_data_dependent_ops=False)
    with _counting_derivatives() as derivatives:
        module = traced(copies, [tensor.detach().clone() for tensor in tensors])
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    constants = dict(_as_placeholders(module))
    _drop_modes(module)
    _share_mode(module)
    (returned,) = next(node for node in module.graph.nodes if node.op == "output").args
    return Recording(
        module=module,
        state={node.name: name for node, name in zip(places, state, strict=False)},
        constants=constants,
        outputs={at: name for at, (node, name) in enumerate(zip(returned, names, strict=True)) if node is not None},
        structure=structure,
        others=tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)),
        has_derivatives=bool(derivatives),
    )


@contextmanager
def _counting_derivatives() -> Iterator[list[None]]:
    """Yield a list that has an entry for each time that derivatives are taken inside."""
    taken: list[None] = []
    run = torch.autograd._engine_run_backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        return run(*args, **kwargs)

    torch.autograd._engine_run_backward = counted
    try:
        yield taken
    finally:
        torch.autograd._engine_run_backward = run


class _Readings(TorchFunctionMode):
    """Lets values that leave as lists or arrays be read one by one, by an operator that is recorded."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            values = _listed(args[0])
            return values if function is Tensor.tolist else np.array(values, dtype=_dtype_of(args[0]))
        return function(*args, **(kwargs or {}))


def _listed(tensor: Tensor) -> Any:
    return [_listed(part) for part in tensor.unbind(0)] if tensor.ndim else tensor.item()


def _dtype_of(tensor: Tensor) -> Any:
    return torch.empty((), dtype=tensor.dtype, device="cpu").numpy().dtype


def _as_placeholders(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Turn tensors that the graph holds as attributes into placeholders, as exported graphs have them."""
    graph = module.graph
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, node.target)
        if not isinstance(value, Tensor):
            continue
        with graph.inserting_before(first):
            place = graph.placeholder(f"constant_{node.name}")
        place.meta["val"] = value.detach()
        node.replace_all_uses_with(place)
        graph.erase_node(node)
        yield place.name, value.detach()


def _share_mode(module: Any) -> None:
    """Let the stand-ins for all values be of one mode, as in exported graphs: operators take none of several."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # decompositions hold numbers as tensors

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(stand_in, node.meta["val"])


_MAPS = "torch._functorch.predispatch"
"""Where the functions come from between which ``torch.vmap`` maps; `modeconn.symmetry.lower` writes them out."""


def _drop_modes(module: Any) -> None:
    """Leave out nodes that only change the mode of what follows, such as whether gradients are recorded."""
    for node in reversed(list(module.graph.nodes)):
        is_operator = isinstance(node.target, torch._ops.OperatorBase) or node.target is operator.getitem
        is_operator |= getattr(node.target, "__module__", None) == _MAPS
        if node.op == "call_function" and not is_operator and not node.users:
            module.graph.erase_node(node)
