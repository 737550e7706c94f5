"""Learn a curve of low loss between two networks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modeconn.attacks.training import AdversaryLike, adversary_of
from modeconn.connection import (
    Connection,
    History,
    TrainingData,
    permutation_tensors,
    saved_permutation,
    warn_about_buffers,
)
from modeconn.curves import Bezier, Curve, Line
from modeconn.curves.step import CurveStep
from modeconn.learning.epochs import KIND, Keeper, Run
from modeconn.learning.step_loss import Objectives
from modeconn.measure.profile import Objective
from modeconn.network.batches import check_loader, first_batch
from modeconn.network.loss import LossFn, cross_entropy
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace, Workspace, named_buffers
from modeconn.refinement.exact import Descent
from modeconn.refinement.pam import PAM, Refinement
from modeconn.symmetry import Permutation, PermutationSpec
from modeconn.tools import files
from modeconn.tools.files import Checkpoint
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.rng import seeded

if TYPE_CHECKING:
    from modeconn.matching import Alignment

_LOGGER = logging.getLogger(__name__)
_QUADRATIC = Bezier(2)
_RECIPE = Recipe()
_Saved = tuple[dict[str, Tensor], dict[str, Any]]


def fit_curve(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    align: bool | Permutation | Alignment | Any = True,
    curve: Curve = _QUADRATIC,
    recipe: Recipe = _RECIPE,
    refine: PAM | None = None,
    adversary: AdversaryLike | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Objective | None = None,
    spec: Any = None,
    example_input: Any = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Connection:
    r"""Align network b with network a, then learn a curve of low loss between them.

    .. math:: \min_{c} \; \mathbb{E}_{t \sim U(0, 1)} \left[
        L(\theta_c(t)) + \tfrac{\lambda}{2} \lVert \theta_c(t) \rVert^2 \right]

    by one optimizer step per batch, each at its own t (Garipov et al., 2018). The t of 64 consecutive batches fall
    into the 64 equal parts of [0, 1], in random order; each is uniform by itself, and their mean varies less. The
    penalty acts on the interpolated weights, not on the control points. Batch norm trains with batch statistics.

    Args:
        model_a: Network at t=0; any module. It is not changed, nor is ``model_b``.
        model_b: Network at t=1, once relabelled; of the same architecture, dtype and device.
        loader: Training data, any re-iterable of ``(inputs, targets)``. Without it, networks are aligned by their
            weights, no curve is learned, and the straight connection is returned with a warning.
        align: True for the default method of `modeconn.align`, a method object, a finished permutation or alignment,
            or False to take b as it is.
        curve: The family of curves to learn from; `Line()` learns nothing.
        recipe: Epochs, optimizer, schedule, weight decay, autocast, compile.
        refine: `PAM()` to improve the relabelling and the curve together, by turns, from where ``align`` starts.
        adversary: An attack, such as `PGD(8 / 255, 2 / 255, 5)`, or `AdversarialTraining` or `TRADES` with one, or
            `FreeAdversarialTraining`: each batch is attacked at the t at which the step is made. Evaluation
            recalibrates batch norm on clean data even so, unless ``recalibrate=`` are `AdversarialExamples`.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, for batches of any other kind.
        spec: Symmetries of the architecture, if known.
        example_input: An input of the models, for finding their symmetries without a loader.
        checkpoint: A file, or a `Checkpoint` that also says how often to write it. If it exists, the run goes on from
            it and ends with the same bits as one that was never interrupted, on the same machine and versions.
        seed: For t, data order, augmentation, dropout and attacks. The caller's random state is left as it was.
        progress: Whether to show a progress bar.

    Returns:
        The connection, with the history of the fit.

    Raises:
        ValueError: If the networks or the data do not fit together, or the checkpoint belongs to another run.
        OSError: If the checkpoint cannot be written.
        FloatingPointError: If the loss stops being finite; the last good checkpoint is left in place.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026; Tatro et al., 2020, https://arxiv.org/abs/2009.02439
    """
    space = WeightSpace(model_a)
    space.check(model_a, name="a")
    space.check(model_b, name="b")
    warn_about_buffers(model_a, model_b)
    training = TrainingData(loader, loss_fn, forward)
    if refine is not None:
        if not isinstance(refine, PAM):
            raise ValueError(f"refine must be PAM(...), got refine={refine!r}; a step in P is given as PAM(step=...).")
        refine.check(curve, recipe, loader)
    goals = Objectives(loss_fn, forward, adversary)
    if adversary is not None:
        _check_adversary(adversary, refine, loader)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    if loader is None:
        curve, checkpoint = Line(), None
        warnings.warn(
            "no curve was learned, because no loader was given: this is the straight connection. "
            "Pass a loader of training data to learn one.",
            stacklevel=2,
        )
    with seeded(seed, space.device):
        if loader is not None:
            check_loader(loader) if forward is None else first_batch(loader)
        settings = (
            _settings(space, (model_a, model_b), align, curve, recipe, refine, adversary, training, seed)
            if checkpoint
            else {}
        )
        saved = _read(checkpoint.path, settings) if checkpoint else None
        if saved is None:
            permutation = _find_permutation(model_a, model_b, loader, align, spec, example_input)
            if refine and permutation is None:
                permutation = _find_spec(model_a, loader, spec, example_input).identity()
        else:
            permutation = saved_permutation(saved[0], saved[1]["permutation"])
        relabelled = model_b if permutation is None else permutation.apply(model_b)

        points = curve.initial_control_points(space.flatten(model_a), space.flatten(relabelled, name="b"))
        history = None
        if curve.num_trained or refine:
            step = CurveStep(Workspace(model_a, space), curve, points, recipe)
            keeper = _keeper(checkpoint, settings, permutation) if checkpoint else None
            if refine and not permutation.spec.groups:
                _LOGGER.warning("the model has no group of units that may be relabelled: PAM moves the curve only.")
            if refine and refine.exact:
                descent = Descent(refine, permutation, step, training, keeper)
                if saved is not None:
                    descent.resume(*saved)
                history, permutation = descent.run(recipe.epochs), descent.permutation
            else:
                refinement = Refinement(refine, permutation, step, training, recipe, seed=seed) if refine else None
                history = _learn(
                    step,
                    recipe,
                    loader,
                    goals,
                    refinement,
                    seed=seed,
                    keeper=keeper,
                    saved=saved,
                    progress=progress,
                )
                permutation = refinement.permutation if refinement else permutation
            relabelled = model_b if permutation is None else permutation.apply(model_b)
    buffers = named_buffers(model_a), named_buffers(relabelled)
    return Connection(model_a, curve, points, buffers, permutation=permutation, history=history, training=training)


def _learn(
    step: CurveStep,
    recipe: Recipe,
    loader: Iterable[Any],
    objectives: Objectives,
    refinement: Refinement | None,
    *,
    seed: int,
    keeper: Keeper | None,
    saved: _Saved | None,
    progress: bool,
) -> History:
    """Move the control points of ``step`` to low loss, from where a checkpoint stood if there is one."""
    if refinement and not step.curve.num_trained:
        if saved is not None:
            refinement.resume(*saved)
        return refinement.relabel_only(recipe.epochs, keeper)
    with seeded(seed, step.control_points.device):  # anew, so that the alignment does not move the data's order
        run = Run(
            step,
            loader,
            recipe,
            objectives,
            seed=seed,
            keeper=keeper,
            refinement=refinement,
            progress=progress,
        )
        if saved is not None:
            run.resume(*saved)
        return run.train()


def _check_adversary(adversary: AdversaryLike, refine: PAM | None, loader: Iterable[Any] | None) -> None:
    if loader is None:
        raise ValueError(f"{adversary!r} attacks training data, so fit_curve needs it: pass loader=.")
    if refine is not None:
        raise ValueError(f"{refine!r} moves units by the clean loss, so it does not go with {adversary!r}.")


def _find_permutation(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any] | None,
    align: bool | Permutation | Alignment | Any,
    spec: PermutationSpec | None,
    example_input: Any,
) -> Permutation | None:
    """Return how b is to be relabelled, or None."""
    if align is False:
        return None
    if _is_finished(align):
        return getattr(align, "permutation", align)
    from modeconn.matching import align as find

    method = None if align is True else align
    return find(model_a, model_b, loader, method=method, spec=spec, example_input=example_input).permutation


def _find_spec(
    model: nn.Module, loader: Iterable[Any] | None, spec: PermutationSpec | None, example_input: Any
) -> PermutationSpec:
    """Return the symmetries of a model that is not aligned, proved."""
    from modeconn.matching.alignment import find_spec

    return find_spec(model, loader, spec, example_input, verify=True)


def _is_finished(align: Any) -> bool:
    """Whether ``align`` is a permutation or an alignment, not a method to find one."""
    return isinstance(align, Permutation) or hasattr(align, "permutation")


def _keeper(checkpoint: Checkpoint, settings: dict[str, Any], permutation: Permutation | None) -> Keeper:
    spec = None if permutation is None else permutation.spec.to_json()
    return Keeper(checkpoint, {"settings": settings, "permutation": spec}, permutation_tensors(permutation))


def _read(path: str | os.PathLike[str], settings: dict[str, Any]) -> _Saved | None:
    """Return the checkpoint at ``path`` if there is one, once it is known to be of this run."""
    if not Path(path).exists():
        files.check_writable(path)
        return None
    tensors, about = files.read(path, KIND)
    files.check_settings(path, about["settings"], settings)
    return tensors, about


def _settings(
    space: WeightSpace,
    models: tuple[nn.Module, nn.Module],
    align: Any,
    curve: Curve,
    recipe: Recipe,
    refine: PAM | None,
    adversary: AdversaryLike | None,
    training: TrainingData,
    seed: int,
) -> dict[str, Any]:
    """Return what makes a run what it is, under the names its caller knows."""
    values = {f"recipe.{field.name}": getattr(recipe, field.name) for field in fields(recipe)}
    return {
        **{f"parameter {name!r}": layout for name, layout in space.layout.items()},
        "curve": identify(curve),
        **{name: identify(value) for name, value in values.items()},
        "loss": identify(training.forward or training.loss_fn),
        "seed": seed,
        "refine": identify(refine),
        "adversary": None if adversary is None else identify(adversary_of(adversary)),
        "align": identify(getattr(align, "permutation", align) if _is_finished(align) else align),
        **{f"the digest of network {name}": digest(model) for name, model in zip("ab", models, strict=True)},
    }
