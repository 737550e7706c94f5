"""The loss that one step lowers, as a function of model and batch: shared by endpoints and curves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modeconn.adversarial import Attack
from modeconn.attacks.training import Adversary, adversary_of
from modeconn.evaluate import Objective
from modeconn.loss import LossFn, check_targets


def supervised(loss_fn: LossFn, *, check: bool = False, adversary: Adversary | None = None) -> Objective:
    """Return ``forward(model, batch) -> loss`` for ``(inputs, targets)``.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        check: Whether to check that targets are classes of the model.
        adversary: What changes inputs in the light of the model first, or None.
    """

    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        if check:
            check_targets(outputs, targets)
        return loss_fn(outputs, targets)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        if adversary is None:
            return checked(model(inputs), targets)
        return adversary.loss(model, inputs, targets, checked)

    return forward


def objectives(
    loss_fn: LossFn, forward: Objective | None = None, adversary: Adversary | Attack | None = None
) -> tuple[Objective, Objective]:
    """Return what is lowered in the first epoch, in which targets are checked, and later.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place.
        adversary: An attack, or a way to train against one; see `modeconn.attacks.training`.

    Raises:
        ValueError: If there are both ``forward`` and ``adversary``, or the latter is neither.
    """
    opponent = None if adversary is None else adversary_of(adversary)
    if forward is None:
        first, later = (supervised(loss_fn, check=check, adversary=opponent) for check in (True, False))
        return first, later
    if opponent is not None:
        raise ValueError(
            f"{opponent!r} attacks (inputs, targets), of which forward= knows nothing. Pass loss_fn=, or attack inside "
            f"of forward."
        )
    return forward, forward
