"""What training and measuring lower: a loss of outputs and targets, or a function of model and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.network.batches import inputs_and_targets

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``loss_fn(outputs, targets) -> loss``, a mean over the examples of the batch."""

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch) -> loss``, a mean over the examples of the batch; one that a user gave may also return
``(loss, outputs, targets)``, from which other metrics are computed."""

AUXILIARY_WEIGHT = 0.3


def main_output(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the logits alone, also of a model that returns ``(logits, *auxiliary_logits)``."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def cross_entropy(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Mean cross entropy per example; auxiliary classifiers, where a model returns them, count 0.3 each.

    Args:
        outputs: Logits ``(N, C)``, or ``(logits, *auxiliary_logits)`` as GoogLeNet returns in train mode
            (Szegedy et al., 2015, https://arxiv.org/abs/1409.4842, section 5).
        targets: int64 ``(N,)`` in ``[0, C)``.

    Returns:
        A scalar.
    """
    loss = F.cross_entropy(main_output(outputs), targets)
    if isinstance(outputs, (tuple, list)):
        for auxiliary in outputs[1:]:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(auxiliary, targets)
    return loss


def per_example(loss_fn: LossFn, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Return what ``loss_fn``, a mean over examples, is of each example alone, ``(N,)``.

    In one vectorised call where it can be made; a loss that indexes by its targets or branches is called one by one.
    """
    is_one = isinstance(outputs, Tensor)
    alone: Any = outputs[:, None] if is_one else tuple(output[:, None] for output in outputs)
    targets = targets[:, None]
    try:
        return torch.func.vmap(loss_fn)(alone, targets)
    except Exception:  # vmap and losses raise many types of errors; all mean that the fast path is not possible
        rows = alone if is_one else zip(*alone, strict=True)
        return torch.stack([loss_fn(row, target) for row, target in zip(rows, targets, strict=True)])


def is_classification(outputs: Tensor | tuple[Tensor, ...], targets: object) -> bool:
    """Whether ``targets`` are class indices for logits ``(N, C, ...)``: integers, with one dimension less."""
    logits = main_output(outputs)
    return (
        isinstance(targets, Tensor)
        and isinstance(logits, Tensor)
        and not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        and logits.ndim == targets.ndim + 1
    )


@dataclass(frozen=True)
class TrainingData:
    """What a fit knew of its data and loss, remembered in memory, never in files.

    Args:
        loader: Training data, or None.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, or None.
    """

    loader: Iterable[Any] | None = None
    loss_fn: LossFn = cross_entropy
    forward: Forward | None = None


def supervised(loss_fn: LossFn, *, check: bool = False) -> Forward:
    """Return ``forward(model, batch) -> loss`` for ``(inputs, targets)``.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        check: Whether to check that targets are classes of the model.
    """
    compare = checked(loss_fn) if check else loss_fn

    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = inputs_and_targets(batch)
        return compare(model(inputs), targets)

    return forward


def checked(loss_fn: LossFn) -> LossFn:
    """Return the same loss with a look at its targets, see `check_targets`."""

    def looked_at(outputs: Tensor, targets: Tensor) -> Tensor:
        check_targets(outputs, targets, loss_fn)
        return loss_fn(outputs, targets)

    return looked_at


def loss_alone(forward: Forward) -> Forward:
    """Return the same function without outputs and targets, if it returns them."""

    def alone(model: nn.Module, batch: Any) -> Tensor:
        found = forward(model, batch)
        return found[0] if _is_with_outputs(found) else found

    return alone


def checked_forward(forward: Forward) -> Forward:
    """Return `loss_alone` of a function, with a look at what it returns."""
    return lambda model, batch: answer_of(forward(model, batch))[0]


def answer_of(found: Any) -> tuple[Tensor, tuple[Any, Any] | None]:
    """Return the loss that a user's ``forward`` returned, and outputs and targets if it did.

    Raises:
        ValueError: If it returned neither a loss nor ``(loss, outputs, targets)``.
    """
    loss, *rest = found if _is_with_outputs(found) else (found,)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"forward= must return the mean loss of a batch, a tensor of one number, or (loss, outputs, targets), got "
            f"{what}."
        )
    return loss, tuple(rest) if rest else None


def _is_with_outputs(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) == 3


def check_targets(
    outputs: Tensor | tuple[Tensor, ...], targets: Tensor, loss_fn: LossFn | None = None, *, name: str = "loader"
) -> None:
    """Raise unless class indices lie in the classes the model knows, and a default loss makes sense of the targets.

    Raises:
        ValueError: With the first target that is no class; on an accelerator the loss itself would end the process. If
            ``loss_fn`` is `cross_entropy`: where the model has but one output, of which it is 0 whatever that is, or
            targets are neither classes nor probabilities of classes.
    """
    if loss_fn is cross_entropy:
        _check_for_cross_entropy(main_output(outputs), targets, name)
    if not is_classification(outputs, targets):
        return
    num_classes = main_output(outputs).shape[1]
    outside = targets[(targets < 0) | (targets >= num_classes)]
    if outside.numel():
        raise ValueError(
            f"targets of {name} must lie in 0..{num_classes - 1}, the model's {num_classes} classes, got a target of "
            f"{outside.flatten()[0].item()}."
        )


def _check_for_cross_entropy(logits: object, targets: object, name: str) -> None:
    if not (isinstance(logits, Tensor) and isinstance(targets, Tensor)):
        return
    way_out = "Pass loss_fn=, such as torch.nn.functional.mse_loss, or forward=."
    if logits.ndim < 2 or logits.shape[1] == 1:
        raise ValueError(
            f"the model's outputs of shape {tuple(logits.shape)} are no scores of two or more classes, which cross "
            f"entropy, the default loss, compares. {way_out}"
        )
    if targets.is_floating_point() and not _are_probabilities(targets, logits):
        raise ValueError(
            f"targets of {name} are real numbers, of shape {tuple(targets.shape)}: neither classes nor probabilities "
            f"of classes, which cross entropy, the default loss, takes. {way_out}"
        )


def _are_probabilities(targets: Tensor, logits: Tensor) -> bool:
    """Whether targets are at least 0, with sum 1 over the model's classes, as far as their precision tells."""
    if targets.shape != logits.shape:
        return False
    off = (targets.float().sum(1) - 1).abs().max()
    return bool(targets.min() >= 0) and float(off) < 1e-3 + logits.shape[1] * torch.finfo(targets.dtype).eps
