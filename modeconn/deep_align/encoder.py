"""The equivariant encoder: the weights of a network in, a feature vector for each of its units out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.deep_align.unit_graph import UnitGraph

_EDGE_WIDTH = 16  # hidden channels of the function that embeds an edge
_CONSTANT = 1e-3  # A piece counts as constant up to this deviation, relative to its size.


class Encoder(nn.Module):
    r"""Features of units that follow the units under every relabelling, in the spirit of deep weight-space networks.

    A unit begins as a linear embedding of what is its own: bias, norm parameters and statistics, its row of the first
    weight, its column of the last. An edge is a learned function of the weights between two units (of all taps of a
    kernel) with ``edge_features`` channels. In every `Block` units then hear from the units they share edges with. The
    first such message is a forward pass with learned inputs, so activation matching on them is within reach, as it is
    for the paper's layers; these have a state for each edge too, which ours do not.

    Args:
        graph: What the entries of a flat state stand for.
        features: Channels of a unit.
        edge_features: Channels of an edge; they divide ``features``.
        depth: Number of blocks.
        scale: ``s`` at the beginning; similarities lie in ``[-s^2, s^2]``.
    """

    def __init__(self, graph: UnitGraph, features: int, edge_features: int, depth: int, scale: float) -> None:
        super().__init__()
        self.graph, self.features = graph, features
        self.embeddings = nn.ModuleList(
            nn.Linear(piece.index.shape[-1], features)
            if len(piece.groups) == 1
            else nn.Sequential(
                nn.Linear(piece.index.shape[-1], _EDGE_WIDTH), nn.ReLU(), nn.Linear(_EDGE_WIDTH, edge_features)
            )
            for piece in graph.pieces
        )
        ends = [piece.groups for piece in graph.pieces if len(piece.groups) == 2]
        num_groups = len(graph.spec.groups)
        self.blocks = nn.ModuleList(Block(num_groups, ends, features, edge_features) for _ in range(depth))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(features), nn.ReLU(), nn.Linear(features, features)) for _ in range(num_groups)
        )
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.register_buffer("mean", torch.zeros(len(graph.pieces)))
        self.register_buffer("std", torch.ones(len(graph.pieces)))

    @torch.no_grad()
    def standardise(self, states: Tensor) -> None:
        """Measure mean and deviation of each piece, over networks, units and channels, on a population ``(N, P)``.

        A piece that is constant there, as norm layers are before training, may not be in the networks to come: its
        scale is its own size, or 1 if it is 0.
        """
        for number, piece in enumerate(self.graph.pieces):
            values = states[:, piece.index.flatten()]
            std, size = values.std(correction=0), values.abs().mean()
            self.mean[number] = values.mean()
            self.std[number] = std if std > _CONSTANT * size else size if size > 0 else 1.0

    def forward(self, states: Tensor) -> list[Tensor]:
        """Return features of unit length, ``(B, n, features)`` for each group, of the networks ``states (B, P)``."""
        units = [states.new_zeros(len(states), group.size, self.features) for group in self.graph.spec.groups]
        edges = []
        for number, (piece, embed) in enumerate(zip(self.graph.pieces, self.embeddings, strict=True)):
            values = (states[:, piece.index] - self.mean[number]) / self.std[number]
            if len(piece.groups) == 1:
                units[piece.groups[0]] = units[piece.groups[0]] + embed(values)
            else:
                edges.append(embed(values).movedim(-1, 1).contiguous())
        for block in self.blocks:
            units = block(units, edges)
        return [F.normalize(head(x), dim=-1) for head, x in zip(self.heads, units, strict=True)]

    def similarities(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        """Return ``s^2`` times the cosines between features of two batches of networks, ``(B, n, n)`` a group."""
        return [self.scale**2 * x @ y.mT for x, y in zip(a, b, strict=True)]


class Block(nn.Module):
    r"""One round in which units learn from themselves, from their group, and from the other ends of their edges.

    With :math:`u = \mathrm{ReLU}(\mathrm{LayerNorm}(h))`, units :math:`i` of a group of :math:`n`, and edges
    :math:`e_{ij}` to the :math:`m` units of another group, channel by channel,

    .. math:: h_i \leftarrow h_i + A \, [u_i, \mathrm{mean}_k u_k, \max_k u_k]
        + \sum_{\text{edge sets}} R \, \tfrac{1}{\sqrt{m}} \sum_j e_{ij} \odot S u_j

    where each channel of the edge acts on its share of the channels of the unit. Every edge is read in both directions,
    with matrices of its own.

    Args:
        num_groups: How many groups.
        ends: For each set of edges, the groups of its rows and columns.
        features: Channels of a unit.
        edge_features: Channels of an edge.
    """

    def __init__(self, num_groups: int, ends: Sequence[tuple[int, ...]], features: int, edge_features: int) -> None:
        super().__init__()
        self.ends, self.edge_features = ends, edge_features
        self.norm = nn.ModuleList(nn.LayerNorm(features) for _ in range(num_groups))
        self.own = nn.ModuleList(nn.Linear(3 * features, features) for _ in range(num_groups))
        self.send, self.receive = (
            nn.ModuleList(
                nn.ModuleList(nn.Linear(features, features, bias=False) for _ in ("to rows", "to columns"))
                for _ in ends
            )
            for _ in ("send", "receive")
        )

    def forward(self, units: Sequence[Tensor], edges: Sequence[Tensor]) -> list[Tensor]:
        """Return the next units, ``(B, n, features)``; ``edges`` are ``(B, edge_features, n, m)``."""
        heard = [F.relu(norm(x)) for norm, x in zip(self.norm, units, strict=True)]
        new = [x + own(_with_group(u)) for own, x, u in zip(self.own, units, heard, strict=True)]
        for e, (row, column), send, receive in zip(edges, self.ends, self.send, self.receive, strict=True):
            new[row] = new[row] + receive[0](self._messages(e, send[0](heard[column])))
            new[column] = new[column] + receive[1](self._messages(e.mT, send[1](heard[row])))
        return new

    def _messages(self, e: Tensor, sent: Tensor) -> Tensor:
        by_channel = sent.unflatten(-1, (self.edge_features, -1)).transpose(1, 2)
        return (e @ by_channel).transpose(1, 2).flatten(2) / e.shape[-1] ** 0.5


def _with_group(u: Tensor) -> Tensor:
    """Return units beside mean and maximum of their group, ``(B, n, 3 f)``."""
    return torch.cat([u, u.mean(1, keepdim=True).expand_as(u), u.amax(1, keepdim=True).expand_as(u)], -1)
