"""Running statistics of batch norm, estimated anew at a point of a curve.

Interpolated weights have activations of another scale than either end, so the running statistics of the ends do not
fit between them, nor does any mixture of the two (Garipov et al., 2018, https://arxiv.org/abs/1802.10026, section A.2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from modeconn.network.attack import AdversarialExamples
from modeconn.network.batches import batches, first_examples, inputs_of, run, shuffled, tensors_of, without_singles
from modeconn.network.loss import Forward, called
from modeconn.network.modes import flags_kept, use_batch_statistics
from modeconn.tools.rng import preserved, seeded
from modeconn.tools.warn import warn

NUM_EXAMPLES = 2048
"""How many training examples re-estimate the statistics, where the caller does not say."""

_Calls = list[tuple[int, Tensor]]
"""Of each call how many values it saw in each channel, and their mean and unbiased variance, ``(2, C)``."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
_FORWARDS = {kind.forward for kind in (*_NORMS, nn.InstanceNorm3d)}
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters) for function in (F.batch_norm, F.instance_norm)
}
_ENDS = ("momentum", "eps", "cudnn_enabled")
_PARAMETERS[torch.batch_norm] = ("input", "weight", "bias", "running_mean", "running_var", "training", *_ENDS)
_PARAMETERS[torch.instance_norm] = ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", *_ENDS)


def norm_layers(model: nn.Module) -> dict[str, _NormBase]:
    """Return the layers of batch norm, and of instance norm, that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


def warn_of_batch_statistics(model: nn.Module) -> None:
    """Warn of layers of batch norm that keep no running statistics: what a network answers follows from the batch."""
    found = [
        repr(name)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if found:
        warn(
            f"norm layers {', '.join(found)} use the statistics of each batch, in eval mode too, so all numbers depend "
            f"on the batch size and on the order of the examples."
        )


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


def check_limit(limit: int | None) -> None:
    """Raise a ValueError unless so many examples can re-estimate the statistics; None is all that there are."""
    if limit is not None and limit < 1:
        raise ValueError(f"recalibration_examples must be at least 1, or None, got recalibration_examples={limit}.")


@torch.no_grad()
def recalibrate(
    model: nn.Module, data: Iterable[Any] | AdversarialExamples, *, forward: Forward | None = None
) -> tuple[str, ...]:
    r"""Estimate the running statistics of all batch-norm layers anew, in place.

    Every layer normalises with the statistics of the batch at hand, dropout is off, and the moments are pooled over
    all of ``data``:

    .. math::
        \mu = \frac1N \sum_b n_b \mu_b, \qquad
        \sigma^2 = \frac1{N-1} \sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right),

    so the spread *between* batches counts too; an average of the batches' variances would miss it. The cost is one
    forward pass: layers write the statistics they compute anyway, no activation is read twice. Layers that the forward
    pass does not reach keep theirs. A compiled model runs as it was before that. A model without batch norm is left
    alone, at no cost.

    Args:
        model: Its statistics change; parameters, the ``training`` flags, momenta and batch counters do not.
        data: Batches on the model's device, each of more than one value per channel; or `AdversarialExamples` of them.
        forward: Called with the model and a batch; default ``model(inputs)``, see `modeconn.network.batches.inputs_of`.

    Returns:
        The names of norm layers whose statistics matter and stay as they were, since they are used in a way in which
        they cannot be estimated; a warning names them, too.
    """
    layers = norm_layers(model)
    if not layers:
        return ()
    if isinstance(data, AdversarialExamples):
        recalibrate(model, data.loader, forward=forward)
        data = data.of(model)
    first: Any = None
    with _batch_statistics(model, layers) as calls:
        for batch in data:
            first = batch if first is None else first
            _run(model, batch, forward)
    for layer, seen in calls.items():
        if seen:
            mean, variance = pool(seen) if isinstance(layer, _BatchNorm) else _average(seen)
            if not (mean.isfinite().all() and variance.isfinite().all()):
                raise FloatingPointError(
                    "running statistics became NaN or infinite. Look for NaN in the data and in the networks' weights."
                )
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
    missed = {name: layer for name, layer in layers.items() if not calls[layer]}
    if missed and first is not None and _are_used(model, missed, first, forward):
        warn(
            f"the statistics of the norm layers {', '.join(map(repr, missed))} are used in a way in which they cannot "
            f"be estimated, so they stay as they are. Call the layers, or torch.nn.functional.batch_norm with their "
            f"buffers."
        )
        return tuple(missed)
    return ()


def but_for(missed: Sequence[str] | None) -> str:
    """Say which norm layers were not recalibrated, behind a sentence that says that they were."""
    return f", but for {', '.join(map(repr, missed))}, whose statistics cannot be estimated" if missed else ""


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    return run(model, inputs_of(batch)) if forward is None else called(forward, model, batch)


def _are_used(model: nn.Module, layers: dict[str, _NormBase], batch: Any, forward: Forward | None) -> bool:
    """Whether what a network answers depends on the running statistics of layers that were not seen at work."""
    kept = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers.values()]
    try:
        with flags_kept(model), preserved(next(model.parameters(), kept[0][0]).device):
            model.eval()
            for layer in layers.values():
                layer.running_mean.fill_(torch.nan)
                layer.running_var.fill_(torch.nan)
            found = tensors_of(_run(model, batch, forward))
            return any(bool(one.isnan().any()) for one in found if one.is_floating_point())
    except (ValueError, FloatingPointError):  # a network that looks at what it computes
        return True
    finally:
        for layer, (mean, variance) in zip(layers.values(), kept, strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)


@contextmanager
def _batch_statistics(model: nn.Module, layers: dict[str, _NormBase]) -> Iterator[dict[_NormBase, _Calls]]:
    """Let ``layers`` alone normalise with the batch, and give what each call of each saw; undo all that after."""
    counters = {layer: layer.num_batches_tracked for layer in layers.values()}
    own = {name: layer for name, layer in layers.items() if type(layer).forward not in _FORWARDS}
    kept = {layer: (layer.running_mean, layer.running_var) for layer in own.values()}
    for layer, statistics in kept.items():  # which its forward may write to
        layer.running_mean, layer.running_var = (one.clone() for one in statistics)
    collecting = _Collecting(layers.values())
    hooks = [layer.register_forward_hook(collecting.hear(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with flags_kept(model), collecting, torch.compiler.set_stance("force_eager"):
            use_batch_statistics(model, _NormBase)
            for layer in layers.values():
                layer.num_batches_tracked = None
                if isinstance(layer, SyncBatchNorm):
                    layer.training = False  # in train mode it would ask other processes
            yield collecting.calls
    finally:
        for hook in hooks:
            hook.remove()
        for layer, (mean, variance) in kept.items():
            layer.running_mean, layer.running_var = mean, variance
        for layer, counter in counters.items():
            layer.num_batches_tracked = counter


class _Collecting(TorchFunctionMode):
    """Has every call of batch norm with the statistics of a layer use those of the batch, and keeps them.

    Calls are recognised by what they are given, however they come about: a module may call its norm layer's forward by
    itself, or the function with the layer's buffers.
    """

    def __init__(self, layers: Iterable[_NormBase]) -> None:
        super().__init__()
        self._layer_of = {id(layer.running_mean): layer for layer in layers}
        self.calls: dict[_NormBase, _Calls] = {layer: [] for layer in self._layer_of.values()}
        self._known: dict[_NormBase, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**dict(zip(_PARAMETERS.get(function, ()), args, strict=False)), **(kwargs or {})}
        layer = self._layer_of.get(id(given.get("running_mean"))) if function in _PARAMETERS else None
        if layer is None:
            return function(*args, **(kwargs or {}))
        # With momentum 1 the running statistics become those of the batch.
        row = layer.running_mean.new_zeros(2, layer.num_features)
        self._keep(layer, given["input"], row)
        flag = "training" if "batch_norm" in function.__name__ else "use_input_stats"
        return function(**given | {"running_mean": row[0], "running_var": row[1], "momentum": 1.0, flag: True})

    def _keep(self, layer: _NormBase, inputs: Tensor, row: Tensor) -> None:
        count = inputs.numel() // layer.num_features if isinstance(layer, _BatchNorm) else len(inputs)
        self.calls[layer].append((count, row))

    def hear(self, name: str) -> Callable[..., None]:
        """Return a hook that keeps the moments of what a layer is given whose forward is its own and calls no other."""

        def heard(layer: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            known, self._known[layer] = self._known.get(layer, 0), len(self.calls[layer])
            if known != len(self.calls[layer]):
                return
            inputs = next(iter((*args, *kwargs.values())))
            axes = [0, *range(2, inputs.ndim)] if isinstance(layer, _BatchNorm) else list(range(2, inputs.ndim))
            variance, mean = torch.var_mean(inputs, axes)
            means = mean.reshape(-1, layer.num_features).mean(0), variance.reshape(-1, layer.num_features).mean(0)
            self._keep(layer, inputs, torch.stack(means))
            self._known[layer] = len(self.calls[layer])
            warn(
                f"the norm layer {name!r} ({type(layer).__name__}) computes in a way of its own: its running "
                f"statistics are taken to be the mean and the unbiased variance of its inputs."
            )

        return heard


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
