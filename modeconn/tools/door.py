"""The door of the package: what public functions and settings are given is of the kind that their annotations say.

One sentence names the argument, what it takes and what it was given, before anything is done. Annotations that say more
than a class can (protocols, what is inside of batches) are left to whoever reads the value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from modeconn.tools import provenance
from modeconn.tools.warn import warn

F = TypeVar("F", bound=Callable[..., Any])
_CAST = ("cpu", "cuda", "xpu", "mps")
"""The kinds of devices that may have autocast switched on."""

_Test = tuple[Callable[[Any], bool], str]
"""Whether a value is of a kind, and the kind in words."""

_PLAIN: dict[Any, _Test] = {
    type(None): (lambda value: value is None, "None"),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "an integer"),
    float: (lambda value: _is_number(value), "a number"),
    str: (lambda value: isinstance(value, str), "a string"),
    nn.Module: (lambda value: isinstance(value, nn.Module) and not _is_lazy(value), "a torch.nn.Module"),
    Tensor: (lambda value: isinstance(value, Tensor), "a tensor"),
    torch.device: (lambda value: isinstance(value, torch.device), "a torch.device"),
    torch.dtype: (lambda value: isinstance(value, torch.dtype), "a torch.dtype"),
    torch.Generator: (lambda value: isinstance(value, torch.Generator), "a torch.Generator"),
}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):  # an entry of a tensor of numbers
        return value.ndim == 0 and not (value.is_complex() or value.is_meta) and not bool(value.isnan())
    return isinstance(value, Real) and not isinstance(value, bool) and not _is_huge(value) and not math.isnan(value)


def _is_huge(value: Any) -> bool:
    """Whether a value is an integer that no tensor holds."""
    return isinstance(value, Integral) and not -(2**63) <= value < 2**63


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def is_iterable(value: Any) -> bool:
    """Whether a value has items; texts are one thing, and so are tensors and arrays of one number without an axis."""
    has_items = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    return has_items and getattr(value, "ndim", 1) != 0 and not isinstance(value, (str, bytes, type))


def _is_sequence(value: Any) -> bool:
    has_items = hasattr(value, "__len__") and hasattr(value, "__getitem__")  # arrays and tensors, too
    return has_items and is_iterable(value) and not isinstance(value, Mapping)


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
        texts = [text for _, text in parts]
        joint = ", or " if any("," in text for text in texts) else " or "
        return lambda value: any(test(value) for test in tests), joint.join(texts)
    if origin is Literal:
        return lambda value: value in arguments, " or ".join(map(repr, arguments))
    if origin is os.PathLike:
        return lambda value: isinstance(value, os.PathLike), "a path"
    if origin is tuple and arguments:
        return _kind_of_tuple(arguments)
    inner = kind_of(arguments[0]) if origin in (Sequence, Iterable) and arguments else None
    if inner is not None:
        is_any = _is_sequence if origin is Sequence else is_iterable
        name = "a list or tuple" if origin is Sequence else "an iterable, such as a list"
        return lambda value: is_any(value) and _all_are(inner[0], value), f"{name}, each {inner[1]}"
    if origin in (Iterable, Sequence, Mapping):
        return {
            Iterable: (is_iterable, "an iterable, such as a list or a DataLoader"),
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


def _kind_of_tuple(arguments: tuple[Any, ...]) -> _Test | None:
    """Return how to tell a tuple, for which a list is as good; ``(X, ...)`` for any number of X."""
    if arguments[-1] is Ellipsis:
        return kind_of(Sequence[arguments[0]])
    kinds: list[_Test] = [kind_of(argument) or (lambda value: True, "anything") for argument in arguments]
    words = [text for _, text in kinds]
    each = f"each {words[0]}" if len(set(words)) == 1 else ", ".join(words)

    def is_such(value: Any) -> bool:
        if not _is_sequence(value) or len(value) != len(kinds):
            return False
        return all(test(part) for (test, _), part in zip(kinds, value, strict=True))

    return is_such, f"a list or tuple of {len(kinds)}, {each}"


def _all_are(test: Callable[[Any], bool], values: Any) -> bool:
    """Whether all that can be looked at without using it up passes a test."""
    return not (_is_sequence(values) or isinstance(values, (Mapping, Set))) or all(map(test, values))


def _is_module_class(value: Any) -> bool:
    """Whether a value is a class of modules, such as a loss of torch of which no object was made."""
    return isinstance(value, type) and issubclass(value, nn.Module)


@functools.cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Return the annotations of a function or class by name, those that can be read while the program runs."""
    found = {}
    for part in reversed(owner.__mro__) if isinstance(owner, type) else (owner,):
        module = inspect.getmodule(part)
        scope = getattr(inspect.unwrap(part), "__globals__", None) or (vars(module) if module else {})
        for name, hint in inspect.get_annotations(part).items():
            with contextlib.suppress(NameError, AttributeError, TypeError):
                found[name] = eval(hint, dict(scope)) if isinstance(hint, str) else hint
    return found


def check(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError unless a value is of the kind that an annotation means; a seed is 0 or more."""
    kind = kind_of(hint)
    if kind is not None and not kind[0](value):
        for number, entry, of_entries in _entries(value, hint):
            check(f"{name}[{number}]", entry, of_entries)
        if isinstance(value, nn.Module) and _PLAIN[nn.Module][1] in kind[1] and _is_lazy(value):
            raise ValueError(
                f"{name} has lazy layers, whose weights have no shape yet: run it on one batch first, got "
                f"{shown(name, value)}."
            )
        raise ValueError(f"{name} must be {kind[1]}, got {shown(name, value)}.")
    if name == "seed" and isinstance(value, Integral) and value < 0:
        raise ValueError(f"seed must be an integer of 0 or more, got seed={value}.")
    if name == "device" and isinstance(value, (str, torch.device)):
        _check_device(value)


def plain(value: Any, hint: Any, *, arrays: bool = True) -> Any:
    """Return a value that passed `check` with Python's own numbers and texts in place of those of numpy and torch.

    Files and torch's generators take only Python's, and settings that are equal are then told by equal texts. What an
    annotation takes as it is, such as a tensor, stays, and so does a tensor that takes part in a derivative.

    Args:
        value: The value.
        hint: Its annotation.
        arrays: Whether arrays become lists where an annotation asks for a sequence; where it asks for a tuple, they
            become one in any case.
    """
    choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    is_number = isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad and Tensor not in choices
    if isinstance(value, np.generic) or (is_number and float in choices):
        own = value.item()
        return own if any(kind is not None and kind[0](own) for kind in map(kind_of, choices)) else value
    origins = {typing.get_origin(choice) for choice in choices} & {Sequence, tuple}
    is_array = type(value) is np.ndarray and (arrays or Sequence not in origins)
    if not origins or not (is_array or type(value) in (list, tuple)) or np.ndarray in choices:
        return value  # data, say, that the caller counts
    pairs = [(entry, plain(entry, of_entries)) for _, entry, of_entries in _entries(value, hint)]
    if len(pairs) != len(value) or all(own is entry for entry, own in pairs):
        return value
    entries = [own for _, own in pairs]
    return tuple(entries) if type(value) is tuple or (is_array and Sequence not in origins) else entries


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        reason = str(error).splitlines()[0].rstrip(".")
        reason = "torch knows none of this name" if reason.startswith("Expected one of") else reason
        raise ValueError(
            f"device must be one that is here, such as 'cpu', got device={str(device)!r}: {reason}."
        ) from None


def _entries(value: Any, hint: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield the number, value and annotation of each entry of a list or tuple whose entries have annotations."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        origin, arguments = typing.get_origin(choice), typing.get_args(choice)
        is_list = origin in (Sequence, Iterable) or (origin is tuple and arguments[-1] is Ellipsis)
        if is_list and arguments and _is_sequence(value):
            yield from ((number, entry, arguments[0]) for number, entry in enumerate(value))
        elif origin is tuple and arguments and _is_sequence(value) and len(value) == len(arguments):
            yield from zip(range(len(value)), value, arguments, strict=True)


def shown(name: str, value: Any) -> str:
    """Return ``name=value`` as the caller might have written it, short."""
    if isinstance(value, Tensor) and value.ndim:
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    if _is_huge(value):
        return f"an integer of {int(value).bit_length()} bits, where 64 are the most"
    text = repr(value)
    return f"{name}={text}" if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def shortened(text: Any, length: int = 300) -> str:
    """Return a text, or that of a value, for a sentence: what is longer loses its middle."""
    text = str(text)
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def checked(function: F) -> F:
    """Check the arguments of a public function against its annotations, and let its result say how it was made."""
    signature = inspect.signature(function)
    is_reading = function.__name__ == "load"  # what it returns was made by another call

    @functools.wraps(function)
    def at_the_door(*args: Any, **kwargs: Any) -> Any:
        bound = _bound(function, signature, args, kwargs)
        check_arguments(function, bound)
        with _ordinary_tensors(), provenance.call_of(function, bound) as facts:
            result = function(*bound.args, **bound.kwargs)
        if facts is not None and not is_reading:
            provenance.keep(result, facts)
        return result

    return at_the_door  # type: ignore[return-value]


def looked_at(function: F) -> F:
    """Check the arguments of a small function, or of an ``__init__``, against its annotations, and do no more."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def at_the_door(*args: Any, **kwargs: Any) -> Any:
        bound = _bound(function, signature, args, kwargs)
        check_arguments(function, bound)
        return function(*bound.args, **bound.kwargs)

    return at_the_door  # type: ignore[return-value]


def _bound(
    function: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Bind the arguments of a call; an error names the function, and an argument that may be meant."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        meant = [close for name in kwargs for close in _similar(name, signature.parameters)]
        hint = f"; do you mean {' and '.join(meant)}?" if meant else ""
        raise TypeError(f"{function.__qualname__}() {error}{hint}") from None


def _similar(name: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    return [] if name in known else [f"{close}=" for close in difflib.get_close_matches(name, known, n=1)]


def check_arguments(function: Callable[..., Any], bound: inspect.BoundArguments) -> None:
    """Raise a ValueError unless the arguments of a call are of the kinds that the function's annotations mean.

    Those that are become `plain`.
    """
    hints, parameters = hints_of(function), bound.signature.parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, value in bound.arguments.items():
        if name in hints and parameters[name].kind not in several:
            check(name, value, hints[name])
            bound.arguments[name] = plain(value, hints[name])


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Work as outside of no_grad, inference_mode, autocast and a default device, wherever a verb is called.

    Autocast in particular keeps the weights that it has cast, and would go on with them where weights change in place.
    """
    with contextlib.ExitStack() as stack:
        cast = [] if provenance.is_in_a_call() else [kind for kind in _CAST if torch.is_autocast_enabled(kind)]
        for kind in cast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if cast:
            warn(
                "autocast is switched off for the call: networks are measured and trained in their own precision. "
                "Recipe(autocast=) trains in another one; networks of bfloat16 are measured in bfloat16."
            )
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def check_settings(settings: Any) -> None:
    """Raise a ValueError unless the fields of a dataclass are of the kinds that their annotations mean.

    Those that are become `plain`; arrays for a sequence stay, since a class of the user's own may compute with them.
    """
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        if field.init and field.name in hints:
            value, hint = getattr(settings, field.name), hints[field.name]
            check(field.name, value, hint)
            if (own := plain(value, hint, arrays=False)) is not value:
                object.__setattr__(settings, field.name, own)  # also of a frozen one
