"""Learn a curve of low loss between two networks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.attacks.training import AdversaryLike, adversary_of
from modeconn.connection import Connection
from modeconn.curves import Bezier, Curve, Line
from modeconn.curves import describe as describe_curve
from modeconn.curves.path import Path
from modeconn.curves.step import CurveStep
from modeconn.learning.checkpoint import Checkpoint, RunFile
from modeconn.learning.epochs import Run
from modeconn.learning.history import History
from modeconn.learning.shared_epochs import SharedRun
from modeconn.learning.step_loss import StepLoss
from modeconn.matching import ActivationMatching, Alignment, Method, WeightMatching
from modeconn.matching.alignment import Symmetry, find_alignment, find_spec
from modeconn.matching.method import check_data, check_method, finished
from modeconn.network.batches import Opened, check_pair
from modeconn.network.estimates import differing, warn_of
from modeconn.network.loss import Forward, LossFn, TrainingData, cross_entropy
from modeconn.network.recipe import Recipe
from modeconn.network.shares import facts_of
from modeconn.network.weights import WeightSpace, Workspace, named_buffers
from modeconn.refinement.exact import Descent
from modeconn.refinement.pam import PAM, Refinement
from modeconn.symmetry import PermutationSpec
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import MOVED, Relabelling, pack, unpack
from modeconn.tools import provenance
from modeconn.tools.callbacks import Callbacks
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.processes import joined, shared
from modeconn.tools.progress import bars
from modeconn.tools.rng import seeded
from modeconn.tools.warn import warn

_LOGGER = logging.getLogger(__name__)
_QUADRATIC = Bezier(2)
_RECIPE = Recipe()


@shared
@checked
def fit_curve(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    align: bool | Relabelling | Alignment | Method = True,
    curve: Curve = _QUADRATIC,
    start: Connection | nn.Module | Sequence[nn.Module] | None = None,
    recipe: Recipe = _RECIPE,
    refine: PAM | None = None,
    adversary: AdversaryLike | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    sharded: bool = False,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    progress: bool = False,
) -> Connection:
    r"""Align network b with network a, then learn a curve of low loss between them.

    .. math:: \min_{c} \; \mathbb{E}_{t \sim U(0, 1)} \left[
        L(\theta_c(t)) + \tfrac{\lambda}{2} \lVert \theta_c(t) \rVert^2 \right]

    by one optimizer step per batch, each at its own t (Garipov et al., 2018). The t of 64 consecutive batches fall
    into the 64 equal parts of [0, 1], in random order; each is uniform by itself, and their mean varies less. The
    penalty acts on the interpolated weights, not on the control points. Batch norm trains with batch statistics.

    Where several processes are an initialised group of `torch.distributed`, all must make this call, and share its
    work: each step takes a batch and a t of each of them, and moves the curve along their mean gradient. The first
    process aligns the networks, and reads and writes the checkpoint. Batch norm sees the batch of its own process.
    All get the same connection, bit for bit. `modeconn.alone` lets a process work by itself.

    Args:
        model_a: Network at t=0; any module. It is not changed, nor is ``model_b``.
        model_b: Network at t=1, once relabelled; of the same architecture, dtype and device.
        loader: Training data, any re-iterable of ``(inputs, targets)``. Without it, networks are aligned by their
            weights, no curve is learned, and the straight connection is returned with a warning.
        align: True for the default method of `modeconn.align`, a method object, a finished relabelling or alignment,
            or False to take b as it is.
        curve: The family of curves to learn from; `Line()` learns nothing. A class of your own is a dataclass that
            inherits from `modeconn.curves.Curve`.
        start: Where the inner control points begin. A network for each of them, such as one fresh from its factory, or
            one whose units bear the labels of a, since it is not relabelled; or a connection with as many inner control
            points, which are taken from it (pass its ``permutation`` as ``align``, so that b bears the same labels).
            Frozen parameters stay on the straight line. Default: points evenly spaced on the straight line.
        recipe: Epochs, optimizer, schedule, weight decay, autocast, compile.
        refine: `PAM()` to improve the relabelling and the curve together, by turns, from where ``align`` starts.
        adversary: An attack, such as `PGD(8 / 255, 2 / 255, 5)`, or `AdversarialTraining` or `TRADES` with one, or
            `FreeAdversarialTraining`: each batch is attacked at the t at which the step is made. Evaluation
            recalibrates batch norm on clean data even so, unless ``recalibrate=`` are `AdversarialExamples`.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, for batches of any other kind.
        spec: Symmetries of the architecture, if known.
        example_input: An input of the models, for finding their symmetries without a loader.
        outputs: Which of the model's outputs have to stay as they are when b is relabelled, such as ``"logits"``, see
            `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`. Where groups rotate, gains are folded first, and the network at t=0 is
            a folded, equal to a as a function.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        checkpoint: A file, or a `Checkpoint` that also says how often to write it. If it exists, the run goes on from
            it and ends with the same bits as one that was never interrupted, on the same machine and versions.
        sharded: Of several processes: whether ``loader`` yields other examples in each of them. Not needed for the
            loaders of `modeconn.data`, which share themselves out, and for a DataLoader with a
            `torch.utils.data.DistributedSampler`.
        seed: For t, data order, augmentation, dropout and attacks. The caller's random state is left as it was.
        callbacks: What is told of every step, epoch and relabelling that is tried, see `modeconn.callbacks.Callback`.
            They change nothing, but may end the run after an epoch. A line has no epochs; ``PAM(exact=True)`` counts
            each step of gradient descent as one, and tells of no other steps.
        progress: Whether to show progress bars: of the alignment where it takes more than a second, of PAM, of epochs.

    Returns:
        The connection, with the history of the fit.

    Raises:
        ValueError: If the networks or the data do not fit together, if ``start`` has another number of points or is of
            another architecture, if a callback is not for curves, or the checkpoint belongs to another run; or if
            several processes were given other arguments or data, would read the same batches, or are more than there
            are batches.
        OSError: If the checkpoint cannot be written.
        FloatingPointError: If the loss stops being finite; the last good checkpoint is left in place.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026; Tatro et al., 2020, https://arxiv.org/abs/2009.02439
    """
    space, ends = WeightSpace(model_a), (model_a, model_b)
    for end, model in zip("ab", ends, strict=True):
        space.check(model, name=end)
    _check_settings(align, refine, curve, recipe, adversary, loader)
    starts = _check_start(start, curve, space, loader, may_untie=untie or _unties(spec) or _unties(finished(align)))
    told = Callbacks(callbacks, space.device, trained="curve")
    loss, training = StepLoss(loss_fn, forward, adversary), TrainingData(loader, loss_fn, forward, sharded)
    them = joined()
    if loader is None:
        curve, checkpoint = Line(), None
        warn(
            "no curve was learned, because no loader was given: this is the straight connection. "
            "Pass a loader of training data to learn one."
        )
    settings = {
        "curve": curve,
        **{f"recipe.{field.name}": getattr(recipe, field.name) for field in fields(recipe)},
        "loss": forward or loss_fn,
        "refine": refine,
        "adversary": None if adversary is None else adversary_of(adversary),
        "align": finished(align) or align,
        "seed": seed,
        **({"start": starts} if starts else {}),
    }
    with seeded(seed, space.device), ExitStack() as until_end:
        data = None if loader is None else _opened(loader, space, forward)
        about = partial(_identified, settings, space, ends)
        if them.size > 1:
            them.agree({**about(), **facts_of(loader, sharded=sharded), **_versions(checkpoint)})
        file = RunFile(checkpoint, about, space.device, loader=loader, sharded=sharded)
        until_end.enter_context(file)
        how = align if file.saved is None else file.relabelling(model_b) or False
        known = Symmetry(spec, example_input, outputs, symmetries=symmetries, untie=untie)
        with bars(progress):
            if them.size > 1 and file.saved is None and finished(how) is None:  # the first finds it for all
                find = partial(_relabel, ends, data, how, known, refine)
                how = unpack(*them.first(lambda: pack(find()[0], MOVED)), MOVED) or False
            permutation, model_a, relabelled = _relabel(ends, data, how, known, refine)
        space = space if model_a is ends[0] else WeightSpace(model_a)  # an untied a has more tensors
        file.keep(permutation)
        del data  # ends the pass that was begun, with its worker processes, if nobody went on with it
        points = curve.initial_control_points(space.flatten(model_a), space.flatten(relabelled, name="b"))
        for number, given in enumerate(starts, 1):
            weights = _weights_of(given, start, space, permutation, f"start network {number}")
            points[number] = torch.where(space.trainable, weights, points[number])
        buffers = (named_buffers(model_a), named_buffers(relabelled))
        warn_of(differing(model_a, buffers), buffers[0])
        if curve.num_trained or refine:
            step = CurveStep(Workspace(model_a, space), curve, points, recipe)
            learner = _Learner(step, loss, training, refine, permutation, buffers, (model_a, ends[1]))
            history = learner.learn(file, told, seed=seed, progress=progress)
            return learner.connection(points, history)
    path = Path(model_a, curve, points, buffers, space=space, training=training, warns=False)
    return Connection(path, permutation=permutation)


@dataclass
class _Learner:
    """Moves the control points of ``step`` to low loss.

    Args:
        step: Takes the steps; its control points are changed.
        loss: What they lower.
        training: Data and loss.
        refine: How relabelling and curve are refined together, or None.
        permutation: How b is relabelled.
        buffers: Of a and of the relabelled b.
        ends: Network a, untied where b is, and b as it was given.
    """

    step: CurveStep
    loss: StepLoss
    training: TrainingData
    refine: PAM | None
    permutation: Relabelling | None
    buffers: tuple[dict[str, Tensor], dict[str, Tensor]]
    ends: tuple[nn.Module, nn.Module]
    _moving: Descent | Refinement | None = None

    def learn(self, file: RunFile, callbacks: Callbacks, *, seed: int, progress: bool) -> History:
        """Learn to the end, from where the run was saved if it was; return what happened."""
        step, training, between = self.step, self.training, None
        if self.refine is not None:
            if not self.permutation.spec.groups:
                _LOGGER.warning("the model has no group of units that may be relabelled: PAM moves the curve only.")
            told = {"callbacks": callbacks, "progress": progress}
            if self.refine.exact:
                settings = {"seed": seed, "connection": self._now, **told}
                descent = Descent(self.refine, self.permutation, step, training, file, **settings)
                self._moving = descent
                return descent.run()
            self._moving = between = Refinement(self.refine, self.permutation, step, training, seed=seed, **told)
            if not step.curve.num_trained:
                return between.relabel_only(file)
        # Seeded anew, so that the data's order does not depend on the alignment.
        settings = {"seed": seed, "file": file, "between": between, "callbacks": callbacks, "connection": self._now}
        with seeded(seed, step.control_points.device):
            if joined().size > 1:
                run = SharedRun(step, training.loader, self.loss, sharded=training.sharded, **settings)
            else:
                run = Run(step, training.loader, self.loss, **settings)
            return run.train(progress=progress)

    def connection(self, points: Tensor, history: History | None = None) -> Connection:
        """Return the connection on a curve of these control points, with b as it is relabelled now."""
        step, permutation = self.step, self.permutation if self._moving is None else self._moving.permutation
        if permutation is not self.permutation:
            self.permutation = permutation
            self.buffers = self.buffers[0], permutation.relabel(named_buffers(self.ends[1]))
        buffers = tuple({name: tensor.clone() for name, tensor in side.items()} for side in self.buffers)
        settings = {"space": step.workspace.space, "training": self.training, "warns": False}
        path = Path(self.ends[0], step.curve, points, buffers, **settings)
        return Connection(path, permutation=permutation, history=history)

    def _now(self) -> Connection:
        return self.connection(self.step.control_points.detach().clone())


def _check_settings(
    align: Any,
    refine: PAM | None,
    curve: Curve,
    recipe: Recipe,
    adversary: AdversaryLike | None,
    loader: Iterable[Any] | None,
) -> None:
    """Raise a ValueError unless the settings of a fit go together."""
    describe_curve(curve)  # what cannot be saved is refused before hours of training, not after
    if not isinstance(align, bool) and finished(align) is None:
        check_method(align, name="align")
        check_data(align, loader)
    if refine is not None:
        if not isinstance(refine, PAM):
            raise ValueError(f"refine must be PAM(...), got refine={refine!r}; a step in P is given as PAM(step=...).")
        refine.check(curve, recipe, loader)
    if adversary is not None and loader is None:
        raise ValueError(f"{adversary!r} attacks training data, so fit_curve needs it: pass loader=.")
    if adversary is not None and refine is not None:
        raise ValueError(f"{refine!r} moves units by the clean loss, so it does not go with {adversary!r}.")


def _unties(known: Any) -> bool:
    """Whether a spec, or the spec of a relabelling, is of networks whose tied weights have a tensor for each name."""
    return bool(getattr(getattr(known, "spec", known), "untied", ()))


def _check_start(
    start: Connection | nn.Module | Sequence[nn.Module] | None,
    curve: Curve,
    space: WeightSpace,
    loader: Iterable[Any] | None,
    *,
    may_untie: bool,
) -> list[Tensor] | list[nn.Module]:
    """Return what the inner control points are at first, as points or as networks; empty for the straight line.

    Raises:
        ValueError: If nothing is learned, if there are not as many as the curve has inner control points, or if they
            are of another architecture. Where tied weights may be untied, that is seen only once they are.
    """
    if start is None:
        return []
    if loader is None:
        raise ValueError("start= is where a curve is learned from, and without loader= none is learned: pass one.")
    num_inner = curve.num_control_points - 2
    if isinstance(start, Connection):
        given: Any = list(start.control_points[1:-1])
        if not may_untie:
            _check_weights(start, space)
    else:
        given = [start] if isinstance(start, nn.Module) else list(start)
        for number, network in enumerate(given, 1):
            if not may_untie:
                space.check(network, name=f"start network {number}")
    if len(given) != num_inner:
        raise ValueError(
            f"{curve!r} has {num_inner} inner control point{'s' * (num_inner != 1)}, and start= has {len(given)}. Pass "
            f"a network for each, or a curve of as many."
        )
    return given


def _check_weights(start: Connection, space: WeightSpace) -> None:
    if start.space.shapes != space.shapes:
        raise ValueError("start= is a connection between networks of another architecture: its weights are not a's.")


def _weights_of(
    given: Tensor | nn.Module, start: Any, space: WeightSpace, relabelling: Relabelling | None, name: str
) -> Tensor:
    """Return the weights that an inner control point begins with, in the space of the fit."""
    if isinstance(given, Tensor):
        _check_weights(start, space)
        return space.from_canonical(start.space.to_canonical(given))  # memory formats may differ
    spec = getattr(relabelling, "spec", None)
    if getattr(spec, "prepares", False) and not (spec.untied and WeightSpace(given).shapes == space.shapes):
        given = spec.prepared(given)  # the curve lies among networks with gains folded and weights untied
    return space.flatten(given, name=name)


def _opened(loader: Iterable[Any], space: WeightSpace, forward: Forward | None) -> Opened:
    """Begin the first pass over the data: what it is looked at for before training comes from this pass alone."""
    data = Opened(loader, space.device)
    if forward is None:
        check_pair(data.first)
    return data


def _identified(settings: dict[str, Any], space: WeightSpace, ends: tuple[nn.Module, nn.Module]) -> dict[str, Any]:
    """Return what makes a run what it is, as texts under the names its caller knows."""
    return {
        **{f"parameter {name!r}": layout for name, layout in space.layout.items()},
        **{name: identify(value) for name, value in settings.items()},
        **{f"the digest of network {end}": digest(model) for end, model in zip("ab", ends, strict=True)},
    }


def _versions(checkpoint: Any) -> dict[str, Any]:
    """Return what else has to be the same in processes that share a fit."""
    file = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    return {**dict(provenance.versions()), "checkpoint": None if file is None else os.fspath(file)}


def _relabel(
    ends: tuple[nn.Module, nn.Module],
    data: Opened | None,
    align: bool | Relabelling | Alignment | Method,
    known: Symmetry,
    refine: PAM | None,
) -> tuple[Relabelling | None, nn.Module, nn.Module]:
    """Return how b is relabelled at the start, None if it is not, a (its gains folded where they are), and b so.

    A run that is refined needs the groups even where nothing moves at the start.
    """
    relabelling, model = finished(align), None
    if relabelling is None and align is not False:
        method = (ActivationMatching() if data is not None else WeightMatching()) if align is True else align
        found = find_alignment(*ends, data, method, known)
        relabelling, model = found.permutation, found.model_b
    elif relabelling is None and refine is not None:
        relabelling = find_spec(ends[0], data, known).identity()
    if refine is not None:
        refine.check_relabelling(relabelling)
    if relabelling is None:
        return None, *ends
    model_a = relabelling.spec.prepared(ends[0]) if getattr(relabelling.spec, "prepares", False) else ends[0]
    given = getattr(align, "model_a", None)
    if given is not None and given is not ends[0] and model_a is not ends[0] and digest(given) != digest(model_a):
        raise ValueError(
            "align= is of another network a: the gains of its a were folded before b was rotated after it, and model_a "
            "is not that network. Pass the model_a that was given to align, or align.model_a."
        )
    return relabelling, model_a, relabelling.apply(ends[1]) if model is None else model
