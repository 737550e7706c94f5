"""Many networks of one architecture run as one, and what to say where that is impossible."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


def over_networks(
    function: Callable[..., Tensor],
    model: nn.Module,
    alone: Callable[..., Tensor],
    *,
    randomness: str,
    way_out: str,
    compile: bool = False,
) -> Callable[..., Tensor]:
    """Return `torch.func.vmap` of a function that runs a model, with errors that name the layer it cannot vectorise.

    Args:
        function: What to vectorise over the first dimension of its arguments; it returns one number.
        model: The module that it runs; it may have hooks for the time of an error.
        alone: What the function does for one network, with errors that say what does not fit; called with the same
            arguments after an error, which may have nothing to do with vectorising.
        randomness: As for `torch.func.vmap`.
        way_out: What an error advises, a sentence.
        compile: Whether to compile it.

    Raises:
        ValueError: When called, if a layer is none that `torch.func.vmap` knows.
    """
    vectorised = vmap(function, randomness=randomness)
    fast = torch.compile(vectorised) if compile else vectorised

    def call(*args: Any) -> Any:
        try:
            with _attention_of_products(args):
                found = fast(*args)
            if found.ndim != 1:
                alone(*args)
            return found
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            alone(*args)  # works, so that it is running many at once that does not
            where, reason = _innermost(model, vectorised, args), str(error).partition(". ")[0]
            raise ValueError(f"{where} cannot be run for many networks at once ({reason}). {way_out}") from error

    return call


def _attention_of_products(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Have attention computed by products of matrices on the CPU, whose fused attention vmap runs one by one."""
    on_cpu = all(value.device.type == "cpu" for value in pytree.tree_leaves(args) if isinstance(value, Tensor))
    return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()


def _innermost(model: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """Return the layer in which a function fails."""
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names[module])

    def leave(*_: Any) -> None:
        running.pop()

    names = {m: f"{name!r} ({type(m).__name__})" if name else type(m).__name__ for name, m in model.named_modules()}
    hooks = [hook for m in names for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        function(*args)
    except RuntimeError:
        return running[-1] if running else "the loss"
    finally:
        for hook in hooks:
            hook.remove()
    return "the model"
