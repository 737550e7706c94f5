"""Copies of modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn, strided
from torch.nn.parameter import is_lazy

M = TypeVar("M", bound=nn.Module)


def copy_of(model: M) -> M:
    """Return a deep copy, also of a model that keeps results of operations as attributes.

    As `torch.nn.utils.weight_norm` does with the weight that it computes; `copy.deepcopy` refuses those. What cannot be
    copied by its nature, such as a lock or an open file, the copy shares with the model.
    """
    plain = plain_tensors(model).values()
    computed = {id(tensor): tensor.detach().clone() for tensor in plain if tensor.grad_fn is not None}
    return copy_with(model, computed | _copies_in_one_storage(model))


def in_one_storage(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the sets of two or more different tensors that lie in the same memory, as weights tied by ``.data`` do."""
    by_storage: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if not is_lazy(tensor) and not tensor.is_meta and tensor.layout is strided and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})[id(tensor)] = tensor
    return [list(tied.values()) for tied in by_storage.values() if len(tied) > 1]


def _copies_in_one_storage(model: nn.Module) -> dict[int, Any]:
    """Return copies of the tensors that lie in the same memory, which again do, by the ``id`` of the tensor.

    `copy.deepcopy` gives each parameter memory of its own.
    """
    copies: dict[int, Any] = {}
    for tied in in_one_storage([*model.parameters(), *model.buffers()]):
        storage = tied[0].untyped_storage().clone()
        for tensor in tied:
            twin = tensor.detach().new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            is_plain = type(tensor) in (Tensor, nn.Parameter)
            if is_plain:
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copies


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


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that modules hold as ordinary attributes, by name."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def untied_copy(model: M) -> M:
    """Return a copy in which no two modules share a parameter: each has its own, of equal values."""
    twin = copy_of(model)
    seen: set[int] = set()
    shared = {id(tensor) for tied in in_one_storage(twin.parameters()) for tensor in tied[1:]}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen or id(parameter) in shared:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
    return twin
