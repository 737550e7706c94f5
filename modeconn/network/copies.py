"""Copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_of(model: M) -> M:
    """Return a deep copy, also of a model that keeps results of operations as attributes.

    As `torch.nn.utils.weight_norm` does with the weight that it computes; `copy.deepcopy` refuses those.
    """
    computed = [tensor for tensor in plain_tensors(model) if tensor.grad_fn is not None]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def plain_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold as ordinary attributes."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
