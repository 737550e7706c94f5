"""One rule per operator: how the axes of its inputs act on the axes of its outputs.

A rule is called as ``rule(walk, *args, **kwargs)`` with the operator's own arguments, each tensor replaced by a
`Traced`, and returns the axes of the output (a list of axes; a list of such lists for several outputs). It is right if

1. axes that the operator indexes with one loop variable are unified;
2. an axis whose positions carry meaning (order, neighbours, integer indices) is fixed;
3. every tensor that the operator forms inside is shown (``walk.show``): the products of a contraction, statistics of a
   norm, the sum in a softmax, what is alike at all places of an axis that is mixed or reordered. They decide what may
   vary with what.

Rules only ever unify and fix, so their order does not matter. Shapes come from ``walk.shapes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from modeconn.symmetry.axes import UNIT, Axis

if TYPE_CHECKING:
    from modeconn.symmetry.discover import Walk

Rule = Callable[..., Any]
aten = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """A tensor of the graph.

    Args:
        axes: One axis per dimension.
        node: The graph node that made it.
        points_into: For a tensor of positions (argmax), the axis they count: whoever reads them fixes it.
    """

    axes: tuple[Axis, ...]
    node: Any = None
    points_into: Axis | None = None

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


# -------------------------------------------------------------------------------- elementwise


def broadcast(walk: Walk, tensors: Iterable[Traced], num_dims: int) -> list[Axis]:
    """Align to the right and unify; an axis of one position ties nothing."""
    axes: list[Axis] = [UNIT] * num_dims
    for tensor in tensors:
        offset = num_dims - len(tensor.axes)
        for dim, axis in enumerate(tensor.axes):
            if axis == UNIT:
                continue
            if axes[offset + dim] != UNIT:
                walk.unify(axes[offset + dim], axis)
            axes[offset + dim] = axis
    return axes


def pointwise(walk: Walk, *args: Any, **kwargs: Any) -> Any:
    """Any operator on entries of one place (``torch.Tag.pointwise``)."""
    out = broadcast(walk, traced_in((args, kwargs)), len(walk.shape))
    return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out


def same(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Keep the first tensor's axes, whatever lends it a type or a device."""
    return list(input.axes)


def fill(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """A tensor whose entries are all equal: any relabelling leaves it."""
    return [walk.free(size) for size in walk.shape]


def constant(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """A tensor of positions or random numbers."""
    return [walk.fixed(size, "values by position") for size in walk.shape]


def reordered(walk: Walk, input: Traced, dims: Sequence[int], why: str) -> list[Axis]:
    """Fix axes and give the output new ones in their place, since its positions are others or mixtures of them.

    Nothing else may vary along an old axis: the new one may turn out to be the same one later on (in a residual sum),
    and a position of it is not where it was.
    """
    for dim in dims:
        walk.fix(input.axes[dim], why)
    walk.show(input.without(*dims))
    return input.replace({dim: walk.fixed(walk.shape[dim], why) for dim in dims})


def fill_in_place(walk: Walk, input: Traced, value: Any = 0) -> list[Axis]:
    """``fill_``, ``zero_``: what was there no longer matters, where it was does."""
    return list(input.axes)


def randomize(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """Random numbers by position, in place of a tensor or drawn from laws that tensors tell."""
    for tensor in traced_in((args, kwargs)):
        for axis in tensor.axes:
            walk.fix(axis, "random numbers by position")
    return [walk.fixed(size, "random numbers by position") for size in walk.shape]


def identity_matrix(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """``eye``: rows and columns may only move alike."""
    rows, columns = walk.shape
    axis = walk.free(rows)
    return [axis, axis] if rows == columns else constant(walk)


# -------------------------------------------------------------------------------- contractions


def contraction(walk: Walk, operands: Sequence[Traced], labels: Sequence[str], out: str) -> list[Axis]:
    """A sum of products in Einstein's notation: one label, one axis."""
    named: dict[str, Axis] = {}
    for tensor, letters in zip(operands, labels, strict=True):
        for axis, letter in zip(tensor.axes, letters, strict=True):
            if named.get(letter, UNIT) != UNIT and axis != UNIT:
                walk.unify(named[letter], axis)
            elif axis != UNIT:
                named[letter] = axis
    for tensor, letters in zip(operands, labels, strict=True):
        for axis, letter in zip(tensor.axes, letters, strict=True):
            if letter not in out:
                walk.contract(tensor, axis)
    walk.show(named.values())
    return [named.get(letter, UNIT) for letter in out]


def linear(walk: Walk, input: Traced, weight: Traced, bias: Traced | None = None) -> list[Axis]:
    """``x W^T + b``."""
    batch = _letters(len(input.axes) - 1)
    out = contraction(
        walk, [input, weight], [batch + "I", "OI"[2 - len(weight.axes) :]], batch + "O"[: len(weight.axes) - 1]
    )
    if bias is not None and bias.axes:
        walk.unify(out[-1], bias.axes[0])
    return out


def matmul(walk: Walk, input: Traced, other: Traced) -> list[Axis]:
    """``mm``, ``bmm``, ``mv``, ``dot`` and ``matmul`` with broadcast batch axes."""
    left, right = len(input.axes), len(other.axes)
    batch = _letters(max(left, right, 2) - 2)
    rows, columns = "I" * (left > 1), "J" * (right > 1)
    left_labels = batch[len(batch) - max(left - 2, 0) :] + rows + "K"
    right_labels = batch[len(batch) - max(right - 2, 0) :] + "K" + columns
    return contraction(walk, [input, other], [left_labels, right_labels], batch + rows + columns)


def add_matmul(walk: Walk, input: Traced, left: Traced, right: Traced, **scales: Any) -> list[Axis]:
    """``addmm``, ``baddbmm``, ``addmv``."""
    product = Traced(tuple(matmul(walk, left, right)))
    return broadcast(walk, [input, product], len(product.axes))


def einsum(walk: Walk, equation: str, tensors: Sequence[Traced], path: Any = None) -> list[Axis]:
    """Any einsum; an ellipsis stands for the axes that the letters leave."""
    left, _, right = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    spare = [c for c in "αβγδεζηθικλμ"]
    width = max(len(t.axes) - len(s.replace("...", "")) for t, s in zip(tensors, labels, strict=True))
    dots = "".join(spare[:width])
    labels = [
        s.replace("...", dots[width - (len(t.axes) - len(s.replace("...", ""))) :])
        for t, s in zip(tensors, labels, strict=True)
    ]
    if "->" not in equation:
        once = "".join(labels)
        right = dots + "".join(sorted(c for c in set(once) if once.count(c) == 1 and c not in dots))
    return contraction(walk, tensors, labels, right.replace("...", dots))


def bilinear(walk: Walk, left: Traced, right: Traced, weight: Traced, bias: Traced | None = None) -> list[Axis]:
    """``x1^T W x2 + b``."""
    batch = _letters(len(left.axes) - 1)
    out = contraction(walk, [left, weight, right], [batch + "I", "OIJ", batch + "J"], batch + "O")
    if bias is not None:
        walk.unify(out[-1], bias.axes[0])
    return out


def grouped_matmul(
    walk: Walk,
    input: Traced,
    other: Traced,
    offsets: Traced | None = None,
    bias: Traced | None = None,
    out_dtype: Any = None,
) -> list[Axis] | None:
    """Matrix products of consecutive groups of rows (or columns) with one matrix each: experts and their tokens."""
    if bias is not None:
        return None
    left = "GTK"[3 - len(input.axes) :]
    right = "GKJ"[3 - len(other.axes) :]
    grouped = {(2, 3): "TG", (3, 2): "JG", (2, 2): "K", (3, 3): ""}[len(input.axes), len(other.axes)]
    for tensor, letters in ((input, left), (other, right)):
        for axis, letter in zip(tensor.axes, letters, strict=True):
            if letter in grouped:
                walk.fix(axis, "grouped by number")
    out = contraction(walk, [input, other], [left, right], "GTJ" if left[0] == right[0] == "G" else "TJ")
    return [walk.fixed(walk.shape[0], "grouped by number"), *out] if grouped == "K" else out


def distances(walk: Walk, left: Traced, right: Traced, *settings: Any) -> list[Axis]:
    """``cdist``: a sum over one axis for every pair of rows."""
    return matmul(walk, left, Traced(tuple(transpose(walk, right)), right.node))


def distance(walk: Walk, input: Traced, other: Traced, p: Any = 2) -> list[Axis]:
    """The norm of a difference."""
    for axis in broadcast(walk, [input, other], max(len(input.axes), len(other.axes))):
        walk.contract(input, axis)
    return []


def of_last_dims(num_dims: int) -> Rule:
    """Anything made of the last ``num_dims`` axes for each index of the others: inverses, decompositions."""

    def rule(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
        num_batch = len(input.axes) - num_dims
        alike = [t for t in traced_in((input, args, kwargs)) if len(t.axes) == len(input.axes)]
        batch = broadcast(walk, [Traced(t.axes[:num_batch]) for t in alike], num_batch)
        for tensor in traced_in((input, args, kwargs)):
            for axis in tensor.axes[num_batch:] if tensor in alike else tensor.axes:
                walk.fix(axis, "ordered")
        walk.show(batch)
        out = [[*batch, *(walk.fixed(n, "ordered") for n in shape[num_batch:])] for shape in walk.shapes]
        return out if len(out) > 1 else out[0]

    return rule


def outer(walk: Walk, left: Traced, right: Traced) -> list[Axis]:
    """Every product of an entry of one vector with one of another."""
    return [left.axes[0], right.axes[0]]


def _letters(count: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[:count]


def _convolve(walk: Walk, x: Traced, weight: Traced, bias: Traced | None, groups: int, transposed: bool) -> list[Axis]:
    channel = len(x.axes) - len(weight.axes) + 1
    size = walk.size(x.axes[channel])
    group, inner = walk.split(x.axes[channel], (groups, size // groups))
    if transposed:
        outer = weight.axes[1]
        walk.unify(x.axes[channel], weight.axes[0])
    else:
        weight_group, outer = walk.split(weight.axes[0], (groups, walk.size(weight.axes[0]) // groups))
        walk.unify(group, weight_group)
        walk.unify(inner, weight.axes[1])
    out = walk.product([group, outer])
    walk.contract(x, inner)
    if bias is not None:
        walk.unify(out, bias.axes[0])
    space = list(x.axes[channel + 1 :])
    pointwise = _pointwise_dims(walk, weight)
    walk.show([*x.axes[:channel], group, outer, inner, *(space[dim] for dim in pointwise)])
    for dim, size in enumerate(walk.shape[channel + 1 :]):
        if dim not in pointwise:
            walk.fix(space[dim], "neighbours in a convolution")
            walk.fix(weight.axes[2 + dim], "neighbours in a convolution")
            space[dim] = walk.fixed(size, "neighbours in a convolution")
    return [*x.axes[:channel], out, *space]


def _pointwise_dims(walk: Walk, weight: Traced) -> list[int]:
    """Return the spatial dimensions along which places do not mix: one tap, no stride, no padding."""
    dims = range(len(weight.axes) - 2)

    def per_dim(name: str) -> list[int]:
        setting = walk.arguments.get(name, 0)
        setting = 0 if isinstance(setting, str) else setting  # "same" pads one tap by nothing
        values = list(setting) if isinstance(setting, (list, tuple)) else [setting]
        return values * len(dims) if len(values) == 1 else values

    stride, padding, output_padding = map(per_dim, ("stride", "padding", "output_padding"))
    return [
        dim
        for dim in dims
        if weight.axes[2 + dim] == UNIT and (stride[dim], padding[dim], output_padding[dim]) == (1, 0, 0)
    ]


def conv(
    walk: Walk,
    input: Traced,
    weight: Traced,
    bias: Traced | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Axis]:
    """Convolution in 1 to 3 dimensions; channels are groups x channels of a group."""
    return _convolve(walk, input, weight, bias, groups, transposed=False)


def conv_transpose(
    walk: Walk,
    input: Traced,
    weight: Traced,
    bias: Traced | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> list[Axis]:
    """Transposed convolution: the weight's first axis is the input's."""
    return _convolve(walk, input, weight, bias, groups, transposed=True)


def convolution(
    walk: Walk,
    input: Traced,
    weight: Traced,
    bias: Traced | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> list[Axis]:
    """The general operator behind both."""
    return _convolve(walk, input, weight, bias, groups, transposed)


def attention(
    walk: Walk,
    query: Traced,
    key: Traced,
    value: Traced,
    attn_mask: Traced | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[Axis]:
    """``softmax(q k^T) v``; with ``enable_gqa`` each key and value head serves several query heads."""
    if enable_gqa:
        heads = walk.size(key.axes[-3])
        repeats = walk.free(walk.size(query.axes[-3]) // heads)
        key, value = (Traced(tuple(t.replace({-3: walk.product([t.axes[-3], repeats])})), t.node) for t in (key, value))
    rank = max(len(t.axes) for t in (query, key, value))
    letters = _letters(rank - 2)
    of_query, of_key, of_value = (letters[rank - len(t.axes) :] for t in (query, key, value))
    batch = max(of_query, of_key, key=len)
    scores = contraction(walk, [query, key], [of_query + "TD", of_key + "SD"], batch + "TS")
    if attn_mask is not None:
        scores = broadcast(walk, [Traced(tuple(scores)), attn_mask], len(scores))
    if is_causal:
        for axis in scores[-2:]:
            walk.fix(axis, "causal order")
    walk.show(scores)
    walk.show(scores[:-1])
    return contraction(walk, [Traced(tuple(scores)), value], [batch + "TS", of_value + "SE"], letters + "TE")


# -------------------------------------------------------------------------------- norms and reductions


def batch_norm(
    walk: Walk,
    input: Traced,
    weight: Traced | None,
    bias: Traced | None,
    running_mean: Traced | None,
    running_var: Traced | None,
    *settings: Any,
) -> Any:
    """Statistics per channel over everything else; the running ones are relabelled with it."""
    channel = input.axes[1]
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None:
            walk.unify(channel, vector.axes[0])
    walk.show([channel])
    return [list(input.axes)] + [[channel]] * (len(walk.shapes) - 1) if len(walk.shapes) > 1 else list(input.axes)


def instance_norm(
    walk: Walk,
    input: Traced,
    weight: Traced | None,
    bias: Traced | None,
    running_mean: Traced | None,
    running_var: Traced | None,
    *settings: Any,
) -> list[Axis]:
    """Statistics per example and channel."""
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None:
            walk.unify(input.axes[1], vector.axes[0])
    walk.show(input.axes[:2])
    walk.show([input.axes[1]])
    return list(input.axes)


def layer_norm(
    walk: Walk,
    input: Traced,
    normalized_shape: Sequence[int],
    weight: Traced | None = None,
    bias: Traced | None = None,
    *settings: Any,
    **more: Any,
) -> list[Axis]:
    """Statistics over the last axes (also RMS norm)."""
    first = len(input.axes) - len(normalized_shape)
    for scale in (weight, bias):
        if isinstance(scale, Traced):
            for x, y in zip(input.axes[first:], scale.axes, strict=True):
                walk.unify(x, y)
    walk.show(input.axes[:first])
    return list(input.axes)


def group_norm(
    walk: Walk, input: Traced, num_groups: int, weight: Traced | None = None, bias: Traced | None = None, *settings: Any
) -> list[Axis]:
    """Statistics per example and group of neighbouring channels."""
    for scale in (weight, bias):
        if scale is not None:
            walk.unify(input.axes[1], scale.axes[0])
    width = walk.size(input.axes[1]) // num_groups
    segments = [(segment,) for segment in walk.normal(input.axes[1])]
    if all(walk.size(segment) % width == 0 for segment in segments):
        groups = [walk.split(segment, (walk.size(segment) // width, width))[0] for segment in segments]
    else:
        groups = walk.split(input.axes[1], (num_groups, width))[:1]
    walk.show([input.axes[0], walk.concatenate(groups)])
    return list(input.axes)


def softmax(walk: Walk, input: Traced, dim: int, *settings: Any, **more: Any) -> list[Axis]:
    """A sum over one axis divides every entry along it."""
    walk.show(input.without(dim))
    return list(input.axes)


def weight_norm(walk: Walk, v: Traced, g: Traced, dim: int = 0) -> list[Axis]:
    """``g v / ||v||``, a norm per position of ``dim``."""
    walk.show([v.axes[dim]])
    return broadcast(walk, [v, g], len(v.axes))


def _reduced_dims(walk: Walk, input: Traced) -> list[int]:
    dims = walk.arguments.get("dim")
    if dims is None or dims == []:
        return list(range(len(input.axes)))
    return [d % len(input.axes) for d in ([dims] if isinstance(dims, int) else dims)] if input.axes else []


def reduction(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
    """Sum, mean, maximum, norm over axes, in any order of their positions; positions found are fixed when read."""
    dims = _reduced_dims(walk, input)
    for dim in dims:
        walk.contract(input, input.axes[dim])
    kept = [
        UNIT if d in dims else a for d, a in enumerate(input.axes) if d not in dims or walk.arguments.get("keepdim")
    ]
    return [kept] * len(walk.shapes) if len(walk.shapes) > 1 else kept


def arg_reduction(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Traced]:
    """``argmax``, ``argmin``."""
    dims = _reduced_dims(walk, input)
    axes = reduction(walk, input)
    return [Traced(tuple(axes), points_into=walk.concatenate(input.axes[d] for d in dims))]


def values_and_positions(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Traced]:
    """``max``, ``topk``, ``sort`` along one axis: the values do not depend on the order of the positions."""
    dim = walk.arguments.get("dim")
    dim = (-1 if dim is None else dim) % len(input.axes)
    if len(walk.shape) < len(input.axes):
        axes = input.without(dim)
    else:
        axes = input.replace({dim: walk.fixed(walk.shape[dim], "sorted")})
    walk.show(input.without(dim))
    walk.contract(input, input.axes[dim])
    return [Traced(tuple(axes)), Traced(tuple(axes), points_into=input.axes[dim])]


def ordered(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
    """``cumsum``, ``flip``, ``roll``: order along some axes carries meaning (all of them where none is named)."""
    dims = walk.arguments.get("dim", walk.arguments.get("dims"))
    dims = list(range(len(input.axes))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    changed = reordered(walk, input, dims, "ordered")
    return [changed] * len(walk.shapes) if len(walk.shapes) > 1 else changed


def fourier(walk: Walk, input: Traced, dim: Sequence[int], *settings: Any) -> list[Axis]:
    """A Fourier transform: order along the transformed axes carries meaning."""
    return reordered(walk, input, dim, "ordered")


def diagonal(walk: Walk, input: Traced, offset: int = 0, dim1: int = 0, dim2: int = 1) -> list[Axis]:
    """Entries with equal index in two axes."""
    if offset == 0 and walk.size(input.axes[dim1]) == walk.size(input.axes[dim2]):
        walk.unify(input.axes[dim1], input.axes[dim2])
        return [*input.without(dim1, dim2), input.axes[dim1]]
    for dim in (dim1, dim2):
        walk.fix(input.axes[dim], "ordered")
    walk.show(input.without(dim1, dim2))
    return [*input.without(dim1, dim2), walk.fixed(walk.shape[-1], "ordered")]


def triangle(walk: Walk, input: Traced, *args: Any) -> list[Axis]:
    """``tril``, ``triu``: the last two axes are ordered."""
    for axis in input.axes[-2:]:
        walk.fix(axis, "ordered")
    return list(input.axes)


# -------------------------------------------------------------------------------- space


def spatial(num_dims: int) -> Rule:
    """Pooling and resizing: neighbours along the last ``num_dims`` axes, the others untouched."""

    def rule(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
        out = reordered(walk, input, range(-num_dims, 0), "neighbours in space")
        return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out

    return rule


def adaptive_average(num_dims: int) -> Rule:
    """Averages over regions of the last ``num_dims`` axes; one region is all of them, in any order."""
    regions = spatial(num_dims)

    def rule(walk: Walk, input: Traced, output_size: Any) -> list[Axis]:
        if any(size > 1 for size in walk.shape[-num_dims:]):
            return regions(walk, input)
        for axis in input.axes[-num_dims:]:
            walk.contract(input, axis)
        return [*input.axes[:-num_dims], *[UNIT] * num_dims]

    return rule


def grid_sample(walk: Walk, input: Traced, grid: Traced, *args: Any) -> list[Axis]:
    """Pixels looked up at positions."""
    for axis in (*input.axes[2:], *grid.axes[1:]):
        walk.fix(axis, "neighbours in space")
    walk.unify(input.axes[0], grid.axes[0])
    walk.show(input.axes[:2])
    return [*input.axes[:2], *(walk.fixed(n, "neighbours in space") for n in walk.shape[2:])]


def im2col(walk: Walk, input: Traced, *args: Any) -> list[Axis]:
    """Patches as columns: channels x kernel positions, blocks."""
    for axis in input.axes[-2:]:
        walk.fix(axis, "neighbours in space")
    walk.show(input.axes[:-2])
    kernel = walk.shape[-2] // walk.size(input.axes[-3])
    column = walk.product([input.axes[-3], walk.fixed(kernel, "neighbours in space")])
    return [*input.axes[:-3], column, walk.fixed(walk.shape[-1], "neighbours in space")]


def col2im(walk: Walk, input: Traced, *args: Any) -> list[Axis]:
    """Columns summed back into an image."""
    channels, kernel = walk.split(input.axes[-2], (walk.shape[-3], walk.size(input.axes[-2]) // walk.shape[-3]))
    for axis in (kernel, input.axes[-1]):
        walk.fix(axis, "neighbours in space")
    walk.show([*input.axes[:-2], channels])
    return [*input.axes[:-2], channels, *(walk.fixed(n, "neighbours in space") for n in walk.shape[-2:])]


def unpool(num_dims: int) -> Rule:
    """Maxima back to where they were found."""

    def rule(walk: Walk, input: Traced, indices: Traced, *args: Any) -> list[Axis]:
        both = broadcast(walk, [input, indices], len(input.axes))
        return reordered(walk, Traced(tuple(both)), range(-num_dims, 0), "neighbours in space")

    return rule


def unfold(walk: Walk, input: Traced, dim: int, size: int, step: int) -> list[Axis]:
    """Sliding windows along one axis."""
    return [
        *reordered(walk, input, [dim % len(input.axes)], "neighbours in space"),
        walk.fixed(size, "neighbours in space"),
    ]


def pad(walk: Walk, input: Traced, pad: Sequence[int], mode: str = "constant", value: Any = None) -> list[Axis]:
    """Constant entries before and behind are interchangeable; reflected ones are not."""
    axes, moved = list(input.axes), []
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(axes) - 1 - i
        if before == after == 0:
            continue
        if mode == "constant" and before >= 0 and after >= 0 and not walk.is_fixed(axes[dim]):
            axes[dim] = walk.concatenate([walk.free(before), axes[dim], walk.free(after)])
        else:
            moved.append(dim)
    reflected = reordered(walk, input, moved, "padded")
    return [reflected[dim] if dim in moved else axis for dim, axis in enumerate(axes)]


def constant_pad(walk: Walk, input: Traced, widths: Sequence[int], value: Any = 0) -> list[Axis]:
    """``pad`` below the dispatcher."""
    return pad(walk, input, widths)


def pixel_shuffle(walk: Walk, input: Traced, factor: int) -> list[Axis]:
    """``(c r r, h, w) -> (c, h r, w r)``."""
    channels, *blocks = walk.split(input.axes[-3], (walk.shape[-3], factor, factor))
    for axis in (*blocks, *input.axes[-2:]):
        walk.fix(axis, "neighbours in space")
    walk.show([*input.axes[:-3], channels])
    return [*input.axes[:-3], channels, *(walk.fixed(n, "neighbours in space") for n in walk.shape[-2:])]


def pixel_unshuffle(walk: Walk, input: Traced, factor: int) -> list[Axis]:
    """``(c, h r, w r) -> (c r r, h, w)``."""
    for axis in input.axes[-2:]:
        walk.fix(axis, "neighbours in space")
    walk.show(input.axes[:-2])
    blocks = walk.fixed(factor * factor, "neighbours in space")
    space = [walk.fixed(n, "neighbours in space") for n in walk.shape[-2:]]
    return [*input.axes[:-3], walk.product([input.axes[-3], blocks]), *space]


def channel_shuffle(walk: Walk, input: Traced, groups: int) -> list[Axis]:
    """Channels as groups x members become members x groups."""
    group, inner = walk.split(input.axes[1], (groups, walk.size(input.axes[1]) // groups))
    return input.replace({1: walk.product([inner, group])})


# -------------------------------------------------------------------------------- shapes


def reshape(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Any view of the same entries in the same order: shortest runs of axes with equal products correspond."""
    source = [axis for axis in input.axes if axis != UNIT]
    sizes = [walk.size(axis) for axis in source]
    out: list[Axis] = []
    run: list[Axis] = []
    i = 0
    wanted: list[int] = []
    if 0 in sizes:
        return [walk.fixed(n, "empty") for n in walk.shape]
    for size in walk.shape:
        if size == 1 and not wanted:
            out.append(UNIT)
            continue
        wanted.append(size)
        while i < len(source) and prod(map(walk.size, run)) < prod(wanted):
            run.append(source[i])
            i += 1
        if prod(map(walk.size, run)) == prod(wanted):
            out += walk.split(walk.product(run), wanted) if len(run) != len(wanted) else _pairwise(walk, run, wanted)
            run, wanted = [], []
    return out


def _pairwise(walk: Walk, run: list[Axis], wanted: list[int]) -> list[Axis]:
    return run if [walk.size(axis) for axis in run] == wanted else walk.split(walk.product(run), wanted)


def permute(walk: Walk, input: Traced, dims: Sequence[int]) -> list[Axis]:
    """Reorder the axes."""
    return [input.axes[dim] for dim in dims]


def transpose(walk: Walk, input: Traced, dim0: int = -2, dim1: int = -1) -> list[Axis]:
    """Exchange two axes (``t`` and ``mT`` the last two)."""
    if len(input.axes) < 2:
        return list(input.axes)
    return input.replace({dim0: input.axes[dim1], dim1: input.axes[dim0]})


def movedim(walk: Walk, input: Traced, source: Any, destination: Any) -> list[Axis]:
    """Move axes to other places."""
    order = list(torch.empty([1] * len(input.axes)).movedim(source, destination).shape)  # checks the arguments
    rank = len(order)
    source = [source] if isinstance(source, int) else source
    destination = [destination] if isinstance(destination, int) else destination
    places = {d % rank: s % rank for s, d in zip(source, destination, strict=True)}
    others = iter([d for d in range(rank) if d not in places.values()])
    return [input.axes[places[d] if d in places else next(others)] for d in range(rank)]


def expand(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Repeated entries are equal, hence interchangeable."""
    offset = len(walk.shape) - len(input.axes)
    return [
        walk.free(size) if dim < offset or input.axes[dim - offset] == UNIT else input.axes[dim - offset]
        for dim, size in enumerate(walk.shape)
    ]


def repeat(walk: Walk, input: Traced, repeats: Sequence[int]) -> list[Axis]:
    """Tiles: copies x positions."""
    offset = len(repeats) - len(input.axes)
    axes = [UNIT] * offset + list(input.axes)
    return [walk.product([walk.free(count), axis]) for count, axis in zip(repeats, axes, strict=True)]


def repeat_interleave(
    walk: Walk, input: Traced, repeats: Any = None, dim: int | None = None, **kwargs: Any
) -> list[Axis] | None:
    """Each position several times in a row: positions x copies; a number of times of its own, looked up."""
    if not isinstance(repeats, int):
        return None if dim is None else reordered(walk, input, [dim], "looked up by number")
    if dim is None:
        return [walk.product([walk.product(input.axes), walk.free(repeats)])]
    return input.replace({dim: walk.product([input.axes[dim], walk.free(repeats)])})


def cat(walk: Walk, tensors: Sequence[Traced], dim: int = 0) -> list[Axis]:
    """One behind the other; tensors of one position each are a stack."""
    tensors = [t for t in tensors if len(t.axes) == len(walk.shape)]  # torch skips empty one-dimensional tensors
    dim %= len(walk.shape)
    if len(tensors) > 1 and all(t.axes[dim] == UNIT for t in tensors):
        return stack(walk, [Traced(tuple(t.without(dim)), t.node) for t in tensors], dim)
    others = [Traced(tuple(t.replace({dim: UNIT}))) for t in tensors]
    axes = broadcast(walk, others, len(walk.shape))
    axes[dim] = walk.concatenate(t.axes[dim] for t in tensors)
    return axes


def stack(walk: Walk, tensors: Sequence[Traced], dim: int = 0) -> list[Axis]:
    """A new fixed axis; along it, every other axis may be relabelled differently."""
    over = walk.fixed(len(tensors), "stacked")
    axes = [walk.family(over, [t.axes[d] for t in tensors]) for d in range(len(tensors[0].axes))]
    dim %= len(axes) + 1
    return [*axes[:dim], over, *axes[dim:]]


def split(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[list[Axis]]:
    """``split``, ``chunk``, ``tensor_split``: consecutive pieces of one axis."""
    dim = walk.arguments.get("dim", 0) % len(input.axes)
    return [_piece(walk, input, dim, start, stop) for start, stop in _bounds(s[dim] for s in walk.shapes)]


def _bounds(sizes: Iterable[int]) -> Iterable[tuple[int, int]]:
    return pairwise(accumulate(sizes, initial=0))


def _piece(walk: Walk, input: Traced, dim: int, start: int, stop: int) -> list[Axis]:
    axis, size = input.axes[dim], walk.size(input.axes[dim])
    if (start, stop) == (0, size):
        return list(input.axes)
    if stop - start == 1 and not _cuttable(walk, input, dim):
        return [UNIT if d == dim else walk.member(a, axis, start) for d, a in enumerate(input.axes)]
    if walk.is_fixed(axis):
        walk.show(input.without(dim))
        return input.replace({dim: walk.fixed(stop - start, "sliced")})
    pieces = walk.cut(axis, [start, stop - start, size - stop])
    return input.replace({dim: pieces[1]})


def _cuttable(walk: Walk, input: Traced, dim: int) -> bool:
    """Whether one index is best taken by pinning that one position: nothing else could move differently there."""
    others_fixed = all(walk.is_fixed(axis) for axis in input.without(dim))
    return others_fixed and not walk.is_fixed(input.axes[dim])


def slice_(
    walk: Walk, input: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> list[Axis]:
    """A range of one axis; with a step, one member of each block."""
    dim %= len(input.axes)
    axis, size = input.axes[dim], walk.size(input.axes[dim])
    first, stop, _ = slice(start, end, step).indices(size)
    if step == 1:
        return _piece(walk, input, dim, first, max(first, stop))
    if size % step == 0 and first < step and walk.shape[dim] == size // step:
        blocks, offset = walk.split(axis, (size // step, step))
        return input.replace({dim: walk.member(blocks, offset, first)})
    return reordered(walk, input, [dim], "sliced")


def select(walk: Walk, input: Traced, dim: int, index: int) -> list[Axis]:
    """One index of an axis, which becomes fixed."""
    dim, axis = dim % len(input.axes), input.axes[dim]
    index %= walk.size(axis)
    if _cuttable(walk, input, dim):
        walk.cut(axis, [index, 1, walk.size(axis) - index - 1])
        return input.without(dim)
    return [walk.member(a, axis, index) for d, a in enumerate(input.axes) if d != dim]


def select_scatter(walk: Walk, input: Traced, src: Traced, dim: int, index: int) -> list[Axis]:
    """One index of an axis written."""
    return _written(walk, input, src, select(walk, input, dim, index))


def slice_scatter(
    walk: Walk, input: Traced, src: Traced, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> list[Axis] | None:
    """A range of one axis written."""
    first, stop, _ = slice(start, end, step).indices(walk.size(input.axes[dim]))
    return _written(walk, input, src, _piece(walk, input, dim, first, stop)) if step == 1 else None


def _written(walk: Walk, input: Traced, src: Traced, place: Sequence[Axis]) -> list[Axis]:
    for x, y in zip(place, src.axes, strict=True):
        walk.unify(x, y)
    return list(input.axes)


def unbind(walk: Walk, input: Traced, dim: int = 0) -> list[list[Axis]]:
    """Every index of an axis."""
    return [select(walk, input, dim, index) for index in range(len(walk.shapes))]


def glu(walk: Walk, input: Traced, dim: int = -1) -> list[Axis]:
    """The first half of an axis gated by the second."""
    half = walk.size(input.axes[dim]) // 2
    values, gates = walk.cut(input.axes[dim], [half, half])
    walk.unify(values, gates)
    return input.replace({dim: values})


# -------------------------------------------------------------------------------- looking things up


def embedding(walk: Walk, weight: Traced, indices: Traced, *settings: Any) -> list[Axis]:
    """Rows of a table by number."""
    walk.fix(weight.axes[0], "looked up by number")
    walk.show(weight.axes[1:])
    return [*indices.axes, *weight.axes[1:]]


def embedding_bag(
    walk: Walk,
    weight: Traced,
    indices: Traced,
    offsets: Traced,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Traced | None = None,
    *settings: Any,
) -> list[list[Axis]] | None:
    """Rows of a table by number, summed or averaged over bags; for maxima, positions too are returned."""
    if mode == 2:
        return None
    for tensor in traced_in([indices, offsets, per_sample_weights]):
        for axis in tensor.axes:
            walk.fix(axis, "counted off into bags")
    bags, *rest = [[walk.fixed(n, "counted off into bags") for n in shape] for shape in walk.shapes]
    return [[bags[0], embedding(walk, weight, indices)[-1]], *rest]


def index_select(walk: Walk, input: Traced, dim: int, index: Traced) -> list[Axis]:
    """Positions of one axis by number."""
    if input.axes and (number := walk.number(index)) is not None:
        dim, number = dim % len(input.axes), number % walk.size(input.axes[dim])
        return _piece(walk, input, dim, number, number + 1)
    walk.fix(input.axes[dim], "looked up by number")
    walk.show(input.without(dim))
    return input.replace({dim: index.axes[0] if index.axes else UNIT})


def gather(walk: Walk, input: Traced, dim: int, index: Traced, **kwargs: Any) -> list[Axis] | None:
    """Positions of one axis by a number for each entry."""
    if not input.axes or len(index.axes) != len(input.axes):
        return None
    dim %= len(input.axes)
    walk.fix(input.axes[dim], "looked up by number")
    walk.show(input.without(dim))
    for d, (x, i) in enumerate(zip(input.axes, index.axes, strict=True)):
        if d == dim:
            continue
        if walk.size(x) == walk.size(i):
            walk.unify(x, i)
        else:
            walk.fix(x, "looked up by number")
            walk.fix(i, "looked up by number")
    return list(index.axes)


def index(walk: Walk, input: Traced, indices: Sequence[Traced | None]) -> list[Axis] | None:
    """Advanced indexing by integers; boolean masks depend on values and are left to the unknown."""
    if any(i is not None and walk.dtype(i) in (torch.bool, torch.uint8) for i in indices):
        return None
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) == 1 and (number := walk.number(indices[used[0]])) is not None:  # x[:, [3]] is a select
        chosen = select(walk, input, used[0], number)
        return [*chosen[: used[0]], *[UNIT] * len(indices[used[0]].axes), *chosen[used[0] :]]
    for dim in used:
        walk.fix(input.axes[dim], "looked up by number")
    looked_up = [i for i in indices if i is not None]
    picked = broadcast(walk, looked_up, max(len(i.axes) for i in looked_up))
    rest = input.without(*used)
    walk.show(rest)
    together = used[-1] - used[0] + 1 == len(used)
    at = used[0] if together else 0
    return [*rest[:at], *picked, *rest[at:]]


def one_hot(walk: Walk, input: Traced, num_classes: int = -1) -> list[Axis]:
    """Numbers as indicators of a new axis."""
    return [*input.axes, walk.fixed(walk.shape[-1], "counted by number")]


def histogram(walk: Walk, input: Traced, *settings: Any) -> list[Axis]:
    """How often each value occurs, wherever it does."""
    for axis in input.axes:
        walk.contract(input, axis)
    return [walk.fixed(walk.shape[0], "counted by number")]


def searchsorted(walk: Walk, sequence: Traced, input: Any, *, sorter: Any = None, **settings: Any) -> list[Axis] | None:
    """The place of each entry in a sorted sequence, one for all or one for each index of the other axes."""
    if sorter is not None:
        return None
    axes = list(input.axes) if isinstance(input, Traced) else []
    walk.fix(sequence.axes[-1], "ordered")
    if len(sequence.axes) > 1:
        for x, y in zip(sequence.axes[:-1], axes[:-1], strict=True):
            walk.unify(x, y)
    walk.show([*axes, sequence.axes[-1]])
    return axes


def bucketize(walk: Walk, input: Any, boundaries: Traced, **settings: Any) -> list[Axis] | None:
    """``searchsorted`` with the entries first."""
    return searchsorted(walk, boundaries, input)


# -------------------------------------------------------------------------------- writing by number


def scatter_reduce(
    walk: Walk, input: Traced, dim: int, index: Traced, src: Any = None, *settings: Any, **more: Any
) -> list[Axis] | None:
    """Entries to positions of one axis by a number for each, where they meet in any order: a sum, an extreme."""
    if not input.axes or len(index.axes) != len(input.axes):
        return None
    dim %= len(input.axes)
    walk.fix(input.axes[dim], "written to by number")
    walk.show(input.without(dim))
    written = [index, src] if isinstance(src, Traced) else [index]
    for d, axis in enumerate(input.axes):
        axes = [t.axes[d] for t in written] + ([axis] if d != dim else [])
        for x, y in pairwise(axes):
            if walk.size(x) == walk.size(y):
                walk.unify(x, y)
            else:  # a part of it, from the beginning
                walk.fix(x, "written to by number")
                walk.fix(y, "written to by number")
    return list(input.axes)


def scatter(walk: Walk, input: Traced, dim: int, index: Traced, *values: Any, **more: Any) -> list[Axis] | None:
    """Entries to positions of one axis by a number for each: the last one stays."""
    if index.axes:
        walk.fix(index.axes[dim], "written in order")
    return scatter_reduce(walk, input, dim, index, *values)


def index_put(
    walk: Walk,
    input: Traced,
    indices: Sequence[Traced | None],
    values: Traced,
    accumulate: bool = False,
    unsafe: bool = False,
) -> list[Axis] | None:
    """What advanced indexing reads is written: summed in any order, or the last one stays."""
    given = [i for i in indices if i is not None]
    if any(walk.dtype(i) in (torch.bool, torch.uint8, None) for i in given):
        return _put_where(walk, input, indices, values) if len(given) == 1 else None
    for axis in () if accumulate else (axis for i in given for axis in i.axes):
        walk.fix(axis, "written in order")
    place = index(walk, input, indices) or []
    broadcast(walk, [Traced(tuple(place)), values], len(place))
    return list(input.axes)


def _put_where(walk: Walk, input: Traced, indices: Sequence[Traced | None], values: Traced) -> list[Axis] | None:
    """One value for all places of a mask; other values are counted off along it, and left to the unknown."""
    mask = next(i for i in indices if i is not None)
    behind = len(input.axes) - indices.index(mask) - len(mask.axes)
    first = max(len(values.axes) - behind, 0)
    before, after = values.axes[:first], values.axes[first:]
    if walk.dtype(mask) is None or before[-1:] not in ((), (UNIT,)):
        return None
    where = Traced((*mask.axes, *[UNIT] * behind))
    what = Traced((*before[:-1], *[UNIT] * len(mask.axes), *after))
    return broadcast(walk, [input, where, what], len(input.axes))


def index_add(walk: Walk, input: Traced, dim: int, index: Traced, source: Traced, **scale: Any) -> list[Axis] | None:
    """Slices along one axis added to its positions by number."""
    return _put_slices(walk, input, dim, index, source, accumulate=True)


def index_copy(walk: Walk, input: Traced, dim: int, index: Traced, source: Traced) -> list[Axis] | None:
    """Slices along one axis written to its positions by number."""
    return _put_slices(walk, input, dim, index, source, accumulate=False)


def _put_slices(
    walk: Walk, input: Traced, dim: int, index: Traced, source: Traced, accumulate: bool
) -> list[Axis] | None:
    if not input.axes or not index.axes:
        return None
    return index_put(walk, input, [None] * (dim % len(input.axes)) + [index], source, accumulate)


def index_fill(walk: Walk, input: Traced, dim: int, index: Traced, value: Any) -> list[Axis]:
    """One value at positions of one axis."""
    if input.axes:
        walk.fix(input.axes[dim], "written to by number")
    return list(input.axes)


def masked_scatter(walk: Walk, input: Traced, mask: Traced, source: Traced) -> list[Axis]:
    """Entries of a source, in order, to the places of a mask; whole rows where the mask repeats itself along them."""
    strides = mask.node.meta["val"].stride() if mask.node is not None else [1] * len(mask.axes)
    rows = 0
    for x, y, m, stride in zip(*(reversed(t.axes) for t in (input, source, mask)), reversed(strides), strict=False):
        if walk.size(x) != walk.size(y) or (m != UNIT and stride != 0):
            break
        walk.unify(x, y)
        rows += 1
    for tensor in (input, source, mask):
        for axis in tensor.axes[: len(tensor.axes) - rows]:
            walk.fix(axis, "written in order")
    walk.show(input.axes[len(input.axes) - rows :])
    return list(input.axes)


# -------------------------------------------------------------------------------- recurrent networks


def _cell(walk: Walk, x: Axis, weights: Sequence[Traced], hidden: Axis, projection: Axis | None = None) -> None:
    """One layer and direction: gates x hidden units, the same units in every gate and in the state."""
    size = walk.size(hidden)
    state = hidden if projection is None else projection
    matrices, biases = [w for w in weights if len(w.axes) == 2], [w for w in weights if len(w.axes) == 1]
    if projection is not None:
        walk.unify(matrices[2].axes[0], projection)
        walk.unify(matrices[2].axes[1], hidden)
        walk.contract(Traced((hidden,)), hidden)
    for matrix, source in zip(matrices[:2], (x, state), strict=True):
        walk.unify(matrix.axes[1], source)
        walk.contract(Traced((source,)), source)
    for weight in (*matrices[:2], *biases):
        gates, units = walk.split(weight.axes[0], (walk.size(weight.axes[0]) // size, size))
        walk.fix(gates, "gates of a recurrent cell")
        walk.unify(units, hidden)
    walk.show([hidden])


def recurrent_cell(walk: Walk, input: Traced, hx: Any, *weights: Traced | None) -> Any:
    """``lstm_cell``, ``gru_cell``, ``rnn_*_cell``."""
    states = [hx] if isinstance(hx, Traced) else list(hx)
    hidden = states[0].axes[-1]
    for state in states:
        walk.unify(state.axes[-1], hidden)
    walk.contract(states[0], hidden)
    walk.contract(input, input.axes[-1])
    _cell(walk, input.axes[-1], [w for w in weights if w is not None], hidden)
    batch = broadcast(walk, [Traced(tuple(t.axes[:-1])) for t in (input, *states)], len(states[0].axes) - 1)
    walk.show(batch)
    out = [*batch, hidden]
    return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out


def recurrent(
    walk: Walk,
    input: Traced,
    hx: Any,
    params: Sequence[Traced],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[list[Axis]]:
    """``lstm``, ``gru``, ``rnn_*`` over a sequence; states are stacks over layers and directions."""
    states = [hx] if isinstance(hx, Traced) else list(hx)
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * directions)
    walk.fix(input.axes[1 if batch_first else 0], "order in time")
    x, finals, cells = input.axes[-1], [], []
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            k = layer * directions + direction
            weights = params[k * per_cell : (k + 1) * per_cell]
            projected = sum(len(w.axes) == 2 for w in weights) == 3
            state = walk.free(walk.size(weights[1].axes[1]))
            hidden = walk.free(walk.size(weights[-1].axes[1])) if projected else state
            _cell(walk, x, weights, hidden, state if projected else None)
            for s, axis in zip(states, (state, hidden), strict=False):
                walk.unify(walk.member(s.axes[-1], s.axes[0], k), axis)
            outs.append(state)
            finals.append(state)
            cells.append(hidden)
        x = walk.concatenate(outs)
    walk.contract(input, input.axes[-1])
    over = walk.fixed(num_layers * directions, "layers")
    batch = [input.axes[0 if batch_first else 1]] if len(input.axes) == 3 else []
    for s in states:
        for axis, entries in zip(batch, s.axes[1:], strict=False):
            walk.unify(axis, entries)
    walk.show(batch)
    stacks = [[over, *batch, walk.family(over, axes)] for axes in (finals, cells)]
    return [[*input.axes[:-1], x], *stacks[: len(walk.shapes) - 1]]


# -------------------------------------------------------------------------------- complex numbers


def view_as_complex(walk: Walk, input: Traced) -> list[Axis]:
    """A last axis of real and imaginary parts goes."""
    walk.fix(input.axes[-1], "real and imaginary part")
    return list(input.axes[:-1])


def view_as_real(walk: Walk, input: Traced) -> list[Axis]:
    """A last axis of real and imaginary parts comes."""
    return [*input.axes, walk.fixed(2, "real and imaginary part")]


def prelu(walk: Walk, input: Traced, weight: Traced) -> list[Axis]:
    """A slope per channel, or one for all."""
    if weight.axes and weight.axes[0] != UNIT:
        walk.unify(input.axes[1] if len(input.axes) > 1 else input.axes[0], weight.axes[0])
    return list(input.axes)


def _table(names: dict[Rule, str]) -> dict[Any, Rule]:
    return {getattr(aten, name): rule for rule, text in names.items() for name in text.split() if hasattr(aten, name)}


RULES: dict[Any, Rule] = _table(
    {
        same: "clone contiguous detach alias to _to_copy type_as dropout feature_dropout alpha_dropout "
        "feature_alpha_dropout lift_fresh lift_fresh_copy positive resolve_conj resolve_neg",
        pointwise: "where masked_fill copy rsub pow complex polar _prelu_kernel rrelu hardtanh celu softplus threshold "
        "isclose fake_quantize_per_tensor_affine "
        "__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide "
        "hardswish log_sigmoid multiply subtract divide negative absolute greater less greater_equal less_equal "
        "not_equal fix arctan2 conj",
        fill: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
        "empty_permuted empty_strided new_empty_strided scalar_tensor",
        fill_in_place: "fill zero",
        randomize: "uniform normal exponential log_normal cauchy geometric random bernoulli bernoulli_",
        fourier: "_fft_c2c _fft_r2c _fft_c2r",
        diagonal: "diagonal",
        constant: "arange linspace logspace rand randn randint randperm rand_like randn_like tril_indices triu_indices",
        identity_matrix: "eye",
        linear: "linear",
        matmul: "matmul mm bmm mv dot",
        add_matmul: "addmm baddbmm addmv",
        einsum: "einsum",
        bilinear: "bilinear",
        distances: "_cdist_forward",
        distance: "dist",
        of_last_dims(1): "stft",
        of_last_dims(2): "istft linalg_inv_ex linalg_cholesky_ex _linalg_solve_ex linalg_solve_triangular _linalg_det "
        "_linalg_slogdet _linalg_eigh linalg_eig linalg_qr _linalg_svd linalg_matrix_exp linalg_pinv cholesky_solve",
        outer: "outer ger",
        grouped_matmul: "_grouped_mm",
        conv: "conv1d conv2d conv3d",
        conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
        convolution: "convolution",
        attention: "scaled_dot_product_attention",
        batch_norm: "batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _batch_norm_impl_index",
        instance_norm: "instance_norm",
        layer_norm: "layer_norm rms_norm",
        group_norm: "group_norm",
        softmax: "softmax log_softmax _softmax _log_softmax _safe_softmax",
        weight_norm: "_weight_norm",
        reduction: "sum mean amax amin prod var std norm linalg_vector_norm logsumexp all any nansum "
        "nanmean var_mean std_mean count_nonzero",
        arg_reduction: "argmax argmin",
        values_and_positions: "topk sort median nanmedian kthvalue mode",
        ordered: "cumsum cumprod cummax cummin logcumsumexp flip roll fliplr flipud rot90 fft_fft fft_ifft "
        "fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn "
        "fft_irfftn fft_fftshift fft_ifftshift",
        triangle: "tril triu",
        spatial(1): "max_pool1d avg_pool1d adaptive_max_pool1d max_pool1d_with_indices "
        "upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d reflection_pad1d replication_pad1d",
        spatial(2): "max_pool2d avg_pool2d adaptive_max_pool2d "
        "max_pool2d_with_indices upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d fractional_max_pool2d",
        spatial(3): "max_pool3d avg_pool3d adaptive_max_pool3d "
        "max_pool3d_with_indices upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d "
        "replication_pad3d fractional_max_pool3d",
        adaptive_average(1): "adaptive_avg_pool1d",
        adaptive_average(2): "adaptive_avg_pool2d _adaptive_avg_pool2d",
        adaptive_average(3): "adaptive_avg_pool3d _adaptive_avg_pool3d",
        grid_sample: "grid_sampler grid_sampler_2d grid_sampler_3d",
        im2col: "im2col",
        col2im: "col2im",
        unpool(2): "max_unpool2d",
        unpool(3): "max_unpool3d",
        unfold: "unfold",
        pad: "pad",
        constant_pad: "constant_pad_nd",
        pixel_shuffle: "pixel_shuffle",
        pixel_unshuffle: "pixel_unshuffle",
        channel_shuffle: "channel_shuffle native_channel_shuffle",
        reshape: "view reshape flatten unflatten _unsafe_view _reshape_alias view_as reshape_as squeeze unsqueeze "
        "view_copy atleast_1d ravel",
        permute: "permute",
        transpose: "transpose t mT swapaxes swapdims transpose_copy",
        movedim: "movedim moveaxis",
        expand: "expand expand_as broadcast_to",
        repeat: "repeat",
        repeat_interleave: "repeat_interleave",
        cat: "cat concat concatenate",
        stack: "stack",
        split: "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk",
        slice_: "slice",
        select: "select",
        select_scatter: "select_scatter",
        slice_scatter: "slice_scatter",
        unbind: "unbind",
        glu: "glu",
        embedding: "embedding",
        embedding_bag: "embedding_bag _embedding_bag",
        index_select: "index_select",
        gather: "gather",
        index: "index _unsafe_index",
        one_hot: "one_hot",
        histogram: "histc",
        searchsorted: "searchsorted",
        bucketize: "bucketize",
        scatter: "scatter",
        scatter_reduce: "scatter_add scatter_reduce",
        index_put: "index_put _unsafe_index_put",
        index_add: "index_add",
        index_copy: "index_copy",
        index_fill: "index_fill",
        masked_scatter: "masked_scatter",
        recurrent_cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        view_as_complex: "view_as_complex",
        view_as_real: "view_as_real",
        prelu: "prelu",
    }
)
RULES["transformers::grouped_mm_fallback"] = grouped_matmul  # the experts of all mixtures of experts in that library
UNINITIALISED = {
    getattr(aten, name)
    for name in ("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided")
}
"""Operators whose values mean nothing until something is written there."""

RULES[aten.max.dim] = RULES[aten.min.dim] = values_and_positions
for _packet in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):  # their overloads for packed sequences differ
    RULES[_packet.input] = recurrent
for _overload in (
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.nanmedian.default,
    aten.quantile.scalar,
    aten.nanquantile.scalar,
):
    RULES[_overload] = reduction
"""The rules by operator (``aten.linear``), by one overload of it (``aten.max.dim``), which goes first, or by the name
``"library::operator"`` of one whose library need not be there."""
