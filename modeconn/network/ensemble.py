"""Several networks, such as points of one curve, as one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.loss import main_output
from modeconn.tools.door import check
from modeconn.tools.shown import Shown


class Ensemble(Shown, nn.Module):
    r"""The network whose probabilities are the mean of those of several classifiers.

    .. math:: \log \frac1K \sum_{k=1}^{K} \operatorname{softmax}(z_k(x))

    are its logits, so losses and attacks take it as any other network. Probabilities are averaged, not logits: a member
    has one vote however large its logits are, and adversarial training, scale and confidence of which differ along a
    curve, would otherwise weigh the members.

    Args:
        models: Classifiers of the same inputs and classes, which stay the caller's: they are not copied. The ensemble
            is in train mode if one of them is.
        axis: Along which axis of their outputs classes lie: 1 for ``(N, C, ...)``, -1 for ``(N, ..., C)``.

    Raises:
        ValueError: If there is none, or ``axis`` is no integer.

    Example:
        >>> from modeconn import models
        >>> both = Ensemble(models.mlp(4, (8,), 3, seed=seed).eval() for seed in (1, 2))
        >>> round(both(torch.rand(5, 4)).exp().sum().item(), 4)
        5.0
    """

    axis = 1  # of those that were pickled before there was a choice

    def __init__(self, models: Iterable[nn.Module], *, axis: int = 1) -> None:
        super().__init__()
        if not isinstance(axis, int):
            raise ValueError(f"axis must be an integer, got axis={axis!r}.")
        self.axis = axis
        check("models", models, Iterable[nn.Module])
        models = list(models)
        check("models", models, Iterable[nn.Module])  # an iterator can only be looked into by reading it
        self.members = nn.ModuleList(models)
        if not self.members:
            raise ValueError("models is empty: an ensemble needs at least one network.")
        self.training = self.members.training = any(member.training for member in self.members)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the logarithm of the mean probabilities, in the shape of the outputs, for what each member takes."""
        votes = torch.stack([main_output(member(*inputs, **named)).log_softmax(self.axis) for member in self.members])
        return votes.logsumexp(0) - math.log(len(self.members))
