"""Rotations and invertible maps as parameters: what a gradient may change, from where a start has brought b's units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from modeconn.network.weights import WeightSpace, pull_back, write_weights
from modeconn.symmetry.groups import Group, without_ones
from modeconn.symmetry.invertible import Invertible, both_sides, mapped, pieces_of
from modeconn.symmetry.kinds import ORTHOGONAL_ONES
from modeconn.symmetry.spec import Orthogonal, Permutation, PermutationSpec, nearest


class TurnedWeights:
    r"""The weights of b at a start, turned on by rotations that are learned; what permutes stays as the start has it.

    .. math:: G = \exp(Z - Z^T) \, G_0, \qquad \text{on the vectors that sum to zero where the ones vector is kept}

    ``Z`` begins as zero, where ``G`` is the start's, exactly, and its gradient is plain. Inside of heads, where asked
    for, units are mapped by ``1 + Y`` instead, and by its inverse transposed on the other side.

    Args:
        spec: The groups.
        space: The weight space of the networks.
        theta_b: b, ``(P,)``.
        start: Where it begins.
        duals: The groups that are mapped instead of turned, see `modeconn.symmetry.invertible.duals_of`.

    Attributes:
        parameters: ``Z`` of each group that rotates, or ``Y``.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        space: WeightSpace,
        theta_b: Tensor,
        start: Permutation | Orthogonal,
        duals: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._spec, self._space, self._start = spec, space, start
        self._groups = [group for group in spec.groups if group.rotates]
        self._duals, self._pieces = duals, pieces_of(spec, duals)
        moved = start.relabel(space.unflatten(theta_b))
        self._weights = {name: weight.to(space.wide_dtype) for name, weight in moved.items()}
        self._theta = torch.empty_like(theta_b)
        self.parameters = [
            nn.Parameter(torch.zeros(*g.shape[:-1], *_free(g), dtype=space.wide_dtype, device=space.device))
            for g in self._groups
        ]

    def backward(self, gradient: Callable[[Tensor], Tensor]) -> None:
        """Add to the gradients of the parameters; ``gradient`` is called with the turned weights ``(P,)``."""
        own = list(zip(self._groups, self.parameters, strict=True))
        matrices = {g.atom: _turn(g, z) for g, z in own if g.name not in self._duals}
        maps = {g.atom: both_sides(_map(y)) for g, y in own if g.name in self._duals}
        structure, state = self._spec.structure, self._spec.state
        turned = {
            name: structure.turn(weight, state[name], matrices) if name in state else weight
            for name, weight in self._weights.items()
        }
        for name in self._pieces.keys() & turned.keys():
            turned[name] = mapped(self._spec, name, turned[name], self._pieces[name], maps)
        write_weights(turned, self._theta, self._space)
        pull_back(turned, self._space.unflatten(gradient(self._theta)))

    @torch.no_grad()
    def relabelling(self) -> Permutation | Orthogonal | Invertible:
        """Return the relabelling of b that the parameters stand for, in double precision."""
        found, maps = dict(self._start.tensors()), {}
        for group, z in zip(self._groups, self.parameters, strict=True):
            exact = z.double().cpu()
            if group.name in self._duals:
                maps[group.name] = _map(exact)
            else:
                found[group.name] = nearest(group, _turn(group, exact) @ found[group.name])
        turned = self._spec.relabelling(found)
        return Invertible(turned, maps, dict(self._duals)) if maps else turned


def _map(y: Tensor) -> Tensor:
    return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) + y


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
