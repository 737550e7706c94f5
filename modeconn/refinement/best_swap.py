"""How far from locally optimal a relabelling is, measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import comb, prod
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeconn.curves import Curve
from modeconn.curves.loss import CurveLoss, straight
from modeconn.network.loss import Forward, LossFn, TrainingData
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.refinement.moves import Move, exchanges, linear_costs
from modeconn.refinement.pam import draw_sample, objective_of
from modeconn.refinement.relabelled import Relabelled
from modeconn.symmetry import Permutation
from modeconn.tools.door import checked, shown
from modeconn.tools.shown import Shown


class Swappable(Protocol):
    """A connection, as far as its end b is moved."""

    control_points: Tensor
    curve: Curve
    permutation: Permutation | None
    space: WeightSpace
    training: TrainingData

    def model_at(self, t: float) -> nn.Module:
        """Return the network at ``t``."""
        ...


@dataclass(frozen=True)
class BestSwap(Shown):
    """The exchange of two units of b that lowers the loss along a connection most.

    Args:
        group: The group of the units, None if no exchange that was tried lowers the loss.
        places: Row-major numbers of the two.
        decrease: By how much the loss falls; 0 if by nothing.
        loss: The loss as it is.
        num_tried: Exchanges whose exact loss was computed, those that promise most to first order.
        num_swaps: All there are.
    """

    group: str | None
    places: tuple[int, int] | None
    decrease: float
    loss: float
    num_tried: int
    num_swaps: int

    def __str__(self) -> str:
        what = f"of the {self.num_swaps:,} exchanges of two units, {self.num_tried:,} were tried exactly"
        if self.group is None:
            return f"{what}: none lowers the loss along the curve, {self.loss:.4g}."
        i, j = self.places
        share = self.decrease / abs(self.loss)
        return (
            f"{what}: that of {i} and {j} in '{self.group}' lowers the loss along the curve most, by "
            f"{self.decrease:.3g} of {self.loss:.4g} ({share:.2%})."
        )


@checked
def best_swap(
    connection: Swappable,
    loader: Iterable[Any] | None = None,
    *,
    num_batches: int | None = 64,
    num_tries: int | None = 1000,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> BestSwap:
    """Look for the exchange of two units of b, or of two blocks, that lowers the loss along a connection most.

    The exchanges are ordered by what they promise to first order, and tried exactly on one sample of data and
    positions; the curve's middle moves with b as in `PAM`. If none lowers the loss, the relabelling is a local optimum
    as far as was tried.

    Args:
        connection: A `modeconn.Connection` with a permutation, and a curve whose ends are fixed.
        loader: Training data. Default: the fit's own.
        num_batches: On how many batches of the loader the loss is measured, each at its own t; None for all.
        num_tries: How many exchanges are tried exactly; None for all.
        loss_fn: Default that of the fit, or cross entropy.
        forward: ``forward(model, batch) -> loss`` in its place; default that of the fit, if it had one.
        seed: For the sample.

    Raises:
        ValueError: If there is no permutation, no data, the curve has free ends, or a number is not positive.
    """
    if not hasattr(connection, "control_points"):
        raise ValueError(f"connection must be a modeconn.Connection, got {shown('connection', connection)}.")
    for name, value in (("num_batches", num_batches), ("num_tries", num_tries)):
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} must be an integer of at least 1, or None, got {name}={value!r}.")
    training = connection.training
    if loader is not None:
        training = replace(training, loader=loader)
    if loss_fn is not None or forward is not None:
        training = replace(training, loss_fn=loss_fn or training.loss_fn, forward=forward)
    _check_connection(connection, training)
    b = _relabelled(connection, training, num_batches, seed)
    if not math.isfinite(b.value):
        raise FloatingPointError(
            f"the loss along the curve is {b.value}. Look for values that are not finite in the data and in the "
            f"networks' weights."
        )
    num_swaps = sum(prod(g.shape[:-1]) * comb(g.size, 2) for g in b.spec.groups if not g.rotates)
    moves = _most_promising(b, num_swaps if num_tries is None else num_tries)
    tried = ((b.value_after(move), move) for move in moves)
    lower = [(value, move) for value, move in tried if value < b.value]
    if not lower:
        return BestSwap(None, None, 0.0, b.value, len(moves), num_swaps)
    value, best = min(lower, key=lambda one: one[0])
    ((group, perm),) = best.perms.items()
    i, j = (perm != torch.arange(perm.shape[-1])).flatten().nonzero().flatten().tolist()
    return BestSwap(group, (i, j), b.value - value, b.value, len(moves), num_swaps)


def _check_connection(connection: Swappable, training: TrainingData) -> None:
    if connection.permutation is None:
        raise ValueError("this connection took b as it was, so its groups are not known: fit it with align=.")
    if training.loader is None:
        raise ValueError("this connection remembers no training data: pass loader=.")
    if connection.curve.free_ends:
        raise ValueError(f"best_swap relabels the end b, but {connection.curve!r} has trained an end.")


def _relabelled(connection: Swappable, training: TrainingData, num_batches: int | None, seed: int) -> Relabelled:
    """Return the end b of a connection, to be moved, with the loss along it on a sample."""
    points, curve, space = connection.control_points, connection.curve, connection.space
    workspace = Workspace(connection.model_at(0), space)
    sample, _ = draw_sample(training.loader, points.device, num_batches, seed=seed)
    loss = CurveLoss(workspace, curve, points[0], objective_of(training), sample)
    bend = points[1:-1] - straight(curve, points[0], points[-1])
    return Relabelled(space, loss, points[-1].clone(), bend, connection.permutation)


def _most_promising(b: Relabelled, count: int) -> list[Move]:
    """Return the exchanges by which the loss would fall most if it were linear, at most ``count``."""
    gradient, moves = b.gradient(), []
    for tree in b.spec.trees():
        costs = linear_costs(b.spec, tree, gradient, b.parameters)
        moves += exchanges(b.spec, tree, costs, count)
    return sorted(moves, key=lambda move: -move.gain)[:count]
