"""What training leaves in buffers, and what becomes of it between networks: estimated anew, mixed, or kept.

- Running statistics of batch norm and instance norm are estimated anew on training data (`network.batch_norm`).
- The vectors by which spectral norm knows the largest singular value follow from the weights: `settle` finds them anew.
- Other floating buffers (moving averages of a user's own layer, codebooks) are means of those of the networks, weighted
  as the weights are. Where networks agree, in infinities too, the value stays.
- Integers and truth values are those of the first network.

Whatever differs and is not estimated anew is named in a warning by whoever makes networks between others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from modeconn.network.weights import load_buffers, named_buffers
from modeconn.tools.warn import warn

_ITERATIONS = 30  # of the power method, from the vectors of a network nearby

Buffers = Mapping[str, Tensor]


def estimated_anew(model: nn.Module) -> set[str]:
    """Return the names of the buffers of a model that `network.batch_norm` or `settle` estimates for any weights."""
    found = set()
    for name, module in model.named_modules():
        kinds: tuple[str, ...] = ()
        if isinstance(module, _NormBase):
            kinds = ("running_mean", "running_var", "num_batches_tracked")
        elif isinstance(module, _SpectralNorm):
            kinds = ("_u", "_v")
        kinds += tuple(f"{hook.name}_{end}" for hook in _old_hooks(module) for end in "uv")
        found |= {f"{name}.{kind}".lstrip(".") for kind in kinds}
    return found


def _old_hooks(module: nn.Module) -> list[SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def differing(model: nn.Module, buffers: Sequence[Buffers]) -> list[str]:
    """Return the names of the buffers that differ between networks and that are not estimated anew."""
    anew, first = estimated_anew(model), buffers[0]
    return [
        name
        for name, buffer in first.items()
        if name not in anew and any(not torch.equal(buffer, other[name]) for other in buffers[1:])
    ]


def mixed(names: Iterable[str], buffers: Sequence[Buffers], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted means of floating buffers; entries in which networks agree, and other buffers, as they are.

    Args:
        names: Which buffers.
        buffers: Of each network, by name.
        weights: Of the networks, with sum 1.
    """
    found = {}
    for name in names:
        first, *others = (one[name] for one in buffers)
        if not others:
            found[name] = first
            continue
        if first.is_floating_point() or first.is_complex():
            agree = torch.stack([first == other for other in others]).all(0)
            mean = sum(weight * one[name] for weight, one in zip(weights, buffers, strict=True))
            first = torch.where(agree, first, mean.to(first.dtype))
        found[name] = first
    return found


def take_mean(model: nn.Module, networks: Sequence[nn.Module]) -> list[str]:
    """Give a model, whose weights are the mean of networks', their buffers; return which of them differ.

    Running statistics are those of the first network until they are estimated.
    """
    buffers = [named_buffers(network) for network in networks]
    names = differing(model, buffers)
    weights = [1 / len(networks)] * len(networks)
    load_buffers({**buffers[0], **mixed(names, buffers, weights)}, model)
    settle(model)
    return names


def warn_of(names: Sequence[str], buffers: Buffers) -> None:
    """Warn that networks between others take mixtures of these buffers, or those of the first."""
    if not names:
        return
    real = [name for name in names if buffers[name].is_floating_point() or buffers[name].is_complex()]
    rules = {"the mean of the networks', weighted as their weights": real}
    rules["those of the first network"] = [name for name in names if name not in real]
    text = "; ".join(f"{', '.join(map(repr, some))}: {rule}" for rule, some in rules.items() if some)
    warn(
        f"buffers differ between the networks that nothing estimates anew between them. There they are taken to be, "
        f"for {text}."
    )


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Bring what follows from weights alone up to date with them: the singular vectors of spectral norm."""
    for module in model.modules():
        for hook in _old_hooks(module):
            for _ in range(_ITERATIONS):
                hook.compute_weight(module, do_power_iteration=True)
        for weights in getattr(module, "parametrizations", {}).values():
            for parametrization in weights:
                if isinstance(parametrization, _SpectralNorm) and weights.original.ndim > 1:
                    matrix = parametrization._reshape_weight_to_matrix(weights.original)
                    parametrization._power_method(matrix, _ITERATIONS)
