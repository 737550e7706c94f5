"""The step of PAM in rotations: projected gradient descent with backtracking."""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.matching.procrustes import best_rotations
from modeconn.refinement.moves import Move, linear_costs
from modeconn.refinement.relabelled import Relabelled
from modeconn.symmetry.spec import Group

_FIRST_WEIGHT, _LEAST_WEIGHT = 10.0, 1.0
_STIFFER, _SOFTER, _NUM_TRIES = 3.0, 2.0, 5


class Turning:
    r"""Turns all groups that rotate at once, by steps of which each is kept only if the exact loss falls.

    To first order the loss changes by :math:`\langle C, R - 1 \rangle` if a group is turned by ``R``. A step is

    .. math:: R = \operatorname{argmin}_{R R^T = 1} \; \langle C, R \rangle + \tfrac{w}{2} \lVert R - 1 \rVert^2,

    an orthogonal Procrustes problem, with ``w`` in units of the largest singular value of the group's ``C``: where the
    loss does not fall, ``w`` is raised; after a step that was kept, it is lowered.

    Args:
        b: What is turned.
    """

    def __init__(self, b: Relabelled) -> None:
        self._b = b
        self._trees = [tree for tree in b.spec.trees() if any(group.rotates for group in tree)]
        self._weight = _FIRST_WEIGHT

    def step(self) -> bool:
        """Turn b further, in place; whether it was."""
        if not self._trees:
            return False
        gradient = self._b.gradient()
        costs: dict[str, tuple[Group, Tensor]] = {}
        for tree in self._trees:
            found = linear_costs(self._b.spec, tree, gradient, self._b.parameters)
            costs |= {g.name: (g, _own_blocks(g, found[g.name])) for g in tree if g.rotates and g.name in found}
        for _ in range(_NUM_TRIES):
            self._b.num_planned = max(self._b.num_planned, self._b.num_tried + 1)
            if self._b.try_move(self._move(costs)):
                self._weight = max(self._weight / _SOFTER, _LEAST_WEIGHT)
                return True
            self._weight *= _STIFFER
        return False

    def _move(self, costs: dict[str, tuple[Group, Tensor]]) -> Move:
        turns, gain = {}, 0.0
        for name, (group, cost) in costs.items():
            identity = torch.eye(group.size, dtype=cost.dtype)
            largest = torch.linalg.matrix_norm(cost, 2).max()
            turns[name] = best_rotations(self._weight * largest * identity - cost, group.kind)
            gain -= float((cost * (turns[name] - identity)).sum())
        return Move(self._b.spec, turns, gain)


def _own_blocks(group: Group, cost: Tensor) -> Tensor:
    """Return what turning each block of units where it lies costs, ``(*parent sizes, n, n)``."""
    num = len(cost) // group.size
    blocks = cost.view(num, group.size, num, group.size)
    return blocks[torch.arange(num), :, torch.arange(num)].reshape(*group.shape, group.size)
