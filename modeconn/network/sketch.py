"""Models without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

M = TypeVar("M", bound=nn.Module)


def sketch(make: Callable[[], M]) -> M:
    """Return what a factory makes, its parameters on the meta device: they have shapes and take no memory.

    Each is made by the factory as it is and let go when a module takes it, so that one is in memory at a time. Buffers
    keep their values, which may decide what a model computes.
    """

    def let_go(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # it stays as it is: a tied one is the same tensor everywhere
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(let_go)
    try:
        return make()
    finally:
        handle.remove()
