"""Network b while it is being relabelled, with the loss of the curve that leads to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeconn.curves.loss import CurveLoss
from modeconn.network.weights import WeightSpace
from modeconn.refinement.moves import Move
from modeconn.symmetry.spec import Orthogonal, Permutation, PermutationSpec

_FIRST_LOOK = 8  # places of the sample after which a move may be given up, then twice as many, and so on
_STANDARD_ERRORS = 2.0


@dataclass
class Relabelled:
    r"""Network b under a permutation P, changed move by move, for one fixed sample.

    A move is given up as soon as the places of the sample looked at so far say that the loss rises, by two standard
    errors of the paired differences: most moves are no gain, and that shows early. To be accepted it is measured on all
    of the sample, on which the loss must fall by more than ``standard_errors``. What falls with every accepted move is
    the loss on the sample plus :math:`\tfrac{1}{2 \nu} \lVert P - P_k \rVert^2`, which is :math:`\tfrac{1}{\nu}` times
    the number of units that are not where they were at first; of groups that rotate, with their matrices.

    Args:
        space: Weight space of the networks.
        loss: The loss of the curve on the sample.
        theta_b: Relabelled b, ``(P,)``; changed in place.
        bend: Inner control points less the straight line's, ``(K - 2, P)``; never changed in place.
        permutation: How b was relabelled so far.
        nu: The proximal weight; infinite for none.
        standard_errors: By how many standard errors of the paired differences the loss must fall.
        on_try: Called after each move that was tried.

    Attributes:
        value: The loss now.
        num_tried: Moves tried.
        num_accepted: Those of them that were kept.
        num_planned: How many moves are planned so far, 0 if that is not known; whoever plans them says it.
    """

    space: WeightSpace
    loss: CurveLoss
    theta_b: Tensor
    bend: Tensor
    permutation: Permutation | Orthogonal
    nu: float = float("inf")
    standard_errors: float = 0.0
    on_try: Callable[[Relabelled], None] | None = None
    num_tried: int = 0
    num_accepted: int = 0
    num_planned: int = 0
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.space.unflatten(self.theta_b)
        self._first = self.permutation
        self._penalty = 0.0
        self._losses = self.loss.values(self.theta_b, self.bend)
        self._order = torch.randperm(len(self.loss), generator=torch.Generator().manual_seed(0)).tolist()
        self.value = float(self._losses.mean())

    @property
    def spec(self) -> PermutationSpec:
        """The groups."""
        return self.permutation.spec

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the loss with respect to the relabelled b, by parameter."""
        _, gradient, _ = self.loss.gradient(self.theta_b, self.bend)
        return self.space.unflatten(gradient)

    def try_move(self, move: Move) -> bool:
        """Make a move if loss and proximal term fall; whether they did."""
        is_kept = self._is_kept(move)
        self.num_tried += 1
        self.num_accepted += is_kept
        if self.on_try is not None:
            self.on_try(self)
        return is_kept

    def _is_kept(self, move: Move) -> bool:
        before = self._make(move)
        penalty = 0.0 if math.isinf(self.nu) else self._distance(move.permutation @ self.permutation) / self.nu
        losses = self._losses_if_lower(penalty - self._penalty)
        if losses is None:
            self._write(before)
            return False
        self.permutation, self._penalty = move.permutation @ self.permutation, penalty
        self._losses, self.value = losses, float(losses.mean())
        return True

    def _losses_if_lower(self, more_penalty: float) -> Tensor | None:
        """Return the losses at all places of the sample, or None if they and the penalty together do not fall."""
        losses, seen = torch.empty_like(self._losses), 0
        while seen < len(losses):
            places = self._order[seen : max(2 * seen, _FIRST_LOOK)]
            losses[places] = self.loss.values(self.theta_b, self.bend, places)
            seen += len(places)
            looked_at = self._order[:seen]
            rise = losses[looked_at] - self._losses[looked_at] + more_penalty
            error = float(rise.std()) / math.sqrt(seen) if seen > 1 else 0.0
            if _FIRST_LOOK <= seen < len(losses) and float(rise.mean()) > _STANDARD_ERRORS * error:
                return None
        # A comparison that is False for NaN, which is refused.
        has_fallen = float(losses.mean()) + more_penalty < self.value
        return losses if has_fallen and float(rise.mean()) <= -self.standard_errors * error else None

    def value_after(self, move: Move) -> float:
        """Return what the loss would be after a move."""
        before = self._make(move)
        value = self.loss.value(self.theta_b, self.bend)
        self._write(before)
        return value

    def replace(self, permutation: Permutation | Orthogonal, bend: Tensor | None = None) -> bool:
        """Relabel b at once as ``permutation`` says, if loss and proximal term fall; whether they did.

        With a ``bend``, the curve takes that one if b is relabelled, and else keeps its own.
        """
        step, before = permutation @ self.permutation.inverse(), self.bend
        self.bend = before if bend is None else bend
        is_kept = self.try_move(Move(step.spec, step.tensors(), 0.0))
        self.bend = self.bend if is_kept else before
        return is_kept

    def _make(self, move: Move) -> dict[str, Tensor]:
        """Relabel b; return the parameters that changed as they were."""
        after = move.apply(self.parameters)
        before = {name: self.parameters[name].clone() for name in after}
        self._write(after)
        return before

    def _write(self, parameters: dict[str, Tensor]) -> None:
        for name, value in parameters.items():
            self.parameters[name].copy_(value)

    def _distance(self, permutation: Permutation | Orthogonal) -> float:
        """Return half of the squared distance of the matrices from those at first."""
        elements, first, total = permutation.tensors(), self._first.tensors(), 0.0
        for group in self.spec.groups:
            if group.rotates:
                total += float((elements[group.name] - first[group.name]).square().sum()) / 2
            else:
                total += int((permutation.sources(group.name) != self._first.sources(group.name)).sum())
        return total
