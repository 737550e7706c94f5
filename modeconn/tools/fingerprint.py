"""Texts that tell settings apart: what must be the same for a finished measurement or an interrupted run to be used."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import logging
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.tools import provenance

_OF_EVERY_MODULE = {*vars(nn.Module()), "training", provenance.ATTRIBUTE}
_DEEPEST = 50  # objects inside one another; what lies deeper is told by its class alone
_LONGEST = 2_000  # characters; what is longer is told by its digest
_PLACES = {
    torch.sparse_coo: ("indices",),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices")),
}
"""What says where the values of a sparse tensor stand, by its layout."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size)


def identify(value: Any) -> str:
    """Return a text that is the same in every process for what acts alike, and another one for what does not.

    Objects are told by their class and all they hold; tensors by their digest; functions by their name, and those that
    cannot be imported (lambdas, closures, those of a notebook) by their code, their defaults and the settings they read
    as well. What an imported function does is not looked at, nor lists and the like that a function may write to.

    Example:
        >>> identify(functools.partial(torch.optim.SGD, lr=0.1))
        'torch.optim.sgd.SGD(lr=0.1)'
        >>> identify(lambda x: x + 1) == identify(lambda x: x + 2)
        False
    """
    return _Identifier().identify(value, ())


def digest(value: nn.Module | Iterable[Tensor]) -> str:
    """Return a hash of tensors, of a module also of its layers, their settings, and the names of its tensors."""
    if isinstance(value, nn.Module):
        return _hash(identify(value))
    total = hashlib.sha256()
    for tensor in value:
        total.update(f"{tuple(tensor.shape)}, {tensor.dtype}".encode())
        for part in bytes_of(tensor):
            total.update(part)
    return total.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the bytes of the numbers that a tensor of any layout holds, row by row."""
    for part in dense_parts(tensor.detach()):
        plain = part.cpu().resolve_conj().resolve_neg()
        # Cloned, because a tensor of one number may have the stride 0.
        yield plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy()


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the dense tensors that a tensor consists of: itself, or places and values of a sparse one."""
    if tensor.is_nested:
        return tuple(tensor.unbind())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()  # two entries of one place are one
    if tensor.layout in _PLACES:
        return (*(getattr(tensor, place)() for place in _PLACES[tensor.layout]), tensor.values())
    return (tensor,)


class _Identifier:
    """Names what it meets; an object that several hold is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # by id, with the object, so that the id stays its own

    def identify(self, value: Any, above: tuple[int, ...]) -> str:
        """Do so inside the objects of these ids; one that holds itself is named by how far up it is."""
        if isinstance(value, (*_PLAIN, enum.Enum)):
            return repr(value)
        if id(value) in above:
            return f"<{len(above) - above.index(id(value))} above>"
        if id(value) not in self._known:
            text = _describe(value, functools.partial(self.identify, above=(*above, id(value))), len(above))
            text = text if len(text) <= _LONGEST else f"{_name(type(value))} of digest {_hash(text)}"
            self._known[id(value)] = value, text
        return self._known[id(value)][1]


def _describe(value: Any, inside: Callable[[Any], str], depth: int) -> str:
    """Name an object, what it holds by ``inside``."""
    if isinstance(value, Tensor):
        return f"tensor of digest {digest([value])}"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"array of digest {_hash(f'{value.shape}, {value.dtype}, {value.tobytes().hex()}')}"
    if isinstance(value, (types.ModuleType, logging.Logger)):  # modules and loggers are unique by name
        return f"{_name(type(value))} {getattr(value, '__name__', None) or value.name}"
    if isinstance(value, type) or inspect.isbuiltin(value):
        return _name(value)
    if depth > _DEEPEST:
        return _name(type(value))
    if isinstance(value, functools.partial):
        return _call(inside(value.func), value.args, value.keywords, inside)
    if inspect.ismethod(value):
        return f"{inside(value.__self__)}.{value.__name__}"
    if inspect.isfunction(value):
        return _name(value) if _can_be_imported(value) else f"{_name(value)} of digest {_hash(_code(value, inside))}"
    if isinstance(value, Mapping):
        return _name(type(value)) + "{" + ", ".join(f"{inside(k)}: {inside(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        listed = _call("", value, {}, inside)
        return listed if type(value) is tuple else f"{_name(type(value))}{listed}"
    if isinstance(value, (set, frozenset)):
        return f"{_name(type(value))}({', '.join(sorted(map(inside, value)))})"
    return _object(value, inside)


def _object(value: Any, inside: Callable[[Any], str]) -> str:
    name = _name(type(value))
    if isinstance(value, nn.Module):
        held = {key: v for key, v in vars(value).items() if key not in _OF_EVERY_MODULE}
        parts = (dict(value.named_parameters(recurse=False)), dict(value.named_buffers(recurse=False)))
        return _call(name, (), {**held, **parts[0], **parts[1], **dict(value.named_children())}, inside)
    if hasattr(type(value), "__fingerprint__"):  # objects that hold more than what tells them apart
        return f"{name} of digest {_hash(value.__fingerprint__())}"
    if dataclasses.is_dataclass(value):
        return _call(name, (), {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, inside)
    slots = [slot for base in type(value).__mro__ for slot in getattr(base, "__slots__", ())]
    if hasattr(value, "__dict__") or slots:
        held = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
        return _call(name, (), {**held, **getattr(value, "__dict__", {})}, inside)
    return re.sub(" at 0x[0-9a-f]+", "", f"{name} {value!r}")


def _call(name: str, positional: Iterable[Any], keywords: Mapping[str, Any], inside: Callable[[Any], str]) -> str:
    arguments = [*map(inside, positional), *(f"{key}={inside(value)}" for key, value in keywords.items())]
    return f"{name}({', '.join(arguments)})"


def _name(named: Any) -> str:
    module = getattr(named, "__module__", None) or "builtins"
    return named.__qualname__ if module.split(".")[0] in ("builtins", "modeconn") else f"{module}.{named.__qualname__}"


def _can_be_imported(function: Callable[..., Any]) -> bool:
    found = sys.modules.get(function.__module__) if function.__module__ != "__main__" else None
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _code(function: Any, inside: Callable[[Any], str]) -> str:
    """Return what a function does: its code with that of functions within, its defaults, and what it encloses."""
    code = function.__code__
    read = [value for cell in function.__closure__ or () for value in _contents(cell)]
    read += [function.__globals__.get(name) for name in code.co_names]
    given = (function.__defaults__, function.__kwdefaults__, [value for value in read if _lasts(value)])
    return "\n".join(map(inside, (*_instructions(code), *given)))


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # an empty cell: its variable is not assigned yet
        return []


def _lasts(value: Any) -> bool:
    """Whether a function that reads this value is unlikely to change it: a setting, and no list of what it has seen."""
    if isinstance(value, tuple):
        return all(map(_lasts, value))
    is_frozen = dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen
    return is_frozen or isinstance(value, (*_PLAIN, Tensor, nn.Module, functools.partial)) or inspect.isroutine(value)


def _instructions(code: Any) -> tuple[Any, ...]:
    constants = [_instructions(part) if inspect.iscode(part) else part for part in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
