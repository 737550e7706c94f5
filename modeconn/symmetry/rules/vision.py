"""Operators of torchvision on images: convolutions at moved places, regions, boxes."""

from __future__ import annotations

from typing import Any

from modeconn.symmetry.axes import Axis
from modeconn.symmetry.rules.contractions import conv
from modeconn.symmetry.rules.lookup import chosen
from modeconn.symmetry.walk import Rule, Traced, Walk


def deformed_conv(
    walk: Walk, input: Traced, weight: Traced, offset: Traced, mask: Traced, bias: Traced, *settings: int
) -> list[Axis]:
    """A convolution whose taps are moved, by offsets for each of several groups of input channels."""
    groups, offset_groups, use_mask = settings[-3:]
    size = walk.size(input.axes[1])
    moved_alike, _ = walk.split(input.axes[1], (offset_groups, size // offset_groups))
    for moves in (offset, mask) if use_mask else (offset,):
        walk.unify(moves.axes[0], input.axes[0])
        taps = walk.size(moves.axes[1]) // offset_groups
        of_group, tap = walk.split(moves.axes[1], (offset_groups, taps))
        walk.unify(of_group, moved_alike)
        for axis in (tap, *moves.axes[2:]):
            walk.fix(axis, "neighbours in a convolution")
    return conv(walk, input, weight, bias, groups=groups)


def regions(walk: Walk, input: Traced, boxes: Traced, *settings: Any) -> Any:
    """A small image cut out of each box: averages (``roi_align``), or maxima and where they were (``roi_pool``)."""
    for axis in (input.axes[0], boxes.axes[1], *input.axes[2:]):
        walk.fix(axis, "looked up by number")
    walk.show([boxes.axes[0], input.axes[1]])
    out = [boxes.axes[0], input.axes[1], *(walk.fixed(n, "neighbours in space") for n in walk.shape[2:])]
    return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out


RULES: dict[Any, Rule] = {
    "torchvision::deform_conv2d": deformed_conv,
    "torchvision::roi_align": regions,
    "torchvision::roi_pool": regions,
    "torchvision::nms": chosen,
}
