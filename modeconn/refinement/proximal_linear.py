"""The permutation step of PAM by exact moves that a linear model of the loss proposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from modeconn.refinement.moves import Move, cycles, exchanges, linear_costs, proximal_proposals
from modeconn.refinement.relabelled import Relabelled
from modeconn.refinement.turning import Turning
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown


@dataclass(frozen=True)
class ProximalLinear(Shown):
    r"""Lower the loss by small relabellings, each accepted only if the exact loss falls.

    The loss is linear in the permutation to first order, and the proximal problem

    .. math:: \operatorname{argmin}_P \; \langle G, P \rangle + \tfrac{1}{2 \nu} \lVert P - P_k \rVert^2

    is one assignment for each group. Solutions at several :math:`1 / \nu` are split into their cycles; with the
    exchanges of two units that promise most they are tried one by one, most promising first; as far as ``num_tries``
    allows also those that promise nothing, since the loss is not linear. Moves that touch units which already moved
    wait for the next round, in which the gradient is taken anew. Rounds end when none is accepted.

    Groups that rotate their units are turned once in each round, all together, by a step of projected gradient descent:
    the same problem is then one of Procrustes, with :math:`1 / \nu` raised until the loss falls.

    Args:
        num_rounds: Gradients in one step, at most.
        num_tries: Moves tried in a round, at most, so that the cost stays bounded for wide groups.
        weights: Values of :math:`1 / \nu`, in units of the largest entry of :math:`G`.

    Raises:
        ValueError: If a setting is out of range.
    """

    rotates: ClassVar[bool] = True

    num_rounds: int = 20
    num_tries: int = 128
    weights: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_rounds", "num_tries")
        check_at_least(self, 1, "num_rounds", "num_tries")
        is_some = isinstance(self.weights, Sequence) and len(self.weights) > 0
        if not (is_some and all(isinstance(weight, Real) and weight >= 0 for weight in self.weights)):
            raise ValueError(f"weights must be one or more numbers of at least 0, got weights={self.weights!r}.")

    def __call__(self, b: Relabelled) -> None:
        """Relabel b further, in place."""
        forest = b.spec.trees()
        turning = Turning(b)
        for _ in range(self.num_rounds):
            num_accepted = self._round(b, forest)
            if not turning.step() and not num_accepted:
                return

    def _round(self, b: Relabelled, forest: list) -> int:
        """Return how many moves were accepted."""
        moved: set[tuple[str, int]] = set()
        accepted = 0
        candidates = self._candidates(b, forest)
        b.num_planned = b.num_tried + len(candidates)
        for move in candidates:
            if not move.places.isdisjoint(moved):
                b.num_planned -= 1
            elif b.try_move(move):
                moved |= move.places
                accepted += 1
        return accepted

    def _candidates(self, b: Relabelled, forest: list) -> list[Move]:
        gradient = b.gradient()
        found: dict[tuple, Move] = {}
        for tree in forest:
            costs = linear_costs(b.spec, tree, gradient, b.parameters)
            proposals = proximal_proposals(tree, costs, self.weights)
            parts = [move for perms in proposals for move in cycles(b.spec, tree, perms, costs)]
            for move in (*parts, *exchanges(b.spec, tree, costs, self.num_tries)):
                found.setdefault(move.key, move)
        return sorted(found.values(), key=lambda move: -move.gain)[: self.num_tries]
