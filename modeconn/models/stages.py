"""Stages of blocks, as all residual networks for images have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def stages(
    make_block: Callable[[int, int, int], nn.Module], in_channels: int, layout: Sequence[Sequence[int]]
) -> nn.Sequential:
    """Return stages of blocks, each stage but the first beginning with a block of stride 2.

    Args:
        make_block: ``make_block(in_channels, out_channels, stride)``.
        in_channels: Channels of the input.
        layout: By stage, the channels that each block gives out.
    """
    result = nn.Sequential()
    for stage, channels_of_blocks in enumerate(layout):
        blocks = nn.Sequential()
        for number, channels in enumerate(channels_of_blocks):
            blocks.append(make_block(in_channels, channels, 2 if stage and not number else 1))
            in_channels = channels
        result.append(blocks)
    return result
