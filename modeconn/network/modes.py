"""The modes of a network's layers, changed for a while and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def backward_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through recurrent layers in eval mode too, which cuDNN does not do: without it, then.

    Nothing changes for a model without such layers, nor on a CPU.
    """
    cudnn = torch.backends.cudnn
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if not (recurrent and cudnn.enabled and any(parameter.is_cuda for parameter in model.parameters())):
        yield
        return
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = True


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
