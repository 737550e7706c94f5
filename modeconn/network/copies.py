"""Copies of modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_of(model: M) -> M:
    """Return a deep copy, also of a model that keeps results of operations as attributes.

    As `torch.nn.utils.weight_norm` does with the weight that it computes; `copy.deepcopy` refuses those. What cannot be
    copied by its nature, such as a lock or an open file, the copy shares with the model.
    """
    return copy_with(
        model, {id(tensor): tensor.detach().clone() for tensor in plain_tensors(model) if tensor.grad_fn is not None}
    )


def copy_with(model: M, known: dict[int, Any]) -> M:
    """Return a deep copy in which objects, by their ``id``, are replaced; what cannot be copied is shared."""
    try:
        return copy.deepcopy(model, dict(known))
    except TypeError:  # cannot pickle ...
        shared = [value for value in _attributes(model) if not _can_be_copied(value)]
        return copy.deepcopy(model, known | {id(value): value for value in shared})


def _attributes(model: nn.Module) -> Iterator[Any]:
    """Yield what modules hold beside parameters, buffers and other modules, and their hooks."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                yield from value.values()
            elif name not in ("_parameters", "_buffers", "_modules"):
                yield value


def _can_be_copied(value: Any) -> bool:
    if isinstance(value, (Tensor, nn.Module)):
        return True
    try:
        copy.deepcopy(value)
    except TypeError:
        return False
    return True


def check_no_inference(model: nn.Module) -> None:
    """Raise a ValueError if a model holds tensors of `torch.inference_mode`, of which there are no gradients."""
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the network was made inside of torch.inference_mode(), so that torch refuses gradients through it. Pass "
            "copy.deepcopy(network), made outside of it."
        )


def plain_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold as ordinary attributes."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
