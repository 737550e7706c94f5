"""Running statistics of batch norm, estimated anew at a point of a curve.

Interpolated weights have activations of another scale than either end, so the running statistics of the ends do not
fit between them, nor does any mixture of the two (Garipov et al., 2018, https://arxiv.org/abs/1802.10026, section A.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase

from modeconn.network.attack import AdversarialExamples
from modeconn.network.batches import batches, first_examples, inputs_of, run, shuffled, without_singles
from modeconn.network.loss import Forward, called
from modeconn.network.modes import flags_kept, use_batch_statistics
from modeconn.tools.rng import seeded

NUM_EXAMPLES = 2048
"""How many training examples re-estimate the statistics, where the caller does not say."""

_Calls = list[tuple[int, Tensor]]


def norm_layers(model: nn.Module) -> dict[str, _NormBase]:
    """Return the layers of batch norm, and of instance norm, that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


def calibration_batches(
    loader: Iterable[Any],
    device: torch.device,
    *,
    limit: int | None = NUM_EXAMPLES,
    seed: int = 0,
    name: str = "loader",
) -> list[Any] | AdversarialExamples:
    """Read the examples that re-estimate the statistics: once, to be used at every point of a curve.

    These are the first examples of one pass, in the order, and with the augmentation, that ``seed`` gives to torch's
    generator; built-in data is always shuffled. The augmentation stays because the networks were trained with it: their
    statistics belong to augmented images. (TinyTen trained on CIFAR-10 with flips, crops and rotations, accuracy on the
    test set: 72.8% with its own statistics and with those of 2,048 augmented images, 67.6% with those of 2,048 plain
    ones, 67.4% with those of 15,000.)

    Args:
        loader: Training data, batches of any kind, or `AdversarialExamples` of it.
        device: Where to put them.
        limit: The number of examples, or None for the whole pass.
        seed: The order of the pass. The caller's random state is left as it was.
        name: What an error message calls the loader.

    Returns:
        Batches, or adversarial examples of them. One of a single example, which has no variance, comes joined to a
        neighbour, see `modeconn.network.batches.without_singles`.
    """
    if isinstance(loader, AdversarialExamples):
        return replace(loader, loader=calibration_batches(loader.loader, device, limit=limit, seed=seed, name=name))
    with seeded(seed, device):
        return list(without_singles(first_examples(batches(shuffled(loader), device, name=name), limit)))


@torch.no_grad()
def recalibrate(model: nn.Module, data: Iterable[Any] | AdversarialExamples, *, forward: Forward | None = None) -> None:
    r"""Estimate the running statistics of all batch-norm layers anew, in place.

    Every layer normalises with the statistics of the batch at hand, dropout is off, and the moments are pooled over
    all of ``data``:

    .. math::
        \mu = \frac1N \sum_b n_b \mu_b, \qquad
        \sigma^2 = \frac1{N-1} \sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right),

    so the spread *between* batches counts too; an average of the batches' variances would miss it. The cost is one
    forward pass: layers write the statistics they compute anyway, no activation is read twice. Layers that the forward
    pass does not reach keep theirs. A model without batch norm is left alone, at no cost.

    Args:
        model: Its statistics change; parameters, the ``training`` flags, momenta and batch counters do not.
        data: Batches on the model's device, each of more than one value per channel; or `AdversarialExamples` of them.
        forward: Called with the model and a batch; default ``model(inputs)``, see `modeconn.network.batches.inputs_of`.
    """
    layers = list(norm_layers(model).values())
    if not layers:
        return
    if isinstance(data, AdversarialExamples):
        recalibrate(model, data.loader, forward=forward)
        data = data.of(model)
    with _batch_statistics(model, layers) as calls:
        for batch in data:
            run(model, inputs_of(batch)) if forward is None else called(forward, model, batch)
    for layer, seen in calls.items():
        if seen:
            mean, variance = pool(seen) if isinstance(layer, _BatchNorm) else _average(seen)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)


@contextmanager
def _batch_statistics(model: nn.Module, layers: list[_NormBase]) -> Iterator[dict[_NormBase, _Calls]]:
    """Let ``layers`` alone train, each call writing its batch's statistics to a row of its own; undo all that after."""
    saved = [(layer.momentum, layer.running_mean, layer.running_var, layer.num_batches_tracked) for layer in layers]
    calls: dict[_NormBase, _Calls] = {layer: [] for layer in layers}

    def new_row(layer: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(iter((*args, *kwargs.values())))
        # With momentum 1 the running statistics become those of the batch.
        row = layer.running_mean.new_zeros(2, layer.num_features)
        layer.running_mean, layer.running_var = row
        count = inputs.numel() // layer.num_features if isinstance(layer, _BatchNorm) else len(inputs)
        calls[layer].append((count, row))

    hooks = [layer.register_forward_pre_hook(new_row, with_kwargs=True) for layer in layers]
    try:
        with flags_kept(model):
            use_batch_statistics(model, _NormBase)
            for layer in layers:
                layer.momentum = 1.0
                if not isinstance(layer, SyncBatchNorm):  # which asks for a counter, where others are faster without
                    layer.num_batches_tracked = None
                elif layer.num_batches_tracked is not None:
                    layer.num_batches_tracked = layer.num_batches_tracked.clone()
            yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in zip(layers, saved, strict=True):
            layer.momentum, layer.running_mean, layer.running_var, layer.num_batches_tracked = values


def _average(calls: _Calls) -> tuple[Tensor, Tensor]:
    """Return the mean over examples of the mean and of the variance of each, as instance norm keeps them, ``(C,)``."""
    means, variances = torch.stack([row for _, row in calls]).double().unbind(1)
    counts = means.new_tensor([count for count, _ in calls])[:, None]
    return (counts * means).sum(0) / counts.sum(), (counts * variances).sum(0) / counts.sum()


def pool(calls: _Calls) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance over all calls, of each its count and both, ``(C,)``, summed in float64."""
    means, variances = torch.stack([row for _, row in calls]).double().unbind(1)
    counts = means.new_tensor([count for count, _ in calls])[:, None]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    # Each row holds an unbiased variance, with the denominator n - 1.
    squares = (counts - 1) * variances + counts * (means - mean) ** 2
    return mean, squares.sum(0) / (total - 1)
