"""Slow and obvious versions of Deep-Align's layers: loops over units and edges, and one layer of the paper."""

from __future__ import annotations

from itertools import combinations, product

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


Features = dict[str, Tensor]

UNITS = {"W1": (1,), "W2": (2, 1), "W3": (2,), "b1": (1,), "b2": (2,)}
"""Of a perceptron of two hidden layers: whose units lie along the first axes of its tensors, before the channels."""


def weight_features(w1: Tensor, w2: Tensor, w3: Tensor, b1: Tensor, b2: Tensor) -> Features:
    """Weights ``(d_1, d_0)``, ``(d_2, d_1)``, ``(d_3, d_2)`` and biases, with inputs and outputs as channels."""
    return {"W1": w1, "W2": w2[..., None], "W3": w3.T, "b1": b1[:, None], "b2": b2[:, None]}


class DWSLayer(nn.Module):
    """One equivariant layer of Navon et al. (arXiv 2301.12780) for a perceptron of two hidden layers.

    Every linear map, from weights and biases to weights and biases, that commutes with relabelling: between two tensors
    there is one, with a matrix of channels, for each choice of the units that both have whose axis is kept; all other
    axes of the input are pooled, all other axes of the output repeat.

    Args:
        channels: Of every input, as in `UNITS`.
        out: Of every output.
        pool: ``pool(x, dim)``; a mean makes the layer linear, the paper offers a maximum too.
    """

    def __init__(self, channels: dict[str, int], out: dict[str, int], pool=torch.amax) -> None:
        super().__init__()
        self.pool, self.out = pool, out
        self.maps = nn.ModuleDict(
            {
                f"{source} {target} {kept}": nn.Linear(channels[source], out[target], bias=False)
                for source, target in product(UNITS, UNITS)
                for kept in _subsets([group for group in UNITS[source] if group in UNITS[target]])
            }
        )
        self.offsets = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in out.items()})

    def forward(self, x: Features) -> Features:
        """Return features ``(units of the target, channels)`` from features ``(units of the source, channels)``."""
        sizes = {1: len(x["W1"]), 2: len(x["W3"])}
        made = {
            name: offset.expand(*(sizes[group] for group in UNITS[name]), -1) for name, offset in self.offsets.items()
        }
        for key, linear in self.maps.items():
            source, target, kept = key.split()
            values = x[source]
            for dim, group in reversed(list(enumerate(UNITS[source]))):
                if str(group) not in kept:
                    values = self.pool(values, dim)
            shape = [sizes[group] if str(group) in kept else 1 for group in UNITS[target]]
            made[target] = made[target] + linear(values).view(*shape, -1)
        return made


def _subsets(groups: list[int]) -> list[str]:
    """Return all subsets of groups, in words: "none", "1", "21"."""
    return ["".join(map(str, chosen)) or "none" for k in range(len(groups) + 1) for chosen in combinations(groups, k)]


def relabel(x: Features, perms: dict[int, Tensor]) -> Features:
    """Relabel the units of features."""
    for name, groups in UNITS.items():
        for dim, group in enumerate(groups):
            x = {**x, name: x[name].index_select(dim, perms[group])}
    return x
