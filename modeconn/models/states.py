"""State dicts as people keep them: under names of wrappers, among other things, in files of other programs."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from modeconn.tools.door import shortened
from modeconn.tools.files import dtype_named
from modeconn.tools.warn import warn

State = Mapping[str, Any]
"""Tensors by name, and what modules keep as extra state."""

_DEPTH = 3
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # with which torch makes its messages bold
_COMPILED = "_orig_mod."  # what torch.compile puts in front of names, wherever a module was compiled
_EXTRA = "_extra_state"
_COUNTERS = ("num_batches_tracked",)  # which torch lets be missing, too
_SHOWN = 10
_ODD = (TypeError, AttributeError)  # what a damaged pickle may end in, too
_PLAIN_CLASSES = [argparse.Namespace, pathlib.PosixPath, pathlib.PureWindowsPath, np.dtype, np.ndarray]
"""Classes that checkpoints often hold beside tensors, and that run nothing when they are read."""


def states_of_pickle(path: Path) -> dict[str, State]:
    """Return all state dicts in a file of ``torch.save``, by where they stand in it, read without running code.

    Raises:
        ValueError: If it is damaged, or holds what could run code.
    """
    try:
        with torch.serialization.safe_globals([*_PLAIN_CLASSES, *_numpy_scalars()]):
            content = _loaded(path)
    except torch.OutOfMemoryError:
        raise
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, *_ODD) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        said = _ESCAPES.sub("", lines[0]).partition(". This file can still")[0]
        raise ValueError(
            f"{str(path)!r} is damaged, or holds more than tensors and plain values, which could run code "
            f"({said}). Write it with torch.save(model.state_dict(), path)."
        ) from None
    return dict(_states_in(content, "", _DEPTH))


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # written by torch before 1.6


def _numpy_scalars() -> list[Any]:
    """Return what a pickled number of numpy is made of."""
    reconstruct = np.float64(0).__reduce__()[0]
    return [reconstruct, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}]


def _states_in(content: Any, place: str, depth: int) -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping):
        return
    if _is_state(content):
        yield place, content
    elif depth:
        for name, value in content.items():
            yield from _states_in(value, f"{place}.{name}" if place else str(name), depth - 1)


def _is_state(content: Mapping[Any, Any]) -> bool:
    tensors = [value for name, value in content.items() if not str(name).endswith(_EXTRA)]
    return bool(tensors) and all(isinstance(value, Tensor) for value in tensors) and all(map(_is_text, content))


def _is_text(name: Any) -> bool:
    return isinstance(name, str)


def states_of_safetensors(path: Path) -> dict[str, State]:
    """Return the one state dict of a safetensors file of another program, each tensor on the meta device.

    Raises:
        ValueError: If it is damaged.
    """
    found = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=dtype_named(part.get_dtype()), device="meta")
    except (safetensors.SafetensorError, RuntimeError, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file ({shortened(error, 600)}).") from error
    return {"": found} if found else {}


def materialised(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Read tensors of a safetensors file under new names, given by the names in the file."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {new: file.get_tensor(name) for name, new in names.items()}


def choose(path: Path, states: Mapping[str, State], expected: State, entry: str | None) -> tuple[str, dict[str, str]]:
    """Choose the state dict that a model is to take, and say which of its names are which of the model's.

    Args:
        path: The file, for errors.
        states: All state dicts in it, by place.
        expected: The model's own.
        entry: Place of the one to take; None for the only one, or the only one that fits.

    Returns:
        Its place, and by name in the file the name in the model.

    Raises:
        ValueError: If there is none, several fit, or what is chosen does not: with all differences.
    """
    if entry is not None and entry not in states:
        raise ValueError(f"{str(path)!r} has no entry {entry!r}; its state dicts are {_listed(states)}.")
    if not states:
        raise ValueError(f"{str(path)!r} should hold a state dict, a mapping from names to tensors; it holds none.")
    candidates = {entry: states[entry]} if entry is not None else states
    renamed = {place: _renamed(state, expected) for place, state in candidates.items()}
    problems = {place: _problems(states[place], names, expected) for place, names in renamed.items()}
    fitting = [place for place, found in problems.items() if not found]
    if len(fitting) > 1:
        raise ValueError(
            f"{str(path)!r} holds several state dicts of this architecture: {_listed(fitting)}. Say which with entry=."
        )
    if not fitting:
        place = min(problems, key=lambda one: len(problems[one]))
        where = f" (its entry {place!r})" if place else ""
        others = f" It has other state dicts, which fit less: {_listed(set(problems) - {place})}." * (len(problems) > 1)
        raise ValueError(f"{str(path)!r}{where} is of another architecture: {_some(problems[place])}.{others}")
    (place,) = fitting
    left = [name for name in states[place] if name not in renamed[place] and not _is_counter(states[place][name])]
    if left:
        warn(f"{str(path)!r} holds more than the model: {_listed(left)} were left out.")
    return place, renamed[place]


def _renamed(state: State, expected: State) -> dict[str, str]:
    """Return which names of a state are which of the model's, once wrappers' additions are left out."""
    plain = {name: name.replace(_COMPILED, "") for name in state}
    bare = {name.replace(_COMPILED, ""): name for name in expected}
    prefixes = {""}
    for name in plain.values():
        prefixes |= {name[: len(name) - len(end)] for end in bare if name.endswith(f".{end}")}
    best = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + end in set(plain.values()) for end in bare))
    if not best:
        return {name: bare.get(text, name) for name, text in plain.items()}
    return {
        name: bare.get(text.removeprefix(best), text.removeprefix(best))
        for name, text in plain.items()
        if text.startswith(best)
    }


def _problems(state: State, names: Mapping[str, str], expected: State) -> list[str]:
    """Return all differences between a state under the model's names and the model's own."""
    given = {new: state[name] for name, new in names.items()}
    found = []
    for name in [*expected, *(name for name in given if name not in expected)]:
        if name.endswith(_EXTRA) or (name not in given and name.rpartition(".")[2] in _COUNTERS):
            continue
        sides = [tuple(side[name].shape) if name in side else "missing" for side in (given, expected)]
        if sides[0] != sides[1]:
            found.append(f"{name!r} is {sides[0]} in the file, {sides[1]} in the model")
        elif _is_number(given[name]) != _is_number(expected[name]):
            found.append(f"{name!r} is {given[name].dtype} in the file, {expected[name].dtype} in the model")
    return found


def _is_number(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def _is_counter(value: Any) -> bool:
    """Whether an entry is a single integer, such as how many models were averaged."""
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()


def _listed(names: Any) -> str:
    shown = sorted(map(str, names))
    return ", ".join(map(repr, shown[:_SHOWN])) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more differences" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
