"""Models without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

M = TypeVar("M", bound=nn.Module)


def sketch(make: Callable[[], M]) -> M:
    """Return what a factory makes, its parameters on the meta device: they have shapes and take no memory.

    Each is made by the factory as it is and let go when a module takes it, so that one is in memory at a time, unless
    the factory itself holds more. Buffers keep their values, which may decide what a model computes.

    Raises:
        ValueError: If the factory reads parameters that have no values any more.
    """
    made = WeakIdKeyDictionary()  # by each parameter that the factory still holds, what stands for it in all places

    def let_go(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return made[parameter]

    handle = register_module_parameter_registration_hook(let_go)
    try:
        return make()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if "meta" not in str(error) and "set_data" not in str(error):
            raise
        raise ValueError(
            "the function that makes the model reads or replaces values of its parameters, which have none here: so a "
            "model of any size takes no memory. Let it make the model alone."
        ) from error
    finally:
        handle.remove()
