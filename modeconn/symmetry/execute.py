"""How one operator of a graph is run: in which precision, on which device, without dropout."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.fx import Node


_UNINITIALISED = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided")
}
"""Operators whose values mean nothing until something is written there."""


def call(
    node: Node,
    target: Any,
    env: dict[Node, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    running_statistics: bool,
) -> Any:
    """Run one operator.

    Args:
        node: Where it stands in the graph, with its arguments.
        target: What to call in place of the node's own target, or this.
        env: The values of the nodes before it.
        device: Where tensors are made.
        dtype: Every cast to a floating type goes to this one; None leaves them.
        running_statistics: Let batch norm use them also in train mode.
    """
    from torch.fx.node import map_aggregate

    if getattr(node.target, "__name__", "").startswith("_assert"):
        return None  # export's own checks of dtypes, which a run in another precision does not meet

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, torch.fx.Node):
            return env[leaf]
        if isinstance(leaf, torch.device):
            return device
        return in_precision(leaf, dtype) if dtype is not None and isinstance(leaf, torch.dtype) else leaf

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
        value = value.to(in_precision(value.dtype, dtype))  # made of nothing or of integers, in torch's default type
    # What stands in memory that nobody has written to is not the same in two runs.
    return value.zero_() if getattr(node.target, "overloadpacket", None) in _UNINITIALISED else value


def in_precision(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
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


_GROUPED_MATMUL = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)  # torch 2.6 has none


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
