"""Slow and obvious versions of Deep-Align's layers: loops over units and edges, and one layer of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeconn.deep_align.encoder import Block


def block_by_loops(block: Block, units: list[Tensor], edges: list[Tensor]) -> list[Tensor]:
    """What a block makes of one network: ``units`` ``(n, f)``, ``edges`` ``(n, m, channels)``, unit by unit."""
    heard = [norm(x).clamp(min=0) for norm, x in zip(block.norm, units, strict=True)]
    new = []
    for own, x, u in zip(block.own, units, heard, strict=True):
        mean, largest = sum(u) / len(u), u.max(0).values
        new.append(torch.stack([x[i] + own(torch.cat([u[i], mean, largest])) for i in range(len(u))]))
    for e, (row, column), send, receive in zip(edges, block.ends, block.send, block.receive, strict=True):
        n, m, channels = e.shape
        width = heard[row].shape[1] // channels
        for i in range(n):
            message = torch.zeros_like(heard[row][i])
            for j in range(m):
                sent = send[0](heard[column][j])
                for channel in range(channels):
                    part = slice(channel * width, (channel + 1) * width)
                    message[part] += e[i, j, channel] * sent[part]
            new[row][i] = new[row][i] + receive[0](message / m**0.5)
        for j in range(m):
            message = torch.zeros_like(heard[column][j])
            for i in range(n):
                sent = send[1](heard[row][i])
                for channel in range(channels):
                    part = slice(channel * width, (channel + 1) * width)
                    message[part] += e[i, j, channel] * sent[part]
            new[column][j] = new[column][j] + receive[1](message / n**0.5)
    return new


class DWSLayer(nn.Module):
    """One equivariant layer of Navon et al. (arXiv 2301.12780), to biases, for a perceptron of two hidden layers.

    From weights ``W_1 (d_1, d_0)``, ``W_2 (d_2, d_1)``, ``W_3 (d_3, d_2)`` and biases ``b_1 (d_1)``, ``b_2 (d_2)`` to
    features ``(d_1, f)``, ``(d_2, f)``: every linear map that commutes with relabelling, with maximum for its pools.
    """

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.rows = nn.Linear(inputs, features)  # W_1 -> b_1
        self.columns = nn.Linear(outputs, features)  # W_3 -> b_2
        self.into = nn.Linear(1, features)  # W_2 -> b_2, pooled over d_1
        self.out_of = nn.Linear(1, features)  # W_2 -> b_1, pooled over d_2
        self.own = nn.ModuleList(nn.Linear(1, features) for _ in range(2))  # b_m -> b_m
        self.all = nn.ModuleList(nn.Linear(1, features) for _ in range(2))  # the same, pooled
        self.across = nn.ModuleList(nn.Linear(1, features) for _ in range(2))  # b_m -> the other, pooled

    def forward(self, w1: Tensor, w2: Tensor, w3: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.rows(w1) + self.out_of(w2.amax(0)[:, None])
        second = self.columns(w3.T) + self.into(w2.amax(1)[:, None])
        sums = []
        for k, (b, other) in enumerate(((b1, b2), (b2, b1))):
            sums.append(self.own[k](b[:, None]) + self.all[k](b.amax()[None]) + self.across[k](other.amax()[None]))
        return (first + sums[0]) / 4, (second + sums[1]) / 4
