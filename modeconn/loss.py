"""Losses that understand what the zoo's models return."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

LossFn = Callable[[Tensor, Tensor], Tensor]

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
