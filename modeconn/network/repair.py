"""Statistics of pre-activations, and REPAIR: networks between others take the interpolation of theirs.

Units of two networks are never perfectly correlated, so the mean of the two varies less than either, and less again in
each layer (Jordan et al., 2023, https://arxiv.org/abs/2211.08403). Where batch norm follows, recalibration mends that;
elsewhere the layer that makes the units is rescaled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from modeconn.network.batch_norm import NUM_EXAMPLES, calibration_batches, norm_layers, pool, recalibrate
from modeconn.network.batches import inputs_of, run
from modeconn.network.copies import copy_of
from modeconn.network.loss import Forward, called
from modeconn.network.weights import WeightSpace
from modeconn.tools.door import checked
from modeconn.tools.warn import warn

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation of each output channel, ``(C,)`` each in float64, by layer in the order of execution."""


@checked
def repair(
    model: nn.Module,
    endpoints: Sequence[nn.Module],
    loader: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    num_examples: int | None = NUM_EXAMPLES,
    forward: Forward | None = None,
) -> nn.Module:
    r"""Return a copy of a merged network whose pre-activations vary as those of the networks it was merged from.

    For each output channel of every linear and convolutional layer,

    .. math:: \mu = \sum_i w_i \mu_i, \qquad \sigma = \sum_i w_i \sigma_i

    on the data, by an affine map folded into the layer's weight and bias: the architecture stays. Layers are repaired
    in the order of execution, each behind repaired ones, so that all statistics hold exactly at the end, if no layer
    feeds itself. Layers that make outputs are among them: that lowers barriers further. The cost is one pass over the
    data for each layer. Channels that never change in the merged network take the mean only.

    A network with a batch-norm layer anywhere is recalibrated instead, which does the same for the layers that batch
    norm follows; its other layers are left as they are. So are, with a warning, layers whose weights are used without
    calling them, as `torch.nn.MultiheadAttention` uses its output layer.

    Args:
        model: The merged network; it is not changed.
        endpoints: The networks it was merged from, already aligned.
        loader: Training data.
        weights: Of the endpoints, such as ``(1 - t, t)``, with sum 1; default equal.
        num_examples: How many examples to use, None for all.
        forward: ``forward(model, batch)`` for batches that are no ``(inputs, targets)``.

    Returns:
        A new model, in eval mode.

    Raises:
        ValueError: If the networks differ in architecture, there are not as many weights as endpoints, their sum is
            not 1, ``num_examples`` is not positive, or a layer cannot hold the map: it has no bias, or its weight is
            shared or computed.

    References:
        Jordan et al., 2023, https://arxiv.org/abs/2211.08403
    """
    weights = [1 / max(len(endpoints), 1)] * len(endpoints) if weights is None else weights
    if not endpoints or len(weights) != len(endpoints):
        raise ValueError(f"weights must be one for each endpoint, got {len(weights)} for {len(endpoints)} endpoints.")
    if not (min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ValueError(f"weights must be at least 0 and sum to 1, got weights={tuple(weights)}.")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, or None, got num_examples={num_examples}.")
    space = WeightSpace(model)
    for i, endpoint in enumerate(endpoints):
        space.check(endpoint, name=f"endpoints[{i}]", reference="model")
    data = calibration_batches(loader, space.device, limit=num_examples)
    repaired = copy_of(model).eval()
    if norm_layers(model):
        recalibrate(repaired, data, forward=forward)
    else:
        found = [measure(copy_of(endpoint).eval(), data, forward=forward) for endpoint in endpoints]
        impose(repaired, mix(found, weights), data, forward=forward)
    return repaired


@torch.no_grad()
def measure(
    model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, layer: str | None = None
) -> Statistics:
    """Return the statistics of what linear and convolutional layers give out, in the mode that the model is in.

    Args:
        model: It is run as it is.
        data: Batches on the model's device.
        forward: Called with the model and a batch; default ``model(inputs)``, see `modeconn.network.batches.inputs_of`.
        layer: The only layer to look at; default all that the model calls.

    Raises:
        ValueError: If a statistic is not finite.
    """
    calls: dict[str, list[tuple[int, Tensor]]] = {}
    hooks = [
        module.register_forward_hook(_note(calls, name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and layer in (None, name)
    ]
    try:
        for batch in data:
            run(model, inputs_of(batch)) if forward is None else called(forward, model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: pool(seen) for name, seen in calls.items()}
    for name, (mean, variance) in found.items():
        if not bool((mean + variance).isfinite().all()):
            raise ValueError(
                f"pre-activations of {name!r} have no finite mean and variance on this data: look for NaN or "
                f"infinite values in it and in the networks' weights."
            )
    return {name: (mean, variance.sqrt()) for name, (mean, variance) in found.items()}


def mix(statistics: Sequence[Statistics], weights: Sequence[float]) -> Statistics:
    """Return the weighted sum of the statistics of several networks."""

    def total(name: str, which: int) -> Tensor:
        return torch.stack([w * one[name][which] for w, one in zip(weights, statistics, strict=True)]).sum(0)

    return {name: (total(name, 0), total(name, 1)) for name in statistics[0]}


@torch.no_grad()
def impose(model: nn.Module, target: Statistics, data: Iterable[Any], *, forward: Forward | None = None) -> None:
    """Give the layers of ``model`` the statistics ``target`` on ``data``, in place; see `repair`."""
    layers = dict(model.named_modules())
    _check_layers(model, {name: layers[name] for name in target})
    _warn_about_silent(layers, target)
    for name, (mean, std) in target.items():
        found_mean, found_std = measure(model, data, forward=forward, layer=name)[name]
        constant = found_std <= 1e-6 * (found_mean.abs() + found_std.max())  # as Moments.constant has it
        scale = torch.where(constant, 1.0, std / found_std)
        _rescale(layers[name], scale, mean - scale * found_mean)


def _note(calls: dict[str, list[tuple[int, Tensor]]], name: str) -> Callable[..., None]:
    """Return a hook that adds to ``calls`` the number of values, mean and variance of each output channel."""

    def hook(layer: nn.Linear | _ConvNd, args: Any, output: Tensor) -> None:
        channel = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        values = output.movedim(channel, 0).flatten(1)
        variance, mean = torch.var_mean(values, 1, correction=1 if values.shape[1] > 1 else 0)
        calls.setdefault(name, []).append((values.shape[1], torch.stack([mean, variance])))

    return hook


def _warn_about_silent(layers: dict[str, nn.Module], target: Statistics) -> None:
    """Warn of linear and convolutional layers that give out nothing a hook could see."""
    silent = [name for name, x in layers.items() if isinstance(x, (nn.Linear, _ConvNd)) and name not in target]
    if silent:
        warn(
            f"layers {', '.join(map(repr, silent))} are not repaired: the model never calls them, though it may use "
            f"their weights."
        )


def _check_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise unless every layer has a weight and a bias that are its own."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for name, layer in layers.items():
        for kind in ("weight", "bias"):
            parameter = getattr(layer, kind)
            if parameter is None:
                raise ValueError(
                    f"layer {name!r} has no bias to hold the shift of a repair. Give all the networks one of zeros "
                    f"before they are merged: layer.bias = torch.nn.Parameter(torch.zeros(channels))."
                )
            if owners[id(parameter)] != 1:
                how = "shared with another layer" if owners[id(parameter)] else "computed from other parameters"
                raise ValueError(f"the {kind} of layer {name!r} is {how}, so a repair cannot rescale this layer alone.")


def _rescale(layer: nn.Linear | _ConvNd, scale: Tensor, shift: Tensor) -> None:
    """Fold ``scale * output + shift`` into weight and bias."""
    scale, shift = scale.to(layer.weight), shift.to(layer.weight)
    if isinstance(layer, _ConvTransposeNd):  # (inputs, outputs of a group, ...), group after group of inputs
        grouped = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
        grouped.mul_(scale.view(layer.groups, 1, -1, *[1] * len(layer.kernel_size)))
    else:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.mul_(scale).add_(shift)
