"""Sums of products: linear layers, matrix products, convolutions, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL, ORTHOGONAL_ONES, PERMUTATION
from modeconn.symmetry.rules.elementwise import broadcast, total
from modeconn.symmetry.rules.grouping import counted
from modeconn.symmetry.rules.operators import leaves, table
from modeconn.symmetry.rules.shapes import transpose
from modeconn.symmetry.walk import Rule, Traced, Walk, module_of, traced_in


@leaves(LINEAR)
def contraction(
    walk: Walk, operands: Sequence[Traced], labels: Sequence[str], out: str, bias: Traced | None = None
) -> list[Axis]:
    """A sum of products in Einstein's notation: one label, one axis; a ``bias`` is added to it along the last one."""
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
    if walk.has_rotations:
        _lower_labels(walk, operands, labels, out, named)
        _record_uses(walk, operands, labels, out, named, bias)
    walk.show(named.values())
    return [named.get(letter, UNIT) for letter in out]


def _lower_labels(
    walk: Walk, operands: Sequence[Traced], labels: Sequence[str], out: str, named: Mapping[str, Axis]
) -> None:
    """Lower the axes along which a sum of products is not the contraction of two tensors, or not linear in one."""
    weights = [walk.parameter(tensor) is not None for tensor in operands]
    for letter, axis in named.items():
        holders = [
            is_weight
            for tensor, own, is_weight in zip(operands, labels, weights, strict=True)
            if letter in own and tensor.axes[own.index(letter)] != UNIT
        ]
        times = sum(own.count(letter) for own in labels)
        if letter in out:
            if len(holders) > 1 or times > len(holders):
                walk.lower(axis, PERMUTATION, "multiplied unit by unit")
        elif times > 2:
            walk.lower(axis, PERMUTATION, "multiplied unit by unit")
        elif len(holders) < 2:
            walk.lower(axis, ORTHOGONAL_ONES, "summed")
        elif sum(holders) != 1:
            walk.lower(
                axis,
                ORTHOGONAL,
                f"read by a product of two {'parameters' if any(holders) else 'computed tensors'}{_here(walk)}",
            )


def _here(walk: Walk) -> str:
    return "" if walk.node is None else f" {module_of(walk.node, in_words=True)}"


def _record_uses(
    walk: Walk,
    operands: Sequence[Traced],
    labels: Sequence[str],
    out: str,
    named: Mapping[str, Axis],
    bias: Traced | None,
) -> None:
    """Record what the weight of a linear layer is to it, and its bias."""
    if len(operands) != 2 or sum(walk.parameter(tensor) is not None for tensor in operands) != 1:
        return
    (weight, own), (source, others) = sorted(
        zip(operands, labels, strict=True), key=lambda pair: walk.parameter(pair[0]) is None
    )
    for letter in own:
        if letter in others and letter not in out:
            walk.use(weight, "contracted", named.get(letter, UNIT), bias, source)
        elif letter not in others and letter in out:
            walk.use(weight, "made", named.get(letter, UNIT))
            if bias is not None:
                walk.use(bias, "bias", named.get(letter, UNIT))


@leaves(LINEAR)
def linear(walk: Walk, input: Traced, weight: Traced, bias: Traced | None = None) -> list[Axis]:
    """``x W^T + b``."""
    batch = _letters(len(input.axes) - 1)
    labels = [batch + "I", "OI"[2 - len(weight.axes) :]]
    out = contraction(walk, [input, weight], labels, batch + "O"[: len(weight.axes) - 1], bias)
    return out if bias is None else total(walk, [Traced(tuple(out)), bias], len(out))


@leaves(LINEAR)
def matmul(walk: Walk, input: Traced, other: Traced, bias: Traced | None = None) -> list[Axis]:
    """``mm``, ``bmm``, ``mv``, ``dot`` and ``matmul`` with broadcast batch axes."""
    left, right = len(input.axes), len(other.axes)
    batch = _letters(max(left, right, 2) - 2)
    rows, columns = "I" * (left > 1), "J" * (right > 1)
    left_labels = batch[len(batch) - max(left - 2, 0) :] + rows + "K"
    right_labels = batch[len(batch) - max(right - 2, 0) :] + "K" + columns
    return contraction(walk, [input, other], [left_labels, right_labels], batch + rows + columns, bias)


@leaves(LINEAR)
def add_matmul(walk: Walk, input: Traced, left: Traced, right: Traced, **scales: Any) -> list[Axis]:
    """``addmm``, ``baddbmm``, ``addmv``."""
    is_bias = not scales and [dim for dim, axis in enumerate(input.axes, 1) if axis != UNIT] == [len(input.axes)]
    product = Traced(tuple(matmul(walk, left, right, input if is_bias else None)))
    return total(walk, [input, product], len(product.axes))


@leaves(LINEAR)
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


@leaves(LINEAR)
def bilinear(walk: Walk, left: Traced, right: Traced, weight: Traced, bias: Traced | None = None) -> list[Axis]:
    """``x1^T W x2 + b``."""
    batch = _letters(len(left.axes) - 1)
    out = contraction(walk, [left, weight, right], [batch + "I", "OIJ", batch + "J"], batch + "O")
    return out if bias is None else total(walk, [Traced(tuple(out)), bias], len(out))


@leaves(LINEAR)
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
    if grouped == "TG" and offsets is not None:
        walk.unify(offsets.axes[0], other.axes[0])
        if offsets.node is not None:
            walk.tell(input.axes[0], other.axes[0], counted(offsets.node, walk.size(other.axes[0])))
    out = contraction(walk, [input, other], [left, right], "GTJ" if left[0] == right[0] == "G" else "TJ")
    return [walk.fixed(walk.shape[0], "grouped by number"), *out] if grouped == "K" else out


def distances(walk: Walk, left: Traced, right: Traced, *settings: Any) -> list[Axis]:
    """``cdist``: a sum over one axis for every pair of rows."""
    return matmul(walk, left, Traced(tuple(transpose(walk, right)), right.node))


def pairwise_distances(walk: Walk, input: Traced, p: float = 2) -> list[Axis]:
    """``pdist``: a sum over one axis for every pair of different rows, in their order."""
    walk.fix(input.axes[0], "ordered")
    walk.contract(input, input.axes[1])
    return [walk.fixed(walk.shape[0], "ordered")]


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


def householder(walk: Walk, input: Traced, tau: Traced) -> list[Axis]:
    """A product of reflections, whose vectors are columns below a diagonal."""
    batch = broadcast(walk, [Traced(input.axes[:-2]), Traced(tau.axes[:-1])], len(input.axes) - 2)
    for axis in (*input.axes[-2:], tau.axes[-1]):
        walk.fix(axis, "ordered")
    walk.show(batch)
    return [*batch, *(walk.fixed(n, "ordered") for n in walk.shape[-2:])]


@leaves(LINEAR)
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
    walk.lower(group, PERMUTATION, "each group of channels is convolved by itself")
    if groups == 1:
        walk.use(weight, "contracted", x.axes[channel])
        walk.use(weight, "made", out)
    space = list(x.axes[channel + 1 :])
    if bias is not None:
        walk.unify(out, bias.axes[0])
        walk.use(bias, "bias", out)
        for axis in (*x.axes[:channel], *space):
            walk.lower(axis, ORTHOGONAL_ONES, "something is added to all of its units alike")
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


@leaves(LINEAR)
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


@leaves(LINEAR)
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


@leaves(LINEAR)
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


@leaves(LINEAR)
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
        repeats = [walk.free(walk.size(query.axes[-3]) // walk.size(t.axes[-3])) for t in (key, value)]
        key, value = (
            Traced(tuple(t.replace({-3: walk.product([t.axes[-3], times])})), t.node)
            for t, times in zip((key, value), repeats, strict=True)
        )
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
    for axis in scores:
        walk.lower(axis, PERMUTATION, "a softmax acts on each score")
    walk.show(scores)
    walk.show(scores[:-1])
    return contraction(walk, [Traced(tuple(scores)), value], [batch + "TS", of_value + "SE"], letters + "TE")


def flexible_attention(
    walk: Walk, query: Traced, key: Traced, value: Traced, score: Any, mask: Any, *settings: Any
) -> list[list[Axis]]:
    """Attention whose scores are changed by a function of the numbers of example, head, query and key."""
    for tensor in (query, key, value):
        for axis in tensor.axes[:-1]:
            walk.fix(axis, "its positions are numbers for a function of scores")
    for tensor in traced_in((mask, settings)):
        for axis in tensor.axes:
            walk.fix(axis, "read by a function of scores")
    of_query, of_key, of_value = "BHTD", "BHSD", "BHSE"
    if walk.size(query.axes[1]) != walk.size(key.axes[1]):  # each key and value head serves several query heads
        query = Traced(
            (query.axes[0], *walk.split(query.axes[1], _heads(walk, query, key)), *query.axes[2:]), query.node
        )
        of_query = "BHGTD"
    scores = contraction(walk, [query, key], [of_query, of_key], of_query.replace("D", "S"))
    walk.show(scores[:-1])
    out = contraction(walk, [Traced(tuple(scores)), value], [of_query.replace("D", "S"), of_value], of_query[:-1] + "E")
    if len(out) > 4:
        out = [out[0], walk.product(out[1:3]), *out[3:]]
    sums = [out[:-1] if len(shape) == 3 else [walk.fixed(n, "no entries") for n in shape] for shape in walk.shapes[1:]]
    return [out, *sums]


def _heads(walk: Walk, query: Traced, key: Traced) -> tuple[int, int]:
    heads = walk.size(key.axes[1])
    return heads, walk.size(query.axes[1]) // heads


RULES = table(
    {
        linear: "linear",
        matmul: "matmul mm bmm mv dot",
        add_matmul: "addmm baddbmm addmv",
        einsum: "einsum",
        bilinear: "bilinear",
        distances: "_cdist_forward",
        distance: "dist",
        pairwise_distances: "_pdist_forward",
        of_last_dims(1): "stft",
        of_last_dims(2): "istft linalg_inv_ex linalg_cholesky_ex _linalg_solve_ex linalg_solve_triangular _linalg_det "
        "_linalg_slogdet _linalg_eigh linalg_eig linalg_qr _linalg_svd linalg_matrix_exp linalg_pinv cholesky_solve",
        householder: "linalg_householder_product",
        outer: "outer ger",
        grouped_matmul: "_grouped_mm",
        conv: "conv1d conv2d conv3d",
        conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
        convolution: "convolution",
        attention: "scaled_dot_product_attention",
    }
)
RULES["higher_order::flex_attention"] = flexible_attention
RULES["transformers::grouped_mm_fallback"] = grouped_matmul  # the experts of all mixtures of experts in that library
