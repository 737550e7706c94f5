"""Operators on images and sequences: pooling, resizing, padding, unfolding, shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL_ONES
from modeconn.symmetry.rules.elementwise import broadcast, reordered
from modeconn.symmetry.rules.operators import leaves, table
from modeconn.symmetry.walk import Rule, Traced, Walk


def spatial(num_dims: int) -> Rule:
    """Pooling and resizing: neighbours along the last ``num_dims`` axes, the others untouched."""

    def rule(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
        out = reordered(walk, input, range(-num_dims, 0), "neighbours in space")
        return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out

    return rule


def averaging(num_dims: int) -> Rule:
    """Averages of neighbours along the last ``num_dims`` axes: linear along the others."""
    regions = spatial(num_dims)

    @leaves(LINEAR)
    def rule(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> Any:
        return regions(walk, input)

    return rule


def adaptive_average(num_dims: int) -> Rule:
    """Averages over regions of the last ``num_dims`` axes; one region is all of them, in any order."""
    regions = spatial(num_dims)

    @leaves(LINEAR)
    def rule(walk: Walk, input: Traced, output_size: Any) -> list[Axis]:
        if any(size > 1 for size in walk.shape[-num_dims:]):
            return regions(walk, input)
        for axis in input.axes[-num_dims:]:
            walk.lower(axis, ORTHOGONAL_ONES, "summed")
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


@leaves(LINEAR)
def unfold(walk: Walk, input: Traced, dim: int, size: int, step: int) -> list[Axis]:
    """Sliding windows along one axis."""
    return [
        *reordered(walk, input, [dim % len(input.axes)], "neighbours in space"),
        walk.fixed(size, "neighbours in space"),
    ]


@leaves(LINEAR)
def pad(walk: Walk, input: Traced, pad: Sequence[int], mode: str = "constant", value: Any = None) -> list[Axis]:
    """Constant entries before and behind are interchangeable; reflected ones are not."""
    for axis in input.axes if mode == "constant" and value else ():
        walk.lower(axis, ORTHOGONAL_ONES, "padded by a number")
    axes, moved = list(input.axes), []
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(axes) - 1 - i
        if before == after == 0:
            continue
        if mode == "constant" and before >= 0 and after >= 0 and not walk.is_fixed(axes[dim]):
            ends = [walk.free(before), walk.free(after)]
            for axis in ends:
                walk.lower(axis, ORTHOGONAL_ONES, "padded by a number")
            axes[dim] = walk.concatenate([ends[0], axes[dim], ends[1]])
        else:
            moved.append(dim)
    reflected = reordered(walk, input, moved, "padded")
    return [reflected[dim] if dim in moved else axis for dim, axis in enumerate(axes)]


@leaves(LINEAR)
def constant_pad(walk: Walk, input: Traced, widths: Sequence[int], value: Any = 0) -> list[Axis]:
    """``pad`` below the dispatcher."""
    return pad(walk, input, widths, value=value)


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


RULES = table(
    {
        spatial(1): "max_pool1d adaptive_max_pool1d max_pool1d_with_indices",
        spatial(2): "max_pool2d adaptive_max_pool2d max_pool2d_with_indices fractional_max_pool2d",
        spatial(3): "max_pool3d adaptive_max_pool3d max_pool3d_with_indices fractional_max_pool3d",
        averaging(1): "avg_pool1d upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d reflection_pad1d "
        "replication_pad1d",
        averaging(2): "avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
        averaging(3): "avg_pool3d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d "
        "replication_pad3d",
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
    }
)
