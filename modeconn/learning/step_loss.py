"""The loss that one step lowers, as a function of model and batch: shared by endpoints and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.attacks.training import Adversary, AdversaryLike, FreeAdversarialTraining, FreeRun, adversary_of
from modeconn.learning.checkpoint import State
from modeconn.network.batches import described, inputs_and_targets, is_dense, num_examples
from modeconn.network.loss import Forward, LossFn, checked, differentiable, loss_alone, loss_of, supervised, weight_in
from modeconn.network.scores import is_sum


class StepLoss:
    """What the steps of one run lower, with what its adversary remembers from step to step.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place.
        adversary: An attack, or a way to train against one; see `modeconn.attacks.training`.

    Attributes:
        num_replays: How many steps in a row are made on each batch.

    Raises:
        ValueError: If there are both ``forward`` and ``adversary``, or the latter is neither.
    """

    def __init__(self, loss_fn: LossFn, forward: Forward | None = None, adversary: AdversaryLike | None = None) -> None:
        opponent = None if adversary is None else adversary_of(adversary)
        if forward is not None and opponent is not None:
            raise ValueError(
                f"{opponent!r} attacks (inputs, targets), of which forward= knows nothing. Pass loss_fn=, or attack "
                f"inside of forward."
            )
        is_free = isinstance(opponent, FreeAdversarialTraining)
        self.num_replays = opponent.num_replays if is_free else 1
        self._opponent = opponent = opponent.start() if is_free else opponent
        self._weight: Callable[[Any], Tensor | float] = num_examples
        self._is_sum = False
        if forward is not None:
            self._first = self._later = loss_alone(forward)
            return
        self._weight, self._is_sum = partial(weight_in, loss_fn), is_sum(loss_fn)
        if opponent is not None:
            self._first, self._later = (
                _against(opponent, loss) for loss in (checked(loss_fn), partial(loss_of, loss_fn))
            )
        else:
            self._first, self._later = supervised(loss_fn, check=True), supervised(loss_fn)

    def at(self, epoch: int) -> Forward:
        """Return ``forward(model, batch) -> loss`` of an epoch; in the first, 0, targets are checked."""
        return self._later if epoch else self._first

    def weigh(self, batch: Any, loss: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the loss of a batch for a history, and how much it counts in the mean of an epoch."""
        loss, weight = loss.detach(), self._weight(batch)
        if self._is_sum:
            return loss / num_examples(batch), float(num_examples(batch))
        # Of no target that counts the loss is NaN, and its gradient 0.
        return (torch.where(weight > 0, loss, 0.0) if isinstance(weight, Tensor) else loss), weight

    def count(self, weight: Tensor | float) -> float:
        """Return how much the gradient of a batch of such a weight counts beside those of other processes."""
        return 1.0 if self._is_sum else float(weight)

    own = ("perturbation",)

    def state(self) -> State:
        """Return what changes from step to step."""
        known = self._opponent.perturbation if isinstance(self._opponent, FreeRun) else None
        return ({} if known is None else {"perturbation": known}), {}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        if isinstance(self._opponent, FreeRun):
            self._opponent.perturbation = tensors.get("perturbation")


def _against(opponent: Adversary, loss_fn: LossFn) -> Forward:
    """Return ``forward(model, batch) -> loss`` for ``(inputs, targets)`` that an adversary changes first."""

    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = inputs_and_targets(batch)
        if not is_dense(inputs):
            raise ValueError(f"an adversary changes inputs that are one dense tensor, got {described(inputs)}.")
        return differentiable(opponent.loss(model, inputs, targets, loss_fn), "loss_fn=")

    return forward
