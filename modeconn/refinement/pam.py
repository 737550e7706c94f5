"""Proximal alternating minimisation: the relabelling of b and the curve to it, in turn."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modeconn.curves import Curve
from modeconn.curves.loss import CurveLoss, Sample, straight
from modeconn.curves.step import CurveStep
from modeconn.learning.checkpoint import RunFile, State, moved_tensors
from modeconn.learning.history import History
from modeconn.network.batches import batches
from modeconn.network.loss import Forward, TrainingData, loss_alone, supervised
from modeconn.network.recipe import Recipe
from modeconn.network.shares import is_shared_out
from modeconn.refinement.proximal_linear import ProximalLinear
from modeconn.refinement.relabelled import Relabelled
from modeconn.symmetry import Orthogonal, Permutation, Relabelling
from modeconn.tools.callbacks import Callbacks, MoveEnd
from modeconn.tools.checks import check_at_least, check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown

_LOGGER = logging.getLogger(__name__)
_ENOUGH = 16  # number of positions at which the loss along the curve is sampled


class PermutationStep(Protocol):
    """A way to relabel b so that the loss of the curve falls; its settings are its fields.

    One that also turns units, where groups rotate them, says so by an attribute ``rotates = True``.
    """

    def __call__(self, b: Relabelled) -> None:
        """Relabel b further, in place, never to a higher loss on its sample."""
        ...


@dataclass(frozen=True)
class PAM(Shown):
    r"""Refine the relabelling P of b and the curve together (Tatro et al., 2020, section 3.2).

    .. math:: \min_{P, \varphi} \; \mathbb{E}_t \, L(\theta(t)), \qquad
        \theta(t) = (1 - t) \, a + t \, P b + \sum_k B_k(t) \, \varphi_k

    by turns: a step in P with the curve's bend :math:`\varphi` as it is, then ordinary training of the curve with P as
    it is, each held by a proximal term near where it began. The epochs of the recipe are divided among the iterations,
    so that a fit with PAM makes as many gradient steps on the curve as one without.

    Args:
        iterations: How many turns.
        step: How P is improved: `ProximalLinear`, which also turns groups that rotate their units, `SinkhornStep`,
            `RelaxedStep`, or `RotationStep`, which learns rotations and the curve together.
        num_batches: Batches of the loader on which the step in P measures the loss, each at its own t, drawn anew in
            each turn; None for all of them. One pass at most; where that is fewer than 16 batches, they are used again
            and again, so that the curve is looked at in 16 places.
        standard_errors: By how many standard errors of the paired differences the loss must fall on these batches for a
            relabelling to be accepted, if they are not all of the data: of many moves chance favours some. (TinyTen on
            15,000 images of CIFAR-10, 64 batches: on other batches the loss fell by 0.026, with 0 in its place by 0.013
            in twice the time.)
        nu_permutation: Proximal weight of P, infinite for none.
        nu_curve: Proximal weight of the curve, infinite for none. The paper's is 1000, for both.
        tolerance: Turns end early when no move is accepted and the loss has fallen by less than this share of itself
            since the turn before; 0 for never.
        exact: For small data: the loss on all of it, at a grid of `num_points`, in both steps; the curve moves by
            gradient descent with backtracking, one step an epoch of the recipe (whose optimizer, schedule and weight
            decay then do not matter). The objective never rises.
        num_points: Positions of that grid.

    Raises:
        ValueError: If a setting is out of range.

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439
    """

    iterations: int = 4
    step: PermutationStep = field(default_factory=ProximalLinear)
    num_batches: int | None = 64
    standard_errors: float = 2.0
    nu_permutation: float = math.inf
    nu_curve: float = 1000.0
    tolerance: float = 0.0
    exact: bool = False
    num_points: int = 11

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "iterations", "num_batches", "num_points")
        check_at_least(self, 1, "iterations", "num_points", *["num_batches"] * (self.num_batches is not None))
        if self.exact and self.num_points < 3:
            raise ValueError(f"num_points must be at least 3, two of them the ends, got num_points={self.num_points}.")
        if isinstance(self.step, type) or not callable(self.step):
            raise ValueError(f"step must be a step in P such as ProximalLinear(), got step={self.step!r}.")
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact must be True or False, got exact={self.exact!r}.")
        check_positive(self, "nu_permutation", "nu_curve")
        check_at_least(self, 0, "tolerance", "standard_errors")

    def check(self, curve: Curve, recipe: Recipe, loader: Any) -> None:
        """Raise a ValueError if a fit of this curve by this recipe on this data cannot be refined."""
        if loader is None:
            raise ValueError("refine=PAM(...) measures the loss of the curve, so it needs data: pass loader=.")
        if curve.free_ends:
            raise ValueError(
                f"refine=PAM(...) relabels the end b, but {curve!r} trains an end. Use a curve with fixed ends."
            )
        if self.iterations > recipe.epochs:
            raise ValueError(
                f"refine=PAM(iterations={self.iterations}) divides the epochs of the recipe, which has only "
                f"{recipe.epochs}. Pass fewer iterations or more epochs."
            )

    def check_relabelling(self, relabelling: Relabelling | None) -> None:
        """Raise a ValueError if a relabelling is of a kind that the step in P cannot improve."""
        if isinstance(relabelling, Orthogonal):
            if not getattr(self.step, "rotates", False):
                raise ValueError(
                    f"{type(self.step).__name__} permutes units, and align= found groups that rotate them. Use "
                    f"refine=PAM(step=ProximalLinear()), or symmetries='permutation'."
                )
        elif isinstance(relabelling, Permutation) and not getattr(self.step, "permutes", True):
            raise ValueError(
                f"{type(self.step).__name__} turns groups that rotate their units, and align= found none. Pass "
                f"symmetries='orthogonal', or use refine=PAM(step=ProximalLinear())."
            )
        elif not isinstance(relabelling, Permutation):
            raise ValueError(
                f"refine= moves units, and align= gave a relabelling of another kind, {relabelling.kind}. Pass a "
                f"method that finds a permutation or rotations (without invertible=), or leave refine= out."
            )


def improve_permutation(
    pam: PAM,
    step: CurveStep,
    loss: CurveLoss,
    permutation: Permutation | Orthogonal,
    *,
    epoch: int,
    is_part: bool = False,
    callbacks: Callbacks | None = None,
    progress: bool = False,
) -> tuple[Permutation | Orthogonal, dict[str, Any]]:
    """Take the step in P: relabel the end b of ``step.control_points`` further, and move the curve's middle with it.

    Args:
        pam: The settings.
        step: Holds control points, which are changed, and module.
        loss: The loss along the curve.
        permutation: How b is relabelled now.
        epoch: For the record.
        is_part: Whether the loss is measured on a part of the data.
        callbacks: What is told of every move that is tried.
        progress: Whether to show a progress bar of the moves.

    Returns:
        How b is relabelled now, and what the step did, see `Refinement.turns`.
    """
    points, curve, space = step.control_points, step.curve, step.workspace.space
    bend = points[1:-1] - straight(curve, points[0], points[-1])
    needed = pam.standard_errors if is_part else 0.0
    bar = progress_bar(show=progress, desc=f"PAM before epoch {epoch}", unit="move", leave=False)
    told = _Told(callbacks or Callbacks(), bar, epoch)
    b = Relabelled(space, loss, points[-1], bend, permutation, pam.nu_permutation, needed, told)
    before = b.value
    if not math.isfinite(before):
        raise FloatingPointError(
            f"the loss along the curve is {before} before PAM's step in epoch {epoch}: look for values in the data "
            "that are not finite, or lower the learning rate of the recipe's optimizer."
        )
    with bar:
        pam.step(b)
    points[1:-1] = straight(curve, points[0], points[-1]) + b.bend
    step.take_control_points()
    moved = (b.permutation @ permutation.inverse()).num_moved
    _LOGGER.info("PAM before epoch %d: loss %.4f -> %.4f, %d units moved", epoch, before, b.value, moved)
    return b.permutation, {
        "epoch": epoch,
        "loss_before": before,
        "loss_after": b.value,
        "num_tried": b.num_tried,
        "num_accepted": b.num_accepted,
        "num_moved": moved,
        "nu_permutation": _finite(pam.nu_permutation),
        "nu_curve": _finite(pam.nu_curve),
    }


@dataclass(frozen=True)
class _Told:
    """Tells callbacks and a progress bar of moves that were tried."""

    callbacks: Callbacks
    bar: Any
    epoch: int

    def __call__(self, b: Relabelled) -> None:
        self.bar.total = b.num_planned or None
        self.bar.set_postfix(accepted=b.num_accepted, loss=f"{b.value:.4g}", refresh=False)
        self.bar.update()
        if self.callbacks.hear("after_move"):
            event = MoveEnd(self.epoch, b.num_tried, b.num_planned, b.num_accepted, b.value)
            self.callbacks.tell("after_move", event)


def draw_sample(
    loader: Iterable[Any], device: torch.device, num_batches: int | None, *, seed: int, turn: int = 0
) -> tuple[Sample, bool]:
    """Draw batches as training sees them, at positions of which one lies in each equal part of [0, 1].

    Returns:
        The sample, and whether there is more data.
    """
    with seeded(int(np.random.SeedSequence([seed, turn, 2]).generate_state(1)[0]), device):
        found = batches(loader, device)
        drawn = list(islice(found, num_batches))
        is_part = any(True for _ in found)
    random = np.random.default_rng([seed, turn, 2])
    count = max(len(drawn), min(num_batches or _ENOUGH, _ENOUGH))
    t = (random.permutation(count) + random.random(count)) / count
    return list(zip(t.tolist(), islice(cycle(drawn), count), strict=True)), is_part


def objective_of(training: TrainingData) -> Forward:
    """Return ``forward(model, batch) -> loss`` of a fit, which looks whether targets are classes."""
    if training.forward is not None:
        return loss_alone(training.forward)
    return supervised(training.loss_fn, check=True)


def is_finished(pam: PAM, turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether turns end here: no move was accepted, and the loss has fallen by less than the tolerance since before."""
    if not pam.tolerance or len(turns) < 2 or turns[-1]["num_accepted"]:
        return False
    return turns[-2]["loss_after"] - turns[-1]["loss_before"] < pam.tolerance * turns[-1]["loss_before"]


def _finite(weight: float) -> float | None:
    return weight if math.isfinite(weight) else None  # JSON has no infinity


class Refinement:
    """PAM inside one fit of a curve.

    Args:
        pam: The settings.
        permutation: How b was relabelled at the start.
        step: Takes the steps of curve training; its control points and its anchor are changed.
        training: Loader and loss.
        seed: For the samples.
        callbacks: What is told of every move that is tried.
        progress: Whether to show a progress bar of the moves.

    Attributes:
        permutation: How b is relabelled now.
        turns: What each turn did: epochs of curve training before it, mean loss on its sample before and after the step
            in P, relabellings tried and accepted, units moved, both proximal weights (None for infinite).
        is_finished: Whether turns and training end here.
    """

    def __init__(
        self,
        pam: PAM,
        permutation: Permutation | Orthogonal,
        step: CurveStep,
        training: TrainingData,
        *,
        seed: int,
        callbacks: Callbacks | None = None,
        progress: bool = False,
    ) -> None:
        self.permutation = permutation
        self._callbacks, self._progress = callbacks, progress
        self.turns: list[dict[str, Any]] = []
        self.is_finished, self._seconds = False, 0.0
        self._pam, self._step, self._training, self._seed = pam, step, training, seed
        self._starts = {math.ceil(i * step.recipe.epochs / pam.iterations) for i in range(pam.iterations)}

    def before_epoch(self, epoch: int) -> None:
        """Take a turn if one is due and was not taken before the run was interrupted."""
        if epoch in self._starts and all(turn["epoch"] != epoch for turn in self.turns):
            device, number = self._step.control_points.device, len(self.turns)
            training, num_batches = self._training, self._pam.num_batches

            def draw() -> tuple[Sample, bool]:
                return draw_sample(training.loader, device, num_batches, seed=self._seed, turn=number)

            # All processes need the same sample: where each has examples of its own, that of the first.
            has_own = is_shared_out(training.loader, sharded=training.sharded)
            sample, is_part = joined().first(draw) if has_own else draw()
            self.turns.append(self._turn(epoch, sample, is_part))
            self.is_finished = is_finished(self._pam, self.turns)
            self._step.hold(self._pam.nu_curve)

    def relabel_only(self, file: RunFile) -> History:
        """Take all turns along a curve that has nothing to learn, the straight line, from where the run was saved."""
        callbacks = self._callbacks or Callbacks()
        is_new = not file.resume(self._step, self, callbacks)
        callbacks.begin_run(self._step.recipe.epochs, is_new=is_new)
        self._started = time.perf_counter() - self._seconds
        for epoch in range(self._step.recipe.epochs):
            if not self.is_finished:
                self.before_epoch(epoch)
                self._seconds = time.perf_counter() - self._started
                file.save(self._step, self, callbacks)
        return History(seconds=self._seconds, turns=self.turns)

    def _turn(self, epoch: int, sample: Sample, is_part: bool) -> dict[str, Any]:
        step, forward = self._step, objective_of(self._training)
        loss = CurveLoss(step.workspace, step.curve, step.control_points[0], forward, sample, step.recipe.autocast)
        how = {"is_part": is_part, "callbacks": self._callbacks, "progress": self._progress}
        found = improve_permutation(self._pam, step, loss, self.permutation, epoch=epoch, **how)
        self.permutation, turn = found
        return turn

    def state(self) -> State:
        """Return all that changes from turn to turn, as tensors and as JSON can hold it."""
        about = {"turns": self.turns, "is_finished": self.is_finished, "seconds": self._seconds}
        return moved_tensors(self.permutation), {"refinement": about}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned; a run begins with the permutation of its checkpoint."""
        kept = about["refinement"]
        self.turns, self.is_finished, self._seconds = kept["turns"], kept["is_finished"], kept["seconds"]
