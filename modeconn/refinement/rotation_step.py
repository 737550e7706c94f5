"""The step of PAM that learns rotations and the bend of the curve together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import ClassVar

import torch
from torch import Tensor, nn

from modeconn.matching.learned import evenly
from modeconn.matching.turned import TurnedWeights
from modeconn.refinement.relabelled import Relabelled
from modeconn.tools.checks import check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown


@dataclass(frozen=True)
class RotationStep(Shown):
    r"""Learn the rotations of b, and with them the control points between the ends, by gradient descent.

    Groups that rotate are turned from where b is by :math:`\exp(Z - Z^T)`, as `Sinkhorn` turns them, on the sample and
    the curve of `PAM`: each gradient is that of one of its batches, with respect to all rotations and to the bend of
    the curve at once. Now and then what was learned is compared with what was kept before; it is kept if the exact loss
    on the sample falls. Groups that permute their units stay.

    Args:
        num_steps: Gradient steps.
        learning_rate: Adam's, of the rotations; half a cosine from there to 0.
        curve_learning_rate: Adam's, of the control points between the ends.
        num_rounds: How many times what was learned is compared.

    References:
        Theus et al., 2025, https://arxiv.org/abs/2506.22712

    Raises:
        ValueError: If a setting is not positive.
    """

    rotates: ClassVar[bool] = True
    permutes: ClassVar[bool] = False

    num_steps: int = 100
    learning_rate: float = 6e-3
    curve_learning_rate: float = 3e-4
    num_rounds: int = 5

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_steps", "num_rounds")
        check_positive(self, "num_steps", "learning_rate", "curve_learning_rate", "num_rounds")

    def __call__(self, b: Relabelled) -> None:
        """Turn b further, and bend the curve that leads to it, in place."""
        first, bend = b.permutation, nn.Parameter(b.bend.clone())
        turned = TurnedWeights(b.spec, b.space, b.theta_b.clone(), b.spec.identity())
        optimizer = torch.optim.Adam(
            [
                {"params": turned.parameters, "lr": self.learning_rate},
                {"params": [bend], "lr": self.curve_learning_rate},
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        gradients, looks = _gradients(b, bend), evenly(self.num_rounds, self.num_steps)
        b.num_planned = b.num_tried + len(looks)
        for step in range(1, self.num_steps + 1):
            optimizer.zero_grad()
            turned.backward(gradients)
            optimizer.step()
            schedule.step()
            if step in looks:
                b.replace(turned.relabelling() @ first, bend.detach().clone())


def _gradients(b: Relabelled, bend: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """Return what gives the gradient with respect to b's weights at the next place, and leaves that of the bend."""
    places = cycle(range(len(b.loss)))

    def gradient(theta_b: Tensor) -> Tensor:
        _, towards_b, towards_bend = b.loss.gradient(theta_b, bend.detach(), [next(places)])
        bend.grad = towards_bend * b.space.trainable
        return towards_b

    return gradient
