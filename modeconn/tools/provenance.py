"""How a result came about: the call or command, versions, and which data, kept by the result and in its files."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn._version import __version__
from modeconn.tools.processes import joined

ATTRIBUTE = "made_by"
"""The attribute of a result that holds how it was made; in a file, the name under which it stands."""

_LONGEST = 120

_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts of the call that is at work", default=None)
_command: ContextVar[str | None] = ContextVar("command line that is at work", default=None)
_recipe: ContextVar[str | None] = ContextVar("its options as a file", default=None)


@contextmanager
def command(text: str) -> Iterator[None]:
    """Let all that is made in the block say which command line made it."""
    token = _command.set(text)
    try:
        yield
    finally:
        _command.reset(token)


@contextmanager
def recipe(text: str) -> Iterator[None]:
    """Let all that is made in the block hold the options of the command that is at work, as a file that it reads."""
    token = _recipe.set(text)
    try:
        yield
    finally:
        _recipe.reset(token)


def current_command() -> str | None:
    """Return the command line that is at work; None in Python."""
    return _command.get()


@contextmanager
def call_of(function: Any, bound: inspect.BoundArguments) -> Iterator[dict[str, Any] | None]:
    """Give the description of a public call, to which `note` adds; None inside of another call, which says it all."""
    if _facts.get() is not None:
        yield None
        return
    text = _command.get()
    facts = {} if text is None else {"command": text}
    facts |= {} if _recipe.get() is None else {"recipe": _recipe.get()}
    facts |= {"call": _written(function, bound), "versions": dict(versions())}
    if joined().size > 1:
        facts["processes"] = joined().size
    token = _facts.set(facts)
    try:
        yield facts
    finally:
        _facts.reset(token)


def is_in_a_call() -> bool:
    """Whether a public call is at work, of which this is a part."""
    return _facts.get() is not None


def note_data(name: str, describe: Callable[[], str]) -> None:
    """Add to how what is being made came about which data was read, under the name of an argument, the first time."""
    facts = _facts.get()
    if facts is not None and name not in facts.setdefault("data", {}):
        facts["data"][name] = describe()


def now() -> dict[str, Any] | None:
    """Return what is known by now of how something is made, for files of unfinished runs."""
    facts = _facts.get()
    return None if facts is None else dict(facts)


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """Return names and versions of what results depend on."""
    python, numpy = platform.python_version(), np.__version__
    return (("modeconn", __version__), ("torch", torch.__version__), ("numpy", numpy), ("python", python))


def keep(result: Any, facts: Mapping[str, Any] | None) -> None:
    """Let a result say how it was made, and what it consists of, as far as these are of kinds that do."""
    if isinstance(result, nn.Module) or hasattr(type(result), ATTRIBUTE):
        object.__setattr__(result, ATTRIBUTE, dict(facts) if isinstance(facts, Mapping) else None)
    if isinstance(result, (list, tuple)):
        parts = result
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        parts = [getattr(result, field.name) for field in dataclasses.fields(result)]
    else:
        parts = [getattr(result, "permutation", None)] if hasattr(type(result), ATTRIBUTE) else []
    for part in parts:
        if isinstance(part, (list, tuple, nn.Module)) or (hasattr(type(part), ATTRIBUTE) and of(part) is None):
            keep(part, facts)


def entry(result: Any) -> dict[str, Any]:
    """Return how a result was made as an entry of a file; nothing if nobody knows."""
    return {} if of(result) is None else {ATTRIBUTE: of(result)}


def of(result: Any) -> dict[str, Any] | None:
    """Return how a result was made; None if nobody knows."""
    return getattr(result, ATTRIBUTE, None)


def _written(function: Any, bound: inspect.BoundArguments) -> str:
    """Return a call as one might write it, large arguments by their kind."""
    arguments = []
    parameters = bound.signature.parameters
    seed = {"seed": parameters["seed"].default} if "seed" in parameters and "seed" not in bound.arguments else {}
    for name, value in {**bound.arguments, **seed}.items():
        if name in ("self", "cls"):
            continue
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments += [f"{key}={text_of(one)}" for key, one in value.items()]
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments += map(text_of, value)
        else:
            arguments.append(f"{name}={text_of(value)}")
    owner = bound.arguments.get("self", bound.arguments.get("cls"))
    name = function.__name__
    if owner is not None:
        name = f"{(owner if isinstance(owner, type) else type(owner)).__name__}.{name}"
    return f"{name}({', '.join(arguments)})"


def text_of(value: Any) -> str:
    """Return a value in words, without what changes from run to run and without the numbers of large objects."""
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}, {sum(p.numel() for p in value.parameters()):,} parameters>"
    if isinstance(value, Tensor):
        return f"<tensor {'nested' if value.is_nested else tuple(value.shape)}>"
    if type(value) in (list, tuple) and all(isinstance(one, (bool, int, float, str)) for one in value):
        text = repr(value)
    elif type(value) in (list, tuple) and len(value) <= 4:
        text = "[" + ", ".join(map(text_of, value)) + "]"
    elif isinstance(value, (list, tuple, dict, set)):
        text = f"<{type(value).__name__} of {len(value)}>"
    elif isinstance(value, functools.partial):
        named = [f"{key}={text_of(one)}" for key, one in value.keywords.items()]
        text = f"partial({', '.join([text_of(value.func), *map(text_of, value.args), *named])})"
    elif inspect.isroutine(value) or isinstance(value, type):
        text = f"{value.__module__}.{value.__qualname__}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        text = _settings(value)
    elif isinstance(value, (bool, int, float, str, type(None), torch.device, torch.dtype, os.PathLike)):
        text = repr(value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"<{type(value).__name__}>"


def _settings(value: Any) -> str:
    """Return a data class with the fields that differ from their defaults, which are what somebody chose."""
    chosen = []
    for field in dataclasses.fields(value):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        given = getattr(value, field.name)
        if isinstance(given, (Tensor, nn.Module)) or isinstance(default, Tensor):
            return f"<{type(value).__name__}>"
        if default is not given and repr(default) != repr(given):
            chosen.append(f"{field.name}={text_of(given)}")
    return f"{type(value).__name__}({', '.join(chosen)})"
