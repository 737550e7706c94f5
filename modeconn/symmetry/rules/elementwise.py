"""Operators on entries of one place, constants, random and complex numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL, ORTHOGONAL_ONES, PERMUTATION
from modeconn.symmetry.rules.operators import is_written, leaves, name_of, reads_shapes, table
from modeconn.symmetry.walk import Traced, Walk, traced_in


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


@reads_shapes
def pointwise(walk: Walk, *args: Any, **kwargs: Any) -> Any:
    """Any operator on entries of one place (``torch.Tag.pointwise``)."""
    out = broadcast(walk, traced_in((args, kwargs)), len(walk.shape))
    return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out


def has_one_value(tensor: Traced, dim: int) -> bool:
    """Whether all entries along a dimension are equal because there is one, or because one was repeated."""
    if tensor.axes[dim] == UNIT:
        return True
    node = tensor.node
    while node is not None and name_of(node.target) in _COPIES and not is_written(node):
        node = node.args[0]
    if node is None or is_written(node) or name_of(node.target) not in _EXPANSIONS:
        return False
    shape, dim = node.args[0].meta["val"].shape, dim % len(tensor.axes)
    offset = len(tensor.axes) - len(shape)
    return dim < offset or (isinstance(shape[dim - offset], int) and shape[dim - offset] == 1)


_COPIES, _EXPANSIONS = frozenset({"clone", "contiguous", "to", "_to_copy", "alias"}), frozenset({"expand", "expand_as"})


def total(walk: Walk, terms: Sequence[Any], num_dims: int) -> list[Axis]:
    """Return the axes of a sum: what is the same along an axis may be added to it where the ones vector is kept."""
    tensors = [term for term in terms if isinstance(term, Traced)]
    has_number = any(not isinstance(term, Traced) and term != 0 for term in terms)  # sum() of a list begins with 0
    axes = broadcast(walk, tensors, num_dims)
    for dim in range(-num_dims, 0):
        if has_number or any(-dim > len(t.axes) or has_one_value(t, dim) for t in tensors):
            walk.lower(axes[dim], ORTHOGONAL_ONES, "something is added to all of its units alike")
    return axes


@leaves(LINEAR)
@reads_shapes
def add(walk: Walk, input: Any, other: Any, **scales: Any) -> list[Axis]:
    """``add``, ``sub``."""
    if name_of(getattr(walk.node, "target", None)) == "add" and not scales and not walk.is_in_place:
        for bias, summed in ((input, other), (other, input)):
            if isinstance(bias, Traced) and isinstance(summed, Traced) and walk.parameter(bias) is not None:
                dims = [axis for axis in bias.axes if axis != UNIT]
                if len(dims) == 1 and walk.is_vector(bias):
                    walk.use(bias, "added", dims[0])
    return total(walk, [input, other], len(walk.shape))


@leaves(LINEAR)
@reads_shapes
def between(walk: Walk, input: Traced, end: Traced, weight: Any) -> list[Axis]:
    """``lerp``: a mean of two tensors, weighted by a number, or unit by unit."""
    axes = total(walk, [input, end], len(walk.shape))
    if isinstance(weight, Traced):
        axes = broadcast(walk, [Traced(tuple(axes)), weight], len(axes))
        for dim in range(-len(weight.axes), 0):
            if not has_one_value(weight, dim):
                walk.lower(axes[dim], PERMUTATION, "weighted unit by unit")
    return axes


@leaves(LINEAR)
@reads_shapes
def opposite(walk: Walk, input: Traced) -> list[Axis]:
    """``neg``."""
    return list(input.axes)


@leaves(LINEAR)
@reads_shapes
def multiply(walk: Walk, input: Any, other: Any) -> list[Axis | Traced]:
    """``mul``: a number for all units keeps what may be done with them, one for each does not.

    Two tensors whose products are only summed are contracted. A vector of parameters is a gain.
    """
    tensors = [t for t in (input, other) if isinstance(t, Traced)]
    if not walk.has_rotations or len(tensors) < 2:
        return broadcast(walk, tensors, len(walk.shape))
    summed, num_dims = walk.summed_dims(), len(walk.shape)
    for gain, scaled in (tensors, tensors[::-1]):
        dims = [dim for dim in range(-len(gain.axes), 0) if gain.axes[dim] != UNIT]
        if walk.parameter(scaled) is None and len(dims) == 1 and not _is_one(scaled, dims[0]) and not walk.is_in_place:
            if walk.gain_of(gain) is not None and dims[0] + num_dims not in summed:
                axes = list(scaled.axes)
                axes[dims[0]] = walk.scale(scaled.axes[dims[0]], gain)
                return [UNIT] * (num_dims - len(axes)) + axes
    if summed:
        axes = broadcast(walk, tensors, len(walk.shape))
        for dim, axis in enumerate(axes):
            kind, why = (
                (ORTHOGONAL, "its products are summed") if dim in summed else (PERMUTATION, "multiplied unit by unit")
            )
            if not any(_is_one(t, dim - len(axes)) for t in tensors):
                walk.lower(axis, kind, why)
            elif dim in summed:
                walk.lower(axis, ORTHOGONAL_ONES, "summed")
        return [Traced(tuple(axes), only_summed=frozenset(summed))]
    return _product(walk, input, other)


def _is_one(tensor: Traced, dim: int) -> bool:
    """Whether a tensor has one value along a dimension that is counted from the last."""
    return -dim > len(tensor.axes) or has_one_value(tensor, dim)


def _product(walk: Walk, input: Traced, other: Traced) -> list[Axis]:
    """Return the axes of a product of two tensors; what is the same along an axis does not tie it to others."""
    axes: list[Axis] = [UNIT] * len(walk.shape)
    for dim in range(-len(axes), 0):
        own = [t.axes[dim] for t in (input, other) if not _is_one(t, dim)]
        alike = [t.axes[dim] for t in (input, other) if -dim <= len(t.axes) and t.axes[dim] != UNIT]
        if len(own) == 2:
            walk.unify(*own)
            walk.lower(own[0], PERMUTATION, "multiplied unit by unit")
        elif len(own) == 0 and len(alike) == 2:
            walk.unify(*alike)
        axes[dim] = (own or alike or [UNIT])[0]
    return axes


@leaves(LINEAR)
@reads_shapes
def divide(walk: Walk, input: Any, other: Any, **rounding: Any) -> list[Axis]:
    """``div``: units may be divided by a number for all of them."""
    if walk.has_rotations and isinstance(other, Traced):
        for dim, axis in enumerate(other.axes, -len(other.axes)):
            if not _is_one(other, dim):
                walk.lower(axis, PERMUTATION, "it divides unit by unit")
        if isinstance(input, Traced) and not rounding.get("rounding_mode"):
            return _product(walk, input, other)
    tensors = [t for t in (input, other) if isinstance(t, Traced)]
    axes = broadcast(walk, tensors, len(walk.shape))
    if rounding.get("rounding_mode") or not isinstance(input, Traced):
        for axis in axes:
            walk.lower(axis, PERMUTATION, "divided unit by unit")
    return axes


@leaves(LINEAR)
@reads_shapes
def power(walk: Walk, input: Any, exponent: Any = 2) -> list[Axis | Traced]:
    """``pow`` and ``square``: squares that are only summed are the contraction of a tensor with itself."""
    tensors = [t for t in (input, exponent) if isinstance(t, Traced)]
    axes = broadcast(walk, tensors, len(walk.shape))
    summed = walk.summed_dims() if walk.has_rotations and isinstance(exponent, (int, float)) and exponent == 2 else ()
    for dim, axis in enumerate(axes):
        if dim in summed:
            walk.lower(axis, ORTHOGONAL, "its length is read")
        else:
            walk.lower(axis, PERMUTATION, "raised to a power unit by unit")
    return [Traced(tuple(axes), only_summed=frozenset(summed))] if summed else axes


@leaves(LINEAR)
@reads_shapes
def chosen(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """``where``, ``masked_fill``: one of two values by a mask, which may choose all units alike."""
    tensors = traced_in((args, kwargs))
    axes = broadcast(walk, tensors, len(walk.shape))
    masks = [t for t in tensors if walk.dtype(t) in (torch.bool, torch.uint8)]
    values = [t for t in tensors if t not in masks]
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, (int, float))]
    is_zero = bool(numbers) and not any(numbers)  # which any linear map keeps
    for dim in range(-len(axes), 0):
        if len(masks) != 1 or not _is_one(masks[0], dim):
            walk.lower(axes[dim], PERMUTATION, "chosen unit by unit")
        elif (len(values) < 2 and not is_zero) or any(_is_one(t, dim) for t in values):
            walk.lower(axes[dim], ORTHOGONAL_ONES, "a number takes the place of all of its units")
    return axes


@leaves(LINEAR)
def same(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Keep the first tensor's axes, whatever lends it a type or a device."""
    return list(input.axes)


@leaves(ORTHOGONAL_ONES)
@reads_shapes
def fill(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """A tensor whose entries are all equal: any relabelling leaves it."""
    return [walk.free(size) for size in walk.shape]


@leaves(LINEAR)
@reads_shapes
def zeros(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """A tensor of zeros: any linear map leaves it."""
    return [walk.free(size) for size in walk.shape]


@reads_shapes
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
    """``fill_``, ``zero_``: the result keeps the axes of the tensor that is overwritten, whose values are lost."""
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


def fake_quantize_per_channel(
    walk: Walk, input: Traced, scale: Traced, zero_point: Traced, axis: int, *limits: int
) -> Any:
    """Rounding to steps that are told for each index of one axis."""
    for vector in (scale, zero_point):
        walk.unify(input.axes[axis], vector.axes[0])
    return [list(input.axes) for _ in walk.shapes] if len(walk.shapes) > 1 else list(input.axes)


RULES = table(
    {
        same: "clone contiguous detach alias to _to_copy type_as dropout feature_dropout alpha_dropout "
        "feature_alpha_dropout lift_fresh lift_fresh_copy positive resolve_conj resolve_neg _conj _neg_view",
        add: "add sub rsub subtract",
        between: "lerp",
        opposite: "neg negative",
        multiply: "mul multiply",
        divide: "div divide true_divide",
        power: "pow square",
        chosen: "where masked_fill",
        pointwise: "copy complex polar _prelu_kernel rrelu hardtanh celu softplus threshold "
        "isclose fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask "
        "__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide "
        "hardswish log_sigmoid absolute greater less greater_equal less_equal "
        "not_equal fix arctan2 conj",
        zeros: "zeros zeros_like new_zeros",
        fill: "ones full empty ones_like full_like empty_like new_ones new_full new_empty "
        "empty_permuted empty_strided new_empty_strided scalar_tensor",
        fill_in_place: "fill zero",
        randomize: "uniform normal exponential log_normal cauchy geometric random bernoulli bernoulli_",
        constant: "arange linspace logspace rand randn randint randperm rand_like randn_like tril_indices triu_indices",
        identity_matrix: "eye",
        view_as_complex: "view_as_complex",
        view_as_real: "view_as_real",
        prelu: "prelu",
        fake_quantize_per_channel: "fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask",
    }
)
