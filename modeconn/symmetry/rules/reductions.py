"""Norms, reductions, softmax, sorting, and operators that mix an axis in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL, ORTHOGONAL_ONES, PERMUTATION, Kind
from modeconn.symmetry.rules.elementwise import broadcast, reordered
from modeconn.symmetry.rules.operators import aten, leaves, table
from modeconn.symmetry.walk import Traced, Walk


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


@leaves(LINEAR)
def layer_norm(
    walk: Walk,
    input: Traced,
    normalized_shape: Sequence[int],
    weight: Traced | None = None,
    bias: Traced | None = None,
    *settings: Any,
    **more: Any,
) -> list[Axis]:
    """Statistics over the last axes: their mean and variance."""
    return _normalized(walk, input, len(normalized_shape), ORTHOGONAL_ONES, weight, bias)


@leaves(LINEAR)
def rms_norm(
    walk: Walk, input: Traced, normalized_shape: Sequence[int], weight: Traced | None = None, *settings: Any
) -> list[Axis]:
    """A root mean square over the last axes."""
    return _normalized(walk, input, len(normalized_shape), ORTHOGONAL, weight, None)


def _normalized(
    walk: Walk, input: Traced, num_dims: int, kind: Kind, weight: Traced | None, bias: Traced | None
) -> list[Axis]:
    first = len(input.axes) - num_dims
    for axis in input.axes[:first]:
        walk.lower(axis, PERMUTATION, "normalized at each place by itself")
    for axis in input.axes[first:]:
        walk.lower(axis, kind, "its mean and variance are read" if kind is ORTHOGONAL_ONES else "its length is read")
    walk.show(input.axes[:first])
    vectors = [vector for vector in (weight, bias) if isinstance(vector, Traced)]
    if not vectors:
        return list(input.axes)
    if num_dims == 1 and isinstance(weight, Traced):
        return input.replace({-1: walk.scale(input.axes[-1], weight, bias if isinstance(bias, Traced) else None)})
    for vector in vectors:
        for x, y in zip(input.axes[first:], vector.axes, strict=True):
            walk.unify(x, y)
            walk.lower(x, PERMUTATION, "scaled unit by unit")
    return list(input.axes)


@leaves(LINEAR)
def group_norm(
    walk: Walk, input: Traced, num_groups: int, weight: Traced | None = None, bias: Traced | None = None, *settings: Any
) -> list[Axis]:
    """Statistics per example and group of neighbouring channels; of one group, layer norm over channels and places."""
    if num_groups == 1:
        walk.lower(input.axes[0], PERMUTATION, "normalized by itself")
        for axis in input.axes[1:]:
            walk.lower(axis, ORTHOGONAL_ONES, "its mean and variance are read")
        walk.show(input.axes[:1])
        return list(input.axes) if weight is None else input.replace({1: walk.scale(input.axes[1], weight, bias)})
    for axis in input.axes:
        walk.lower(axis, PERMUTATION, "normalized in groups")
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


@leaves(LINEAR)
def summation(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Sum and mean over axes."""
    for dim in _reduced_dims(walk, input):
        if dim not in input.only_summed:
            walk.lower(input.axes[dim], ORTHOGONAL_ONES, "summed")
    return reduction(walk, input)


@leaves(LINEAR)
def spread(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
    """Variance and standard deviation over axes."""
    dims = _reduced_dims(walk, input)
    for dim, axis in enumerate(input.axes):
        walk.lower(axis, ORTHOGONAL_ONES if dim in dims else PERMUTATION, "its variance is read")
    return reduction(walk, input)


@leaves(LINEAR)
def length(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """A norm over axes; the Euclidean one is kept by rotations."""
    order = walk.arguments.get("ord", walk.arguments.get("p", 2))
    dims = _reduced_dims(walk, input) if order in (2, None) else []
    for dim, axis in enumerate(input.axes):
        walk.lower(axis, ORTHOGONAL if dim in dims else PERMUTATION, "its length is read")
    return reduction(walk, input)


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
    return [Traced(tuple(axes), points_into=walk.product([input.axes[d] for d in dims]))]


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


@leaves(LINEAR)
def rearranged(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
    """``flip``, ``roll``, ``cumsum``: order carries meaning along some axes, and the others are mapped linearly."""
    return ordered(walk, input)


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


RULES = table(
    {
        fourier: "_fft_c2c _fft_r2c _fft_c2r",
        diagonal: "diagonal",
        batch_norm: "batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _batch_norm_impl_index",
        instance_norm: "instance_norm",
        layer_norm: "layer_norm",
        rms_norm: "rms_norm",
        group_norm: "group_norm",
        softmax: "softmax log_softmax _softmax _log_softmax _safe_softmax",
        weight_norm: "_weight_norm",
        summation: "sum mean",
        spread: "var std var_mean std_mean",
        length: "norm linalg_vector_norm",
        reduction: "amax amin prod logsumexp all any nansum nanmean count_nonzero",
        arg_reduction: "argmax argmin",
        values_and_positions: "topk sort median nanmedian kthvalue mode",
        rearranged: "cumsum flip roll fliplr flipud rot90",
        ordered: "cumprod cummax cummin logcumsumexp fft_fft fft_ifft "
        "fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn "
        "fft_irfftn fft_fftshift fft_ifftshift",
        triangle: "tril triu",
    }
)
RULES[aten.max.dim] = RULES[aten.min.dim] = values_and_positions
for _overload in (
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.nanmedian.default,
    aten.quantile.scalar,
    aten.nanquantile.scalar,
):
    RULES[_overload] = reduction
