"""The modes of a network's layers, changed for a while and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Give back, after the block, train or eval mode of every module and ``requires_grad`` of every parameter."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)


def use_batch_statistics(model: nn.Module, kind: type[nn.Module] = _NormBase) -> None:
    """Leave of train mode nothing but norm layers that use the statistics of the batch: no dropout, no heads.

    Args:
        model: Every module is set to eval mode, norm layers to train mode; see `flags_kept`.
        kind: Which layers are norm layers.
    """
    for module in model.modules():
        module.training = isinstance(module, kind)
