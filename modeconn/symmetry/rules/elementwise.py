"""Operators on entries of one place, constants, random and complex numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.rules.operators import reads_shapes, table
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


def same(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Keep the first tensor's axes, whatever lends it a type or a device."""
    return list(input.axes)


@reads_shapes
def fill(walk: Walk, *args: Any, **kwargs: Any) -> list[Axis]:
    """A tensor whose entries are all equal: any relabelling leaves it."""
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
        pointwise: "where masked_fill copy rsub pow complex polar _prelu_kernel rrelu hardtanh celu softplus threshold "
        "isclose fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask "
        "__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide "
        "hardswish log_sigmoid multiply subtract divide negative absolute greater less greater_equal less_equal "
        "not_equal fix arctan2 conj",
        fill: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
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
