"""Positions of the largest entries: which of several equal ones is found depends on their order.

Entries of a linear layer differ, so the position of the largest moves with the units. After a ReLU many are zero, and
which of them ``topk`` names is a matter of order: no relabelling keeps it. It does no harm where all that is done with
the positions is the same for each of the equal entries, as when their own values, zeros, are written into zeros.
"""

from __future__ import annotations

import operator
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from modeconn.symmetry.rules import contractions, recurrent
from modeconn.symmetry.rules.operators import is_written, name_of

if TYPE_CHECKING:
    from torch.fx import Node


class Ties(IntEnum):
    """Which entries of a tensor may be equal for any weights."""

    NONE = 0
    ZEROS = 1
    ANY = 2


_AT_ZERO = frozenset("relu hardshrink softshrink".split())
"""What makes many entries zero, and others not equal."""
_KEEP_ZERO = frozenset(
    "neg tanh asin sinh sin atan expm1 log1p sqrt abs square gelu silu mish elu selu celu leaky_relu prelu "
    "_prelu_kernel erf mul div multiply divide reciprocal sum pow".split()
)
"""Functions of which zero is zero, and which keep different entries different."""
_REPEAT = frozenset("expand expand_as repeat repeat_interleave broadcast_to".split())
"""What makes equal entries of one."""
_FOLLOW = frozenset(
    "exp log sigmoid softplus add sub rsub softmax log_softmax _softmax _log_softmax log_sigmoid where masked_fill "
    "addcmul addcdiv lerp logit cos exp2 layer_norm rms_norm group_norm instance_norm batch_norm native_batch_norm "
    "native_layer_norm mean var logsumexp cat stack cumsum flip roll max_pool2d adaptive_avg_pool2d avg_pool2d".split()
)
"""Functions that keep different entries different."""
SAME_ENTRIES = frozenset(
    "view reshape _unsafe_view view_as flatten unflatten permute transpose t numpy_T mT swapaxes "
    "squeeze unsqueeze expand expand_as slice select "
    "clone contiguous detach to _to_copy alias dropout movedim split split_with_sizes chunk unbind narrow".split()
)
"""Other readings of the same entries."""
_DIFFER = frozenset(map(name_of, {**contractions.RULES, **recurrent.RULES})) | {"embedding"}
"""Sums of products with weights: entries of different units differ."""
_WITH_BIAS = frozenset("linear addmm baddbmm conv1d conv2d conv3d convolution bilinear".split())
_IN_PLACE = SAME_ENTRIES - {
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "swapaxes",
    "movedim",
    "slice",
    "select",
    "narrow",
    "unbind",
    "chunk",
}
"""Readings in which each entry keeps its place beside the position at which it was found."""
_EMPTY = frozenset("zeros zeros_like new_zeros".split())


def ties_of(node: Node | None, reader: Node | None = None) -> Ties:
    """Return which entries of a tensor along its units may be equal when ``reader`` reads it: what is unknown may."""
    if node is None or is_written(node, reader):
        return Ties.ANY
    if _TIES not in node.meta:
        for each in node.graph.nodes:  # in order of execution: a recursion would be as deep as the model
            each.meta[_TIES] = _ties_by(each)
    return node.meta[_TIES]


_TIES = "modeconn.ties"
"""Where nodes keep their ties."""


def _ties_by(node: Node) -> Ties:
    """Return the ties of what a node makes, from those of its inputs."""
    if node.op == "placeholder":
        value = node.meta.get("val")
        return Ties.NONE if isinstance(value, torch.Tensor) and value.is_floating_point() else Ties.ANY
    inputs = {s: Ties.ANY if is_written(s, node) else s.meta[_TIES] for s in node.all_input_nodes if _has_entries(s)}
    most = max(inputs.values(), default=Ties.ANY)
    if node.target is operator.getitem:
        return most
    name = name_of(node.target).rstrip("_")  # in place or not
    if name in _DIFFER:
        has_bias = name in _WITH_BIAS and len(node.all_input_nodes) > 2
        return Ties.NONE if has_bias else min(most, Ties.ZEROS)  # sums of nothing but zeros are zero
    if name in _REPEAT or len(node.all_input_nodes) < len(_tensors(node.args)):
        return Ties.ANY
    if name in ("add", "sub") and any(_is_whole(s, node) and not ties for s, ties in inputs.items()):
        return Ties.NONE  # what differs, differs after anything is added to it
    if name in _AT_ZERO:
        return max(most, Ties.ZEROS)
    if name in _KEEP_ZERO | SAME_ENTRIES:
        return most
    return Ties.ANY if most or name not in _FOLLOW else Ties.NONE


def _is_whole(source: Node, node: Node) -> bool:
    """Whether a tensor has the shape of what is made of it, so that none of its entries is repeated."""
    value, made = source.meta.get("val"), node.meta.get("val")
    return isinstance(value, torch.Tensor) and [*map(str, value.shape)] == [*map(str, made.shape)]


def is_safe_to_read(index: Node | None, source: Node | None, reader: Node | None = None) -> bool:
    """Whether it makes no difference to what is read at found positions which of equal entries was found.

    Args:
        index: The positions.
        source: What is read.
        reader: What reads it: rows that are only multiplied by the entries that were found, zeros, count for nothing.
    """
    searched = _searched(index)
    if searched is None:
        return False
    ties = Ties.NONE if searched is source else ties_of(searched)
    return ties is Ties.NONE or (ties is Ties.ZEROS and reader is not None and _is_weighted(reader, index))


def _is_weighted(rows: Node, index: Node | None) -> bool:
    """Whether rows are only multiplied by the entries at whose positions they lie, one by one or summed over them."""
    if name_of(rows.target) in ("embedding_bag", "_embedding_bag"):
        weights = rows.args[6] if len(rows.args) > 6 else rows.kwargs.get("per_sample_weights")
        return _is_zero_with(weights, index)
    for user in rows.users:
        others = [source for source in user.all_input_nodes if source is not rows]
        if len(others) != 1 or not _is_zero_with(others[0], index):
            return False
        factor, found, name = others[0].meta["val"].shape, rows.meta["val"].shape, name_of(user.target)
        by_row = name == "mul" and [*map(str, factor)] == [*map(str, found[:-1]), "1"]
        summed = name in ("bmm", "matmul") and user.args[0] is others[0] and _rows_of(factor) == _rows_of(found)
        if not (by_row or (summed and factor[-2] == 1)):
            return False
    return bool(rows.users)


def _rows_of(shape: Any) -> list[str]:
    """Return the size of a batch and the number of rows, of ``(batch, 1, rows)`` or ``(batch, rows, n)``."""
    return [str(shape[0]), str(shape[-1] if shape[-2] == 1 else shape[-2])] if len(shape) == 3 else []


def is_safe_to_write(index: Node | None, base: Node | None, values: Any, adds: bool) -> bool:
    """Whether writing to found positions gives the same whichever of equal entries was found."""
    searched = _searched(index)
    if searched is None or base is None:
        return False
    ties = ties_of(searched)
    if ties is Ties.NONE:
        return True
    is_zero_before = adds or name_of(base.target) in _EMPTY
    return ties is Ties.ZEROS and is_zero_before and _is_zero_with(values, index)


def _searched(index: Node | None) -> Node | None:
    """Return the tensor in which positions were searched."""
    index = _found(index)
    if index is None or index.op != "call_function" or is_written(index):
        return None
    search = index.args[0] if index.target is operator.getitem else index
    return search.args[0] if search.args and isinstance(search.args[0], torch.fx.Node) else None


def _found(index: Node | None) -> Node | None:
    """Return what found positions, of which a node is perhaps another reading."""
    while index is not None and index.op == "call_function" and name_of(index.target) in SAME_ENTRIES:
        index = index.args[0]
    return index


def _is_zero_with(values: Any, index: Node | None) -> bool:
    """Whether values are zero wherever the entry that was found is: the entry itself, or an odd function of it."""
    index = _found(index)
    if not isinstance(values, torch.fx.Node) or index is None or index.target is not operator.getitem:
        return False
    if is_written(values):
        return False
    if values.target is operator.getitem:
        return values.args == (index.args[0], 0)
    name = name_of(values.target)
    is_kept = name in _KEEP_ZERO - {"div", "divide", "reciprocal", "sum", "pow"} | _AT_ZERO | _IN_PLACE
    return is_kept and any(_is_zero_with(source, index) for source in values.all_input_nodes)


def _tensors(arguments: Any) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.fx.Node)]


def _has_entries(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dim() > 0
