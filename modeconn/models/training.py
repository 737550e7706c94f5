"""Train one network: the endpoints that the rest of the package connects."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modeconn.attacks.training import AdversaryLike
from modeconn.learning.step_loss import StepLoss
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import calibration_batches, norm_layers
from modeconn.network.batch_norm import recalibrate as recalibrate_statistics
from modeconn.network.batches import batches, check_loader, first_batch
from modeconn.network.copies import copy_of
from modeconn.network.loss import Forward, LossFn, cross_entropy
from modeconn.network.recipe import Recipe, autocast, one_cycle
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded

_LOGGER = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_DEFAULT_RECIPE = Recipe()

DIGITS_RECIPE = Recipe(epochs=30, optimizer=partial(torch.optim.Adam, lr=3e-3), schedule=one_cycle, weight_decay=0.0)
"""How the package's own experiments train a perceptron on the digits, in batches of 64: 97% right within a second."""


def train(
    model: M,
    loader: Iterable[Any],
    *,
    recipe: Recipe = _DEFAULT_RECIPE,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    adversary: AdversaryLike | None = None,
    recalibrate: Iterable[Any] | AdversarialExamples | bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> M:
    """Train a copy of ``model`` where it is, and return the copy in eval mode.

    The model itself, its mode and the global random state are left as they were. The same model, loader and seed give
    the same weights on the same machine, if the loader's order depends on the global generators alone, as that of
    `modeconn.data.TensorLoader` and of a `torch.utils.data.DataLoader` without a generator of its own does.

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
        seed: Of batch order, augmentation, dropout and attacks.
        progress: Whether to show a progress bar.

    Returns:
        The trained copy.

    Raises:
        ValueError: If the loader is empty, can be read only once or does not yield pairs, if a target is none of the
            model's classes (noticed in the first epoch), if the model has nothing to train, or if inputs are none
            that the adversary can attack.
        FloatingPointError: If the loss became infinite or NaN; noticed at the end of the epoch.

    Example:
        >>> from modeconn import data, models
        >>> train_loader, test_loader = data.load("digits")
        >>> model = train(models.mlp(64, (32,), 10, seed=1), train_loader, recipe=Recipe(epochs=1), seed=1)
        >>> model.training
        False
    """
    trained = copy_of(model).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter to train: it has none, or all have requires_grad=False.")
    device, goals = parameters[0].device, StepLoss(loss_fn, forward, adversary)

    with seeded(seed, device):
        num_batches = count_batches(loader, any_batch=forward is not None)
    with seeded(seed, device):
        _EndpointRun(trained, parameters, recipe, goals).run(loader, num_batches, progress=progress)
    if recalibrate is None:
        recalibrate = adversary is not None
    if recalibrate is not False and norm_layers(trained):
        data = calibration_batches(loader if recalibrate is True else recalibrate, device)
        recalibrate_statistics(trained, data, forward=forward)
    return trained.eval()


def count_batches(loader: Iterable[Any], *, any_batch: bool) -> int:
    """Check the loader and return the number of its batches, read through once if it does not know."""
    first_batch(loader) if any_batch else check_loader(loader)
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in loader)


class _EndpointRun:
    """One training run, which changes ``model`` in place."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        recipe: Recipe,
        loss: StepLoss,
    ) -> None:
        self.recipe = recipe
        self.loss = loss
        self.runner = torch.compile(model) if recipe.compile else model
        self.optimizer = recipe.make_optimizer(parameters, weight_decay=recipe.weight_decay)
        self.device = parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.autocast is torch.float16)

    def run(self, loader: Iterable[Any], num_batches: int, *, progress: bool) -> None:
        bar = progress_bar(range(self.recipe.epochs), show=progress, desc="train", unit="epoch")
        for epoch in bar:
            losses = []
            for step, batch in enumerate(batches(loader, self.device)):
                self.recipe.set_learning_rate(self.optimizer, epoch + step / num_batches)
                for _ in range(self.loss.num_replays):
                    losses.append(self._step(batch, self.loss.at(epoch)))
            mean = self._mean_loss(torch.stack(losses), epoch)
            _LOGGER.info("epoch %d of %d: training loss %.4f", epoch + 1, self.recipe.epochs, mean)
            bar.set_postfix(loss=f"{mean:.4f}")
        self.optimizer.zero_grad()

    def _step(self, batch: Any, forward: Forward) -> Tensor:
        self.optimizer.zero_grad()
        with autocast(self.device, self.recipe.autocast):
            loss = forward(self.runner, batch)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _mean_loss(self, losses: Tensor, epoch: int) -> float:
        """Return the mean; an epoch's losses are looked at together, since each look makes an accelerator wait."""
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the training loss became {losses[step].item()} in epoch {epoch + 1} of {self.recipe.epochs}, "
                f"step {step + 1} of {len(losses)}. Lower the learning rate of the recipe's optimizer, or look for "
                f"values in the data that are not finite."
            )
        return losses.mean().item()
