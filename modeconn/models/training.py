"""Train one network: the endpoints that the rest of the package connects."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modeconn.attacks.training import AdversaryLike, adversary_of
from modeconn.learning.checkpoint import TRAINING, Checkpoint, Resumable, RunFile, run_file
from modeconn.learning.parts import Epochs, Learned, Randomness, mean_of_epoch
from modeconn.learning.shared_gradient import SharedGradient
from modeconn.learning.step_loss import StepLoss
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import calibration_batches, norm_layers
from modeconn.network.batch_norm import recalibrate as recalibrate_statistics
from modeconn.network.batches import END, batches, check_length, check_loader, first_batch, refuse_empty
from modeconn.network.copies import copy_of
from modeconn.network.loss import Forward, LossFn, TrainingData, cross_entropy
from modeconn.network.recipe import Recipe, autocast, one_cycle
from modeconn.network.shares import begin_epoch, facts_of, is_shared_out, share_of
from modeconn.network.weights import device_of
from modeconn.tools import provenance
from modeconn.tools.callbacks import Callbacks
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.processes import joined, shared
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import reseed, seed_of, seeded

_LOGGER = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_DEFAULT_RECIPE = Recipe()

Weighted = tuple[Tensor, Tensor | float]
"""The loss of a step, and how much it counts in the mean of an epoch."""

DIGITS_RECIPE = Recipe(epochs=30, optimizer=partial(torch.optim.Adam, lr=3e-3), schedule=one_cycle, weight_decay=0.0)
"""How the package's own experiments train a perceptron on the digits, in batches of 64: 97% right within a second."""


@shared
@checked
def train(
    model: M,
    loader: Iterable[Any],
    *,
    recipe: Recipe = _DEFAULT_RECIPE,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    adversary: AdversaryLike | None = None,
    recalibrate: Iterable[Any] | AdversarialExamples | bool | None = None,
    sharded: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = False,
) -> M:
    """Train a copy of ``model`` where it is, and return the copy in eval mode.

    The model itself, its mode and the global random state are left as they were. The same model, loader and seed give
    the same weights on the same machine, if the loader's order depends on the global generators alone, as that of
    `modeconn.data.TensorLoader` and of a `torch.utils.data.DataLoader` without a generator of its own does.

    Where several processes are an initialised group of `torch.distributed`, all must make this call, and share its
    work: each step takes a batch of each of them, and moves the weights along their mean gradient. Batch norm sees the
    batch of its own process, and running statistics become the mean over processes after each epoch. All get the same
    network, bit for bit.

    Args:
        model: Any module; parameters with ``requires_grad=False`` stay as they are.
        loader: Re-iterable of ``(inputs, targets)`` batches; they are moved to the model's device.
        recipe: Epochs, optimizer, schedule, weight decay, precision; default ``Recipe()``. Weight decay is given to
            the optimizer, which for SGD and Adam makes it the gradient of ``weight_decay / 2 * ||w||^2``.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the examples of the batch.
        forward: ``forward(model, batch) -> loss``, replaces the reading of a batch as ``(inputs, targets)``; then
            ``loss_fn`` is not used.
        adversary: An attack to train against, such as `PGD(8 / 255, 2 / 255, 5)`, which means `AdversarialTraining` on
            its examples alone; or `AdversarialTraining` with a share of clean ones, `TRADES`,
            `FreeAdversarialTraining`.
        recalibrate: Training data, or `AdversarialExamples` of it, on which batch norm's statistics are estimated anew
            at the end, 2,048 examples; True for those of ``loader``; False to keep the running statistics of the
            batches trained on, adversarial ones among them. Default: True with an adversary, else False.
        sharded: Of several processes: whether ``loader`` yields other examples in each of them, see
            `modeconn.fit_curve`.
        seed: Of batch order, augmentation, dropout and attacks.
        checkpoint: A file to which the run saves itself after every epoch. If it exists, the run goes on from it and
            ends with the same bits as one that was never interrupted, on the same machine and versions.
        callbacks: What is told of every step and epoch, see `modeconn.callbacks.Callback`. They change nothing, but may
            end the run after an epoch. What is done at the end, such as ``recalibrate``, they do not see.
        progress: Whether to show a progress bar.

    Returns:
        The trained copy.

    Raises:
        ValueError: If the loader is empty, can be read only once or does not yield pairs, if a target is none of the
            model's classes (noticed in the first epoch) or none counts, if the model has nothing to train, if inputs
            are none that the adversary can attack, if a callback is none or for curves alone, or if the checkpoint
            belongs to another run.
        OSError: If the checkpoint cannot be written.
        FloatingPointError: If the loss became infinite or NaN; noticed at the end of the epoch.

    Example:
        >>> from modeconn import data, models
        >>> train_loader, test_loader = data.load("digits")
        >>> model = train(models.mlp(64, (32,), 10, seed=1), train_loader, recipe=Recipe(epochs=1), seed=1)
        >>> model.training
        False
    """
    epochs = Epochs(recipe.epochs, Callbacks(callbacks, device_of(model), trained="network"))
    settings = _Settings(
        recipe, loss_fn, forward, adversary, recalibrate, sharded, seed=seed, checkpoint=checkpoint, progress=progress
    )
    return _trained(model, loader, epochs, settings)


@shared
@checked
def train_snapshots(
    model: M,
    loader: Iterable[Any],
    *,
    cycles: int,
    recipe: Recipe,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    adversary: AdversaryLike | None = None,
    recalibrate: Iterable[Any] | AdversarialExamples | bool | None = None,
    sharded: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = False,
) -> list[M]:
    """Train on from a network in cycles, and return the network at the end of each: members of one ensemble.

    With `modeconn.triangular` as the recipe's schedule this is fast geometric ensembling (Garipov et al., 2018), of
    few epochs a cycle, from a network that is nearly trained; with `modeconn.cosine` a snapshot ensemble (Huang et al.,
    2017), of many epochs, from the beginning. Each cycle is a run of `train` that goes on from the network before, with
    a fresh optimizer; `modeconn.Ensemble` makes one network of them, and
    ``modeconn.Connection.through(networks).predict(...).ensemble_accuracy`` tells what each adds.

    Args:
        model: The network to begin with; it stays as it is.
        loader: Re-iterable of ``(inputs, targets)`` batches; they are moved to the model's device.
        cycles: How many.
        recipe: Of one cycle.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the examples of the batch.
        forward: ``forward(model, batch) -> loss``, replaces the reading of a batch as ``(inputs, targets)``; then
            ``loss_fn`` is not used.
        adversary: An attack to train against, such as `PGD(8 / 255, 2 / 255, 5)`, which means `AdversarialTraining` on
            its examples alone; or `AdversarialTraining` with a share of clean ones, `TRADES`,
            `FreeAdversarialTraining`.
        recalibrate: Training data, or `AdversarialExamples` of it, on which batch norm's statistics are estimated anew
            at the end of each cycle, 2,048 examples; True for those of ``loader``; False to keep the running statistics
            of the batches trained on, adversarial ones among them. Default: True with an adversary, else False.
        sharded: Of several processes: whether ``loader`` yields other examples in each of them, see
            `modeconn.fit_curve`.
        seed: Of batch order, augmentation, dropout and attacks of the first cycle; the others have those after it.
        checkpoint: The begin of the names of files, one for each cycle, to which the run saves itself after every
            epoch. Where they exist, it goes on from them.
        callbacks: What is told of every step and epoch, see `modeconn.callbacks.Callback`. They change nothing, but may
            end the run after an epoch. To them all cycles are one run; one that ends it ends it in its cycle, the last
            then.
        progress: Whether to show progress bars.

    Returns:
        The networks in the order of the cycles, in eval mode.

    Raises:
        ValueError: If ``cycles`` is not positive, if the loader is empty, can be read only once or does not yield
            pairs, if a target is none of the model's classes (noticed in the first epoch) or none counts, if the model
            has nothing to train, if inputs are none that the adversary can attack, if a callback is none or for curves
            alone, or if a checkpoint belongs to another run.
        OSError: If a checkpoint cannot be written.
        FloatingPointError: If the loss became infinite or NaN; noticed at the end of the epoch.

    References:
        Garipov et al., 2018, https://arxiv.org/abs/1802.10026; Huang et al., 2017, https://arxiv.org/abs/1704.00109
    """
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got cycles={cycles}.")
    told = Callbacks(callbacks, device_of(model), trained="network")
    epochs, found = Epochs(recipe.epochs, told, num_runs=cycles), []  # type: ignore[var-annotated]
    settings = _Settings(recipe, loss_fn, forward, adversary, recalibrate, sharded, progress=progress)
    for cycle in range(cycles):
        kept = None if checkpoint is None else f"{os.fspath(checkpoint)}.{cycle + 1}"
        own = replace(settings, seed=seed + cycle, checkpoint=kept)
        found.append(_trained(found[-1] if found else model, loader, epochs, own))
        if epochs.is_stopped:
            break
    return found


@dataclass(frozen=True)
class _Settings:
    """How a network is trained, see `train`."""

    recipe: Recipe
    loss_fn: LossFn
    forward: Forward | None
    adversary: AdversaryLike | None
    recalibrate: Iterable[Any] | AdversarialExamples | bool | None
    sharded: bool
    seed: int = 0
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None
    progress: bool = False


def _trained(model: M, loader: Iterable[Any], epochs: Epochs, how: _Settings) -> M:
    """Return a trained copy of a network in the next run of ``epochs``."""
    how.recipe.check_not_offloaded()
    trained = copy_of(model).train()
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise ValueError("model has no parameter to train: it has none, or all have requires_grad=False.")
    device, loss = device_of(trained), StepLoss(how.loss_fn, how.forward, how.adversary)
    them, seed, sharded = joined(), how.seed, how.sharded
    share = share_of(loader, them, sharded=sharded)

    with seeded(seed, device):
        num_batches = max(them.each(lambda: count_batches(share, any_batch=how.forward is not None)))
    adversary = None if how.adversary is None else adversary_of(how.adversary)
    about = {"loss": how.forward or how.loss_fn, "adversary": adversary, "seed": seed}
    settings = partial(run_settings, how.recipe, about, [model])
    with seeded(seed, device):
        if them.size > 1:
            them.agree({**settings(), **facts_of(loader, sharded=sharded), **dict(provenance.versions())})
    epochs.begin_run(lambda: copy_of(trained).eval(), TrainingData(loader, how.loss_fn, how.forward, sharded))
    with run_file(how.checkpoint, settings, device, TRAINING, loader, sharded=sharded) as file, seeded(seed, device):
        _train(trained, share, loss, file, epochs, how, num_batches=num_batches)
    recalibrate = how.adversary is not None if how.recalibrate is None else how.recalibrate
    if recalibrate is not False and norm_layers(trained):
        data = calibration_batches(loader if recalibrate is True else recalibrate, device)
        recalibrate_statistics(trained, data, forward=how.forward)
        if is_shared_out(loader, sharded=sharded):  # and so others in each process
            _average_buffers(trained)
    return trained.eval()


def count_batches(loader: Iterable[Any], *, any_batch: bool) -> int:
    """Check the loader and return the number of its batches, read through once if it does not know."""
    first_batch(loader) if any_batch else check_loader(loader)
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in loader)


def run_epochs(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    read: Callable[[int], Iterable[Any]],
    take_step: Callable[[Any, int], list[Weighted] | None],
    *,
    num_batches: int,
    file: RunFile,
    parts: Sequence[Resumable],
    epochs: Epochs,
    device: torch.device,
    progress: bool,
    end_epoch: Callable[[], None] | None = None,
) -> None:
    """Take the steps of a training run, epoch by epoch, from where the run was saved if it was.

    Args:
        recipe: Epochs and schedule.
        optimizer: Its learning rate is set before every batch.
        read: Returns the batches of an epoch of this number.
        take_step: Called with a batch and the number of the epoch; returns the losses of the steps it took, each a
            scalar, or ``(M,)`` of M networks, and how much it counts in the mean of the epoch. Where several processes
            share the steps, it is called with `END` when there are no more batches, and returns None when no process
            has any.
        num_batches: How many batches an epoch has.
        file: Where the run saves itself after every epoch.
        parts: What changes from step to step.
        epochs: Those that are done, and who is told of them.
        device: Where random numbers are drawn.
        progress: Whether to show a progress bar.
        end_epoch: What processes that share the steps do at the end of each epoch; None if there are no others.

    Raises:
        FloatingPointError: If a loss is infinite or NaN. The losses of an epoch are looked at together at its end,
            since each look makes an accelerator wait.
        ValueError: If nothing counts in an epoch.
    """
    parts = (*parts, epochs, Randomness(device))
    if epochs.go_on(is_new=not file.resume(*parts)):
        file.save(*parts)
    left = () if epochs.is_stopped else range(epochs.done, recipe.epochs)
    bar = progress_bar(left, show=progress, desc="train", unit="epoch", initial=epochs.done, total=recipe.epochs)
    for epoch in bar:
        found: list[Weighted] = []
        number, iterator = 0, iter(read(epoch))
        while (batch := next(iterator, END)) is not END or end_epoch is not None:
            recipe.set_learning_rate(optimizer, epoch + min(number / num_batches, 1.0))
            losses = take_step(batch, epoch)
            if losses is None:
                break
            found += losses
            number += 1
        check_length(number, num_batches)
        if end_epoch is not None:
            end_epoch()
        losses = torch.stack([loss for loss, _ in found])
        if not losses.isfinite().all():
            step, *networks = place = (~losses.isfinite()).nonzero()[0].tolist()
            whose = "".join(f" of models[{network}]" for network in networks)
            raise FloatingPointError(
                f"the training loss{whose} became {losses[tuple(place)].item()} in epoch {epoch}, step "
                f"{step}. Lower the learning rate of the recipe's "
                f"optimizer, or look for values in the data that are not finite."
            )
        mean = _mean(losses, [weight for _, weight in found], is_shared=end_epoch is not None)
        _LOGGER.info("epoch %d of %d: training loss %.4f", epoch + 1, recipe.epochs, mean)
        bar.set_postfix(loss=f"{mean:.4f}")
        try:
            epochs.end_epoch(mean)
        finally:  # an exception in a callback must not lose the epoch
            file.save(*parts)
        if epochs.is_stopped:
            break


def _mean(losses: Tensor, weights: Sequence[Tensor | float], *, is_shared: bool) -> float:
    """Return the mean of the losses of an epoch, ``(S,)`` or ``(S, M)`` of M networks, over all processes.

    Raises:
        ValueError: If the weights have the sum 0.
    """
    counts = torch.stack([torch.as_tensor(weight, device=losses.device) for weight in weights]).cpu().double()
    total = float((counts @ losses.cpu().double()).mean()), float(counts.sum())
    parts = joined().each(lambda: total) if is_shared else [total]
    weighed, counted = (sum(numbers) for numbers in zip(*parts, strict=True))
    return mean_of_epoch(weighed, counted)


def run_settings(recipe: Recipe, settings: Mapping[str, Any], networks: Sequence[nn.Module]) -> dict[str, Any]:
    """Return what makes a training run what it is, as texts under the names its caller knows."""
    about = {f"recipe.{field.name}": getattr(recipe, field.name) for field in fields(recipe)}
    texts = {name: identify(value) for name, value in {**about, **settings}.items()}
    digests = "".join(map(digest, networks))
    return {**texts, "the digest of what is trained": hashlib.sha256(digests.encode()).hexdigest()}


def _train(
    model: nn.Module,
    loader: Iterable[Any],
    loss: StepLoss,
    file: RunFile,
    epochs: Epochs,
    how: _Settings,
    *,
    num_batches: int,
) -> None:
    """Train ``model`` in place."""
    them, recipe = joined(), how.recipe
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, optimizer = parameters[0].device, recipe.make_optimizer(parameters, weight_decay=recipe.weight_decay)
    runner = torch.compile(model) if recipe.compile else model
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast is torch.float16)

    gradient = SharedGradient(parameters) if them.size > 1 else None

    def differentiate(batch: Any, forward: Forward) -> Weighted:
        """Bring the gradient of a batch to the parameters; return its loss, and what it counts."""
        with autocast(device, recipe.autocast):
            value = forward(runner, batch)
        scaler.scale(value).backward()
        return loss.weigh(batch, value)

    def step(batch: Any, forward: Forward) -> list[Weighted] | None:
        optimizer.zero_grad()
        found: list[Weighted] = []
        if gradient is None:
            found.append(differentiate(batch, forward))
        else:

            def own() -> tuple[float, bool]:
                if batch is END:
                    return 0.0, False
                found.append(differentiate(batch, forward))
                return loss.count(found[-1][1]), True

            if not gradient.average(own):
                return None
        scaler.step(optimizer)
        scaler.update()
        epochs.end_step(found[0][0] if found else None)
        return found

    def steps(batch: Any, epoch: int) -> list[Weighted] | None:
        if batch is not END:
            refuse_empty(batch)
        found = [step(batch, loss.at(epoch)) for _ in range(loss.num_replays)]
        return None if found[0] is None else [value for values in found for value in values]

    def read(epoch: int) -> Iterator[Any]:
        begin_epoch(loader, epoch)
        return batches(loader, device) if them.size == 1 else _read_apart(loader, device, (how.seed, epoch))

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    run_epochs(
        recipe,
        optimizer,
        read,
        steps,
        num_batches=num_batches,
        file=file,
        parts=(Learned(tensors, optimizer, scaler), loss),
        epochs=epochs,
        device=device,
        progress=how.progress,
        end_epoch=None if them.size == 1 else partial(_average_buffers, model),
    )
    optimizer.zero_grad()


def _average_buffers(model: nn.Module) -> None:
    """Make buffers of floating point the mean of those of all processes; others are those of the first."""
    them = joined()
    if them.size == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    others = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    if buffers:
        mean = them.sum(lambda: torch.cat([buffer.double().flatten() for buffer in buffers])) / them.size
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
    for other, first in zip(others, them.first(lambda: [one.cpu() for one in others]), strict=True):
        other.copy_(first)


def _read_apart(loader: Iterable[Any], device: torch.device, place: tuple[int, ...]) -> Iterator[Any]:
    """Yield the batches of an epoch, drawn in one order in all processes, in which the model draws other numbers."""
    rank = joined().rank
    reseed(seed_of(*place), device)
    iterator = batches(loader, device)
    batch = next(iterator)
    reseed(seed_of(*place, rank + 1), device)
    yield batch
    yield from iterator
