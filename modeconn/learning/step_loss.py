"""The loss that one step lowers, as a function of model and batch: shared by endpoints and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modeconn.attacks.training import Adversary, AdversaryLike, FreeAdversarialTraining, FreeRun, adversary_of
from modeconn.measure.profile import Objective
from modeconn.network.loss import LossFn, check_targets


def supervised(loss_fn: LossFn, *, check: bool = False, adversary: Adversary | None = None) -> Objective:
    """Return ``forward(model, batch) -> loss`` for ``(inputs, targets)``.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        check: Whether to check that targets are classes of the model.
        adversary: What changes inputs in the light of the model first, or None.
    """

    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        if check:
            check_targets(outputs, targets, loss_fn)
        return loss_fn(outputs, targets)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        if adversary is None:
            return checked(model(inputs), targets)
        return adversary.loss(model, inputs, targets, checked)

    return forward


def checked_forward(forward: Objective) -> Objective:
    """Return the same function with a look at what it returns."""

    def looked_at(model: nn.Module, batch: Any) -> Tensor:
        loss = forward(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"forward= must return the mean loss of a batch, a tensor of one number, got {what}.")
        return loss

    return looked_at


class Objectives:
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

    def __init__(
        self,
        loss_fn: LossFn,
        forward: Objective | None = None,
        adversary: AdversaryLike | None = None,
    ) -> None:
        opponent = None if adversary is None else adversary_of(adversary)
        if forward is not None and opponent is not None:
            raise ValueError(
                f"{opponent!r} attacks (inputs, targets), of which forward= knows nothing. Pass loss_fn=, or attack "
                f"inside of forward."
            )
        is_free = isinstance(opponent, FreeAdversarialTraining)
        self.num_replays = opponent.num_replays if is_free else 1
        self._opponent = opponent = opponent.start() if is_free else opponent
        if forward is None:
            self._first, self._later = (supervised(loss_fn, check=c, adversary=opponent) for c in (True, False))
        else:
            self._first, self._later = checked_forward(forward), forward

    def at(self, epoch: int) -> Objective:
        """Return ``forward(model, batch) -> loss`` of an epoch; in the first, 0, targets are checked."""
        return self._later if epoch else self._first

    def state(self) -> dict[str, Tensor]:
        """Return what changes from step to step."""
        known = self._opponent.perturbation if isinstance(self._opponent, FreeRun) else None
        return {} if known is None else {"perturbation": known}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up where `state` was."""
        if isinstance(self._opponent, FreeRun):
            self._opponent.perturbation = tensors.get("perturbation")
