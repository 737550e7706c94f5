"""The door of the package: what public functions and settings are given is of the kind that their annotations say.

One sentence names the argument, what it takes and what it was given, before anything is done. Annotations that say more
than a class can (protocols, what is inside of batches) are left to whoever reads the value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union

import numpy as np
import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])
_Test = tuple[Callable[[Any], bool], str]
"""Whether a value is of a kind, and the kind in words."""

_PLAIN: dict[Any, _Test] = {
    type(None): (lambda value: value is None, "None"),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "an integer"),
    float: (lambda value: _is_number(value), "a number"),
    str: (lambda value: isinstance(value, str), "a string"),
    nn.Module: (lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
    Tensor: (lambda value: isinstance(value, Tensor), "a tensor"),
    torch.device: (lambda value: isinstance(value, torch.device), "a torch.device"),
    torch.dtype: (lambda value: isinstance(value, torch.dtype), "a torch.dtype"),
    torch.Generator: (lambda value: isinstance(value, torch.Generator), "a torch.Generator"),
}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):  # an entry of a tensor of numbers
        return value.ndim == 0 and not value.is_complex() and not bool(value.isnan())
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_iterable(value: Any) -> bool:
    has_items = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    return has_items and not isinstance(value, (str, bytes, type))


def _is_sequence(value: Any) -> bool:
    has_items = hasattr(value, "__len__") and hasattr(value, "__getitem__")  # arrays and tensors, too
    return has_items and not isinstance(value, (str, bytes, Mapping, type))


def kind_of(hint: Any) -> _Test | None:
    """Return how to tell what an annotation means, and that in words; None if it says too much for a class."""
    if hint is Any:
        return None
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return kind_of(hint.__bound__) if hint.__bound__ is not None else None
    if origin in (Union, types.UnionType):
        parts = [kind_of(argument) for argument in arguments]
        if not all(parts):
            return None
        tests = [test for test, _ in parts]
        return lambda value: any(test(value) for test in tests), " or ".join(words for _, words in parts)
    if origin is Literal:
        return lambda value: value in arguments, " or ".join(map(repr, arguments))
    if origin is os.PathLike:
        return lambda value: isinstance(value, os.PathLike), "a path"
    inner = kind_of(arguments[0]) if origin is Sequence and arguments else None
    if inner is not None:
        return lambda value: _is_sequence(value) and all(map(inner[0], value)), f"a list or tuple, each {inner[1]}"
    if origin in (Iterable, Sequence, Mapping):
        return {
            Iterable: (_is_iterable, "an iterable, such as a list or a DataLoader"),
            Sequence: (_is_sequence, "a list or tuple"),
            Mapping: (lambda value: isinstance(value, Mapping), "a mapping"),
        }[origin]
    if origin is Callable or hint is Callable:
        return lambda value: callable(value) and not _is_module_class(value), "a function"
    if origin is type:
        return lambda value: isinstance(value, type), "a class"
    is_protocol = getattr(hint, "_is_protocol", False)
    if isinstance(hint, type) and not is_protocol and hint is not object:
        article = "an" if hint.__name__[0] in "AEIOU" else "a"
        return lambda value: isinstance(value, hint), f"{article} {hint.__name__}"
    return None


def _is_module_class(value: Any) -> bool:
    """Whether a value is a class of modules, such as a loss of torch of which no object was made."""
    return isinstance(value, type) and issubclass(value, nn.Module)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    """Return annotations by name, those that can be read while the program runs."""
    found = {}
    places = [owner.__mro__, None] if isinstance(owner, type) else [(owner,), None]
    for part in reversed(places[0]):
        scope = vars(inspect.getmodule(part) or types) if inspect.getmodule(part) else {}
        for name, hint in inspect.get_annotations(part).items():
            with contextlib.suppress(NameError, AttributeError, TypeError):
                found[name] = eval(hint, dict(scope)) if isinstance(hint, str) else hint
    return found


def check(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError unless a value is of the kind that an annotation means."""
    kind = kind_of(hint)
    if kind is not None and not kind[0](value):
        raise ValueError(f"{name} must be {kind[1]}, got {shown(name, value)}.")


def shown(name: str, value: Any) -> str:
    """Return ``name=value`` as the caller might have written it, short."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{name}={text}" if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def checked(function: F) -> F:
    """Check the arguments of a public function against its annotations."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def at_the_door(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and signature.parameters[name].kind not in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                check(name, value, hints[name])
        with _ordinary_tensors():
            return function(*args, **kwargs)

    return at_the_door  # type: ignore[return-value]


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Work as outside of no_grad, inference_mode and a default device: where a verb is called does not change it."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def check_settings(settings: Any) -> None:
    """Raise a ValueError unless the fields of a dataclass are of the kinds that their annotations mean."""
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        if field.init and field.name in hints:
            check(field.name, getattr(settings, field.name), hints[field.name])
