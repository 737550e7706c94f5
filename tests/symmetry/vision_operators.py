"""Two operators of torchvision, written plainly, where that library is not there to define them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, library


def deform_conv2d(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor,
    stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    groups: int, offset_groups: int, use_mask: bool,
) -> Tensor:  # fmt: skip
    """Dai et al., 2017, with the masks of Zhu et al., 2019: offsets are (down, right) by group and tap."""
    height, width = input.shape[2:]
    rows, columns = offset.shape[2:]
    taps = [(i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3])]
    moves = offset.unflatten(1, (offset_groups, len(taps), 2))
    top = (torch.arange(rows) * stride_h - pad_h)[:, None]
    left = torch.arange(columns) * stride_w - pad_w
    groups_in = []
    for group, part in enumerate(input.chunk(offset_groups, 1)):
        sampled = []
        for tap, (i, j) in enumerate(taps):
            y = top + i * dilation_h + moves[:, group, tap, 0]
            x = left + j * dilation_w + moves[:, group, tap, 1]
            grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
            values = F.grid_sample(part, grid, align_corners=True)
            sampled.append(values * mask[:, group * len(taps) + tap, None] if use_mask else values)
        groups_in.append(torch.stack(sampled, 2))
    patches = torch.cat(groups_in, 1).unflatten(1, (groups, -1))
    kernels = weight.flatten(2).unflatten(0, (groups, -1))
    return torch.einsum("ngckhw,gock->ngohw", patches, kernels).flatten(1, 2) + bias[:, None, None]


def roi_align(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int,
    sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """He et al., 2017, with one sample in the middle of each bin."""
    height, width = input.shape[2:]
    left, top, right, bottom = (rois[:, 1:] * spatial_scale - 0.5 * aligned).unbind(1)
    y = top[:, None] + (torch.arange(pooled_height) + 0.5) / pooled_height * (bottom - top)[:, None]
    x = left[:, None] + (torch.arange(pooled_width) + 0.5) / pooled_width * (right - left)[:, None]
    x, y = torch.broadcast_tensors(x[:, None], y[:, :, None])
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return F.grid_sample(input[rois[:, 0].long()], grid, align_corners=True)


def _of_deformed(input: Tensor, weight: Tensor, offset: Tensor, *others: object) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0], *offset.shape[2:])


def _of_aligned(input: Tensor, rois: Tensor, scale: float, height: int, width: int, *others: object) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], height, width)


if not hasattr(torch.ops.torchvision, "deform_conv2d"):
    for operator, shape in ((deform_conv2d, _of_deformed), (roi_align, _of_aligned)):
        library.custom_op(f"torchvision::{operator.__name__}", operator, mutates_args=()).register_fake(shape)
