"""Data as any re-iterable of ``(inputs, targets)``: checked at the door, moved to the model's device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Loader = Iterable[tuple[Tensor, Tensor]]

_WAY_OUT = "Pass a DataLoader or a list of (inputs, targets) batches."


def check_loader(loader: Any, *, name: str = "loader") -> Any:
    """Raise unless ``loader`` can be read more than once and begins with a pair; return its first batch.

    Raises:
        ValueError: If it is a one-shot iterator, is empty, or yields something other than ``(inputs, targets)``.
    """
    return check_pair(first_batch(loader, name=name), name=name)


def check_pair(batch: Any, *, name: str = "loader") -> Any:
    """Raise unless a loader's first batch is a pair; return it."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        what = f"one {type(batch).__name__}" if not isinstance(batch, (tuple, list)) else f"{len(batch)} things"
        raise ValueError(f"{name} must yield (inputs, targets) pairs, but its first batch is {what}. {_WAY_OUT}")
    return batch


def check_rereadable(loader: Any, *, name: str = "loader") -> None:
    """Raise unless ``loader`` can be read more than once; nothing is read."""
    if isinstance(loader, Tensor):
        raise ValueError(f"{name} must yield (inputs, targets) batches, got one tensor. {_WAY_OUT}")
    if isinstance(loader, Mapping):
        raise ValueError(f"{name} must yield batches, got one {type(loader).__name__}. {_WAY_OUT}")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ValueError(f"{name} is no iterable of batches, got {type(loader).__name__}. {_WAY_OUT}")
    if isinstance(loader, Iterator):
        raise ValueError(f"{name} can be read only once (it is its own iterator). {_WAY_OUT}")


def first_batch(loader: Any, *, name: str = "loader") -> Any:
    """Return the first batch of a re-iterable, whatever it holds."""
    check_rereadable(loader, name=name)
    for batch in loader:
        return batch
    raise ValueError(f"{name} is empty: it yields no batch.")


def inputs_of(batch: Any) -> Any:
    """Return what the model reads of a batch: the inputs of a pair, what is alone in a tuple, or the whole."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) else batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch (nested tuples, lists, dicts) to ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def batches(loader: Any, device: torch.device, *, name: str = "loader") -> Iterator[Any]:
    """Yield the batches of one pass on ``device``; what can be read only once, and an empty pass, is an error."""
    check_rereadable(loader, name=name)
    count = 0
    for batch in loader:
        count += 1
        yield to_device(batch, device)
    if not count:
        raise ValueError(f"{name} yielded nothing on this pass, though it is no one-shot iterator. {_WAY_OUT}")


def endless_batches(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on ``device``, pass after pass; one of a single example comes joined to the next, if shapes fit."""
    waiting: list[Any] = []
    while True:
        for batch in batches(loader, device):
            waiting = _joined(*waiting, batch) if waiting else [batch]
            while len(waiting) > 1 or (waiting and num_examples(waiting[0]) > 1):
                yield waiting.pop(0)


def num_examples(inputs: Any) -> int:
    """Return the batch size of inputs: the first dimension of their first tensor."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return num_examples(next(iter(values)))


def first_examples(data: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """Yield the first batches, together no more than ``limit`` examples: the last one may be cut. None: all."""
    room = math.inf if limit is None else limit
    for batch in data:
        size = num_examples(batch)
        yield batch if size <= room else _first(batch, int(room))
        room -= size
        if room <= 0:
            return


def without_singles(data: Iterable[Any]) -> Iterator[Any]:
    """Join each batch of one example, which has no variance, to the next one, and the last to the one before.

    Where the shapes of their inputs differ, it stays alone. Batches of one throughout become pairs.

    Example:
        >>> [x.tolist() for x in without_singles([torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([4])])]
        [[1, 2, 3, 4]]
    """
    waiting: list[Any] = []  # a batch that may have to take in a last one, and a single one behind it
    for batch in data:
        is_joined = bool(waiting) and num_examples(waiting[-1]) == 1
        waiting[-1:] = _joined(waiting[-1], batch) if is_joined else [*waiting[-1:], batch]
        while len(waiting) > 1 + (num_examples(waiting[-1]) == 1):
            yield waiting.pop(0)
    yield from _joined(*waiting) if len(waiting) == 2 else waiting


def _joined(first: Any, second: Any) -> list[Any]:
    """Return one batch of two, or both as they are where their shapes do not fit."""
    try:
        return [_concatenated(first, second)]
    except (RuntimeError, ValueError):
        return [first, second]


def _concatenated(first: Any, second: Any) -> Any:
    """Concatenate the tensors of two batches (nested tuples, lists, dicts)."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return {key: _concatenated(value, second[key]) for key, value in first.items()}
    if isinstance(first, (tuple, list)):
        both = [_concatenated(*pair) for pair in zip(first, second, strict=True)]
        return type(first)(*both) if hasattr(first, "_fields") else type(first)(both)
    return first


def _first(batch: Any, size: int) -> Any:
    """Return the first ``size`` examples of a batch (nested tuples, lists, dicts of tensors)."""
    if isinstance(batch, Tensor):
        return batch[:size]
    if isinstance(batch, dict):
        return {key: _first(value, size) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        cut = [_first(value, size) for value in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return batch
