"""PAM on all of a small data set: no step in P or in the curve raises the objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from modeconn.connection import History, TrainingData
from modeconn.curve_loss import CurveLoss, straight
from modeconn.curve_step import CurveStep
from modeconn.loaders import batches
from modeconn.objective import supervised
from modeconn.refinement.pam import PAM, improve_permutation
from modeconn.symmetry import Permutation

_SUFFICIENT = 1e-4  # the share of the linear decrease that a step must reach (Armijo)
_SMALLEST = 1e-12


def descend(
    pam: PAM, permutation: Permutation, step: CurveStep, training: TrainingData, num_steps: int
) -> tuple[Permutation, History]:
    """Alternate the step in P and gradient descent on the curve, on all data at a fixed grid of positions.

    Args:
        pam: The settings.
        permutation: How b was relabelled at the start.
        step: Holds control points, which are changed, and module; its optimizer is not used.
        training: Loader and loss.
        num_steps: Steps of gradient descent, divided among the iterations.

    Returns:
        How b is relabelled in the end, and the history: as loss the objective, proximal term included, after each
        step of gradient descent.
    """
    started = time.perf_counter()
    points, curve = step.control_points, step.curve
    data = list(batches(training.loader, points.device))
    grid = torch.linspace(0, 1, pam.num_points, dtype=torch.float64).tolist()
    forward = training.forward or supervised(training.loss_fn)
    loss = CurveLoss(step.workspace, curve, points[0], forward, [(t, batch) for t in grid for batch in data])
    history = History()
    for iteration in range(pam.iterations):
        permutation, turn = improve_permutation(pam, step, loss, permutation, epoch=len(history.loss))
        history.turns.append(turn)
        line = straight(curve, points[0], points[-1])
        held, rate = points[1:-1] - line, 1.0
        for _ in range(len(history.loss), math.ceil((iteration + 1) * num_steps / pam.iterations)):
            bend = points[1:-1] - line
            value, _, slope = loss.gradient(points[-1], bend)

            def objective(bend: Tensor, held: Tensor = held) -> float:
                return loss.value(points[-1], bend) + _proximal(bend, held, pam.nu_curve)

            start = value + _proximal(bend, held, pam.nu_curve)
            slope = slope + (bend - held) / pam.nu_curve
            bend, value, rate = _descend_once(objective, bend, slope, start, rate)
            points[1:-1] = line + bend
            history.loss.append(value)
    return permutation, History(history.loss, [], time.perf_counter() - started, history.turns)


def _proximal(bend: Tensor, held: Tensor, nu: float) -> float:
    return float((bend - held).square().sum(dtype=torch.float64)) / (2 * nu)


def _descend_once(
    objective: Callable[[Tensor], float], x: Tensor, gradient: Tensor, start: float, rate: float
) -> tuple[Tensor, float, float]:
    """Step down the gradient, halving the rate until the objective falls enough.

    Returns:
        The new x, the objective there, and the rate to try next.
    """
    slope, first = float(gradient.square().sum(dtype=torch.float64)), rate
    while rate > _SMALLEST:
        candidate = x - rate * gradient
        value = objective(candidate)
        if value <= start - _SUFFICIENT * rate * slope:
            return candidate, value, 2 * rate
        rate /= 2
    return x, start, first  # no step lowers it by more than rounding
