"""Networks that are almost the same: what an aligner learns to see through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
from torch import Tensor

from modeconn.deep_align.unit_graph import UnitGraph
from modeconn.tools.door import check_settings


@dataclass(frozen=True)
class WeightAugmentation:
    """Random changes of weights that leave every unit what it is.

    Noise, dropout and pruning are for the weights and biases of linear maps. Running statistics, and parameters of
    modules that have none with two axes, as norm layers have none, stay: networks do not work without them. (Digits
    with batch norm, accuracy 94.5%: 48% with theirs changed too, by default settings.)

    Args:
        noise: Deviation of Gaussian noise, in units of the deviation of the tensor it is added to.
        dropout: Share of entries that become 0.
        rescale: Each unit's inputs are multiplied, and its outputs divided, by a factor from
            ``[1 - rescale, 1 + rescale]``: the same function for ReLU networks without norm layers or transposed
            convolutions, and an error for others.
        prune: Entries of a tensor below a quantile of their size become 0, the quantile drawn from ``[0, prune]``.

    Raises:
        ValueError: If a setting is not in ``[0, 1)`` (noise: not 0 or more).
    """

    noise: float = 0.01
    dropout: float = 0.05
    rescale: float = 0.0
    prune: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("noise", "dropout", "rescale", "prune"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 <= value < (inf if name == "noise" else 1)):
                raise ValueError(f"{name} must lie in [0, {'inf' if name == 'noise' else 1}), got {name}={value!r}.")

    def __call__(self, graph: UnitGraph, states: Tensor) -> Tensor:
        """Return changed copies of states ``(B, P)``, drawn from the global generator."""
        factors = [
            1 + self.rescale * (2 * states.new_empty(len(states), g.size).uniform_() - 1) for g in graph.spec.groups
        ]
        changed = rescale(graph, states, factors) if self.rescale else states.clone()
        for name, part in graph.slices.items():
            x = changed[:, part]
            size = x.abs()
            quantile = (self.prune * torch.rand(len(x), 1, device=x.device) * x.shape[1]).long()
            kept = (size >= size.sort(1).values.gather(1, quantile)) & (torch.rand_like(x) >= self.dropout)
            noisy = x + self.noise * x.std(1, correction=0, keepdim=True) * torch.randn_like(x)
            # Checked last, so that the random numbers drawn do not depend on it.
            if graph.layout[name].role == "weight":
                changed[:, part] = kept * noisy
        return changed


def rescale(graph: UnitGraph, states: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiply what makes a unit (axis 0 of tensors) and divide what reads it, by ``factors (B, n)`` of each group."""
    rescaled = states.clone()
    for piece in graph.pieces:
        index = piece.index
        for place, (group, dim) in enumerate(zip(piece.groups, piece.dims, strict=True)):
            factor = factors[group] if dim == 0 else 1 / factors[group]
            shape = [len(states), *(-1 if k == place else 1 for k in range(index.dim()))]
            rescaled[:, index] = rescaled[:, index] * factor.view(shape)
    return rescaled
