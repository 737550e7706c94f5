"""Rotations as parameters: what a gradient may turn, from where a start has brought the units of b."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeconn.network.weights import WeightSpace, pull_back, write_weights
from modeconn.symmetry.groups import Group, without_ones
from modeconn.symmetry.kinds import ORTHOGONAL_ONES
from modeconn.symmetry.spec import Orthogonal, Permutation, PermutationSpec, nearest


class TurnedWeights:
    r"""The weights of b at a start, turned on by rotations that are learned; what permutes stays as the start has it.

    .. math:: G = \exp(Z - Z^T) \, G_0, \qquad \text{on the vectors that sum to zero where the ones vector is kept}

    ``Z`` begins as zero, where ``G`` is the start's, exactly, and its gradient is plain.

    Args:
        spec: The groups.
        space: The weight space of the networks.
        theta_b: b, ``(P,)``.
        start: Where it begins.

    Attributes:
        parameters: ``Z`` of each group that rotates.
    """

    def __init__(
        self, spec: PermutationSpec, space: WeightSpace, theta_b: Tensor, start: Permutation | Orthogonal
    ) -> None:
        self._spec, self._space, self._start = spec, space, start
        self._groups = [group for group in spec.groups if group.rotates]
        moved = start.relabel(space.unflatten(theta_b))
        self._weights = {name: weight.to(space.wide_dtype) for name, weight in moved.items()}
        self._theta = torch.empty_like(theta_b)
        self.parameters = [
            nn.Parameter(torch.zeros(*g.shape[:-1], *_free(g), dtype=space.wide_dtype, device=space.device))
            for g in self._groups
        ]

    def backward(self, gradient: Callable[[Tensor], Tensor]) -> None:
        """Add to the gradients of the parameters; ``gradient`` is called with the turned weights ``(P,)``."""
        matrices = {g.atom: _turn(g, z) for g, z in zip(self._groups, self.parameters, strict=True)}
        structure, state = self._spec.structure, self._spec.state
        turned = {
            name: structure.turn(weight, state[name], matrices) if name in state else weight
            for name, weight in self._weights.items()
        }
        write_weights(turned, self._theta, self._space)
        pull_back(turned, self._space.unflatten(gradient(self._theta)))

    @torch.no_grad()
    def relabelling(self) -> Permutation | Orthogonal:
        """Return the relabelling of b that the parameters stand for, orthogonal in double precision."""
        found = dict(self._start.tensors())
        for group, z in zip(self._groups, self.parameters, strict=True):
            found[group.name] = nearest(group, _turn(group, z.double().cpu()) @ found[group.name])
        return self._spec.relabelling(found)


def _free(group: Group) -> tuple[int, int]:
    size = group.size - (group.kind is ORTHOGONAL_ONES)
    return size, size


def _turn(group: Group, z: Tensor) -> Tensor:
    """Return the rotation of a group, one for each of its blocks: the identity to the bit where z is zero."""
    turn = torch.linalg.matrix_exp(z - z.mT)
    if group.kind is not ORTHOGONAL_ONES:
        return turn
    basis, identity = without_ones(group.size).to(z), torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.eye(group.size, dtype=z.dtype, device=z.device) + basis @ (turn - identity) @ basis.T
