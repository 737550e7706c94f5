"""What a batch is: its tensors, its inputs and targets, its size; and the passes over a loader of batches."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from modeconn.network.scores import comparable
from modeconn.tools import provenance
from modeconn.tools.door import is_iterable
from modeconn.tools.fingerprint import bytes_of, dense_parts
from modeconn.tools.rng import rng_state, seeded, set_rng_state
from modeconn.tools.warn import warn

END: Any = object()
"""What stands for the batch after the last one of a pass."""

_WAY_OUT = "Pass a DataLoader or a list of (inputs, targets) batches."

# -- one batch: tensors in mappings, sequences, data classes, and objects that know how to move to a device


def inputs_of(batch: Any) -> Any:
    """Return what the model reads of a batch: the inputs of a pair, what is alone in a tuple, or the whole."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) else batch


def run(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model on a batch's inputs: a tuple or list is spread by position, a mapping by keyword.

    So do `modeconn.discover` and all that runs a model.

    Raises:
        ValueError: If the model does not run on them, with what it said.
    """
    with refused(inputs):
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def refused(inputs: Any) -> Iterator[None]:
    """Turn what a model raises on inputs of another shape, type or number into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        lines = str(error).strip().splitlines()
        said = lines[0] if lines else repr(error)
        way_out = "For batches that are no (inputs, targets) pass forward=."
        if "Long, Int" in said:  # what embeddings say
            way_out = "Some inputs are places in a table, which have to be integers: let the loader yield int64."
        elif is_of_dtypes(said):
            way_out = "Let the loader yield inputs of the dtype of the network's weights, or convert the network."
        raise ValueError(
            f"the model does not run on the inputs of a batch, {described(inputs)}: {said.removesuffix('.')}. {way_out}"
        ) from error


def is_of_dtypes(said: str) -> bool:
    """Whether torch says that tensors of two dtypes met; its layers have different words for it."""
    return re.search(r"dtype|scalar type|type .* should be the same", said) is not None


def described(inputs: Any) -> str:
    """Say what tensors there are, for an error message."""
    found = ", ".join(map(_described_tensor, tensors_of(inputs)))
    return f"{type(inputs).__name__} of {found or 'no tensors'}"


def _described_tensor(tensor: Tensor) -> str:
    if tensor.is_nested:
        return f"nested {str(tensor.dtype).removeprefix('torch.')}"
    layout = "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def is_dense(value: Any) -> bool:
    """Whether a value is one tensor that is neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return both halves of a batch, as losses and attacks read it; targets of uint16 to uint64 as int64.

    Raises:
        ValueError: If it is no pair.
    """
    inputs, targets = check_pair(batch, which="one of its batches")
    return inputs, comparable(targets)


def num_examples(batch: Any) -> int:
    """Return the batch size: the first dimension of the first tensor that has one.

    Raises:
        ValueError: If the batch holds no such tensor, or no example.
    """
    if (packed := _packed(batch)) is not None:
        return int(packed.batch_sizes[0])
    refuse_empty(batch)
    for tensor in tensors_of(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(f"a batch must hold a tensor whose first dimension counts its examples, got {_kind(batch)}.")


def _packed(batch: Any) -> PackedSequence | None:
    """Return the sequences of a batch if they come first in it and are packed: their tensor counts their places."""
    while not isinstance(batch, PackedSequence):
        parts = _parts(batch)
        if not parts:
            return None
        batch = next(iter(parts.values()))
    return batch


def refuse_empty(batch: Any) -> None:
    """Raise a ValueError if the first tensor of a batch that has a dimension has no example."""
    first = next((tensor for tensor in tensors_of(batch) if tensor.dim()), None)
    if first is not None and not first.shape[0]:
        raise ValueError(f"a batch of the loader holds no example: {described(batch)}.")


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with every tensor on ``device``; objects of other kinds move by their own ``to(device)``."""
    # The CPU would read what is still being copied to it; an accelerator keeps the order of what it is told.
    is_safe = torch.device(device).type != "cpu"

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and torch.device(device).type != "meta":
            _check_values(leaf)
        if isinstance(leaf, Tensor) and leaf.is_inference():
            leaf = leaf.clone()  # one that was made in inference_mode takes no part in backward passes
        return leaf.to(device, non_blocking=is_safe) if isinstance(leaf, Tensor) else leaf.to(device)

    return _map(move, batch)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in the order in which it holds them."""
    if isinstance(batch, Tensor):
        yield batch
        return
    parts = _parts(batch)
    if parts is None and _can_move(batch):
        parts = vars(batch)
    for part in (parts or {}).values():
        yield from tensors_of(part)


def num_bytes(batch: Any) -> int:
    """Return how many bytes the tensors of a batch take."""
    return sum(part.nbytes for tensor in tensors_of(batch) for part in dense_parts(tensor))


def checksum(batch: Any) -> int:
    """Return a CRC of all tensors of a batch."""
    found = 0
    for tensor in tensors_of(batch):
        for part in bytes_of(tensor):
            found = zlib.crc32(part, found)
    return found


def _check_values(batch: Any) -> None:
    """Raise a ValueError for tensors without values, and for those with which torch cannot compute."""
    for tensor in tensors_of(batch):
        if tensor.is_nested and tensor.layout is torch.strided:
            raise ValueError(
                "a batch of the loader holds a nested tensor of the layout torch.strided, which says nothing of its "
                "sizes. Make it with layout=torch.jagged, or pad it."
            )
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise ValueError(
                f"a batch of the loader holds a tensor of {tensor.dtype}, with which torch does not compute. Let the "
                f"loader yield it as torch.bfloat16 or torch.float32."
            )
        if tensor.is_meta:
            raise ValueError(
                f"a batch of the loader holds a tensor of shape {tuple(tensor.shape)} on the device 'meta', without "
                f"values. Make data on another device: torch.set_default_device('meta') makes it without."
            )


def note_data(name: str, batch: Any) -> None:
    """Let what is being made say which data it was made of, by its first batch."""
    provenance.note_data(name, lambda: f"first batch {described(batch)}, CRC-32 {checksum(batch):08x}")


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what a mapping, sequence or data class holds, by key; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a mapping, sequence or data class like ``value`` with other parts."""
    if isinstance(value, (list, tuple)):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if isinstance(value, Mapping):
        if type(value) is dict or not isinstance(value, MutableMapping):
            return parts
        rebuilt = copy.copy(value)
        for key, part in parts.items():
            rebuilt[key] = part
        return rebuilt
    rebuilt = copy.copy(value)
    for name, part in parts.items():
        object.__setattr__(rebuilt, name, part)  # works for frozen data classes too
    return rebuilt


def _can_move(value: Any) -> bool:
    """Whether an object is neither tensor nor mapping, but moves to a device by itself."""
    return not isinstance(value, (Tensor, Mapping, type)) and callable(getattr(value, "to", None))


def _map(function: Callable[..., Any], batch: Any, *others: Any) -> Any:
    """Return a batch whose tensors, and objects that can move, are what ``function`` makes of them.

    Further batches of the same structure lend further arguments.
    """
    if isinstance(batch, Tensor) or _can_move(batch):
        return function(batch, *others)
    parts = _parts(batch)
    if parts is None:
        return batch
    theirs = [_parts(other) or {} for other in others]
    if any(other.keys() != parts.keys() for other in theirs):
        raise ValueError("these batches are of different structure.")
    return _rebuilt(batch, {key: _map(function, part, *(o[key] for o in theirs)) for key, part in parts.items()})


def examples_alone(outputs: Any, size: int) -> Any:
    """Return outputs of ``size`` examples with each example as a batch of one: ``(N, 1, ...)`` for ``(N, ...)``."""
    return _map(lambda leaf: leaf[:, None] if _has_examples(leaf, size) else leaf, outputs)


def example_at(alone: Any, place: int, size: int) -> Any:
    """Return one of what `examples_alone` made."""
    return _map(lambda leaf: leaf[place] if _has_examples(leaf, size) else leaf, alone)


def _has_examples(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _kind(value: Any) -> str:
    return f"one {type(value).__name__}" if not isinstance(value, (tuple, list)) else f"{len(value)} things"


# -- what a loader must be


def check_loader(loader: Any, *, name: str = "loader") -> Any:
    """Raise unless ``loader`` can be read more than once and begins with a pair; return its first batch.

    Raises:
        ValueError: If it is a one-shot iterator, is empty, or yields something other than ``(inputs, targets)``.
    """
    return check_pair(first_batch(loader, name=name), name=name)


def check_pair(batch: Any, *, name: str = "loader", which: str = "its first batch") -> Any:
    """Raise unless a batch of a loader, ``which`` of them, is a pair; return it."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(
            f"{name} must yield (inputs, targets) pairs, but {which} is {_kind(batch)}. {_WAY_OUT} For batches "
            f"of another kind, pass forward=, a function of model and batch, where there is such an argument."
        )
    return batch


def check_rereadable(loader: Any, *, name: str = "loader") -> None:
    """Raise unless ``loader`` can be read more than once; nothing is read."""
    if isinstance(loader, (Tensor, np.ndarray)):
        what = "tensor" if isinstance(loader, Tensor) else "array"
        raise ValueError(f"{name} must yield (inputs, targets) batches, got one {what}. {_WAY_OUT}")
    if _is_one_batch(loader):
        raise ValueError(f"{name} must yield batches, got one batch, inputs and targets. Pass a list of it, [(x, y)].")
    if isinstance(loader, Mapping):
        raise ValueError(f"{name} must yield batches, got one {type(loader).__name__}. {_WAY_OUT}")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"{name} must yield batches, got a {type(loader).__name__}, a data set of single examples. Pass "
            f"DataLoader({name}, batch_size=128), or with batch_size=None if each of its items is a batch."
        )
    if not is_iterable(loader):
        raise ValueError(f"{name} is no iterable of batches, got {type(loader).__name__}. {_WAY_OUT}")
    if isinstance(loader, Iterator):
        raise ValueError(f"{name} can be read only once (it is its own iterator). {_WAY_OUT}")


def _is_one_batch(value: Any) -> bool:
    """Whether a value is inputs and targets side by side, which taken for a list would be two batches."""
    if type(value) not in (tuple, list) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        return False  # a class of the user's own may do something when its items are asked for
    inputs, targets = value
    return 0 < targets.dim() < inputs.dim() and len(inputs) == len(targets)


def first_batch(loader: Any, *, name: str = "loader") -> Any:
    """Return the first batch of a re-iterable, whatever it holds; of an `Opened` one without reading it again."""
    if isinstance(loader, Opened):
        return loader.first
    check_rereadable(loader, name=name)
    for batch in loader:
        _check_values(batch)
        note_data(name, batch)
        return batch
    raise ValueError(f"{name} is empty: it yields no batch.")


# -- passes over a loader


def check_length(num_batches: int, expected: int) -> None:
    """Warn if a pass had another number of batches than the one that schedules of a run count on."""
    if num_batches != expected:
        warn(
            f"loader yielded {num_batches} batches in this epoch, but its length or an earlier pass promised "
            f"{expected}, which the learning rate was set by. So the run is not the one that its recipe describes; let "
            f"every pass have equally many batches."
        )


@runtime_checkable
class Rearrangeable(Protocol):
    """A loader that can also be read in other ways, as `modeconn.data.TensorLoader` can."""

    def in_order(self) -> Iterable[Any]:
        """Return a loader of the same examples, always in the same order and without augmentation."""
        ...

    def shuffled(self) -> Iterable[Any]:
        """Return a loader of the same examples, augmented alike, in an order of its own on each pass."""
        ...


def in_order(loader: Any) -> Any:
    """Return the loader without shuffling and augmentation where it knows how, else as it is."""
    return loader.in_order() if isinstance(loader, Rearrangeable) else loader


def shuffled(loader: Any) -> Any:
    """Return the loader shuffled where it knows how, else as it is."""
    return loader.shuffled() if isinstance(loader, Rearrangeable) else loader


class Opened:
    """A loader of which one pass has begun, in order, under a seed of its own.

    Its first batch was looked at; whoever reads the loader in order next goes on in the same pass, so that looking at
    data before it is used costs no pass more. Any other reading is as if nothing had been read.

    Args:
        loader: Any re-iterable of batches.
        device: Whose random state the loader may draw from.
        name: What an error message calls the loader.

    Attributes:
        first: The first batch.

    Raises:
        ValueError: If the loader can be read only once, or is empty.
    """

    def __init__(self, loader: Any, device: torch.device, *, name: str = "loader") -> None:
        check_rereadable(loader, name=name)
        self._loader, self._device = loader, device
        with seeded(0, device):
            begun = iter(in_order(loader))
            for batch in begun:
                _check_values(batch)
                note_data(name, batch)
                self.first = batch
                break
            else:
                raise ValueError(f"{name} is empty: it yields no batch.")
            self._begun: tuple[Iterator[Any], dict[str, object]] | None = begun, rng_state(device)
            if getattr(loader, "persistent_workers", False):
                self._begun = None  # all passes of such a DataLoader are one iterator: the next one ends this one

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)  # all other attributes are those of the wrapped loader

    def in_order(self) -> Iterable[Any]:
        """Return the loader in order: the first time, to be read in a seeded stretch, the pass that has begun."""
        return in_order(self._loader) if self._begun is None else _Resumed(self)

    def shuffled(self) -> Iterable[Any]:
        """Return the loader shuffled where it knows how."""
        return shuffled(self._loader)

    def _go_on(self) -> Iterator[Any]:
        if self._begun is None:
            yield from in_order(self._loader)
            return
        (begun, state), self._begun = self._begun, None
        yield self.first
        set_rng_state(state, self._device)
        yield from begun


@dataclasses.dataclass(frozen=True)
class _Resumed:
    opened: Opened

    def __iter__(self) -> Iterator[Any]:
        return self.opened._go_on()


def batches(loader: Any, device: torch.device, *, name: str = "loader") -> Iterator[Any]:
    """Yield the batches of one pass on ``device``; what can be read only once, and an empty pass, is an error."""
    check_rereadable(loader, name=name)
    count = 0
    for batch in loader:
        if batch is None:  # would read as the end of a pass
            raise ValueError(f"{name} must yield batches, but one of them is None. {_WAY_OUT}")
        count += 1
        yield to_device(batch, device)
    if not count:
        raise ValueError(f"{name} yielded nothing on this pass, though it is no one-shot iterator. {_WAY_OUT}")


def endless_batches(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on ``device``, pass after pass; one of a single example comes joined to the next, if shapes fit."""
    waiting: list[Any] = []
    while True:
        for batch in batches(loader, device):
            waiting = joined(*waiting, batch) if waiting else [batch]
            while len(waiting) > 1 or (waiting and num_examples(waiting[0]) > 1):
                yield waiting.pop(0)


def first_examples(data: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """Yield the first batches, together no more than ``limit`` examples: the last one may be cut. None: all."""
    room = math.inf if limit is None else limit
    for batch in data:
        size = num_examples(batch)
        yield batch if size <= room else part_of(batch, slice(int(room)))
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
        waiting[-1:] = joined(waiting[-1], batch) if is_joined else [*waiting[-1:], batch]
        while len(waiting) > 1 + (num_examples(waiting[-1]) == 1):
            yield waiting.pop(0)
    yield from joined(*waiting) if len(waiting) == 2 else waiting


def joined(first: Any, second: Any) -> list[Any]:
    """Return one batch of two, or both as they are where their shapes do not fit."""
    try:
        return [_map(_concatenated, first, second)]
    except (RuntimeError, ValueError, TypeError):
        return [first, second]


def _concatenated(first: Any, second: Any) -> Tensor:
    return torch.cat([first, second])  # a TypeError for objects that are no tensors: such batches are not joined


def part_of(batch: Any, chosen: slice) -> Any:
    """Return some of the examples of a batch; an object that cannot be cut stays whole."""
    size = num_examples(batch)

    return _map(lambda leaf: _rows(leaf, chosen) if _has_examples(leaf, size) else leaf, batch)


def _rows(tensor: Tensor, chosen: slice) -> Tensor:
    if tensor.layout in (torch.strided, torch.jagged):
        return tensor[chosen]
    rows = torch.arange(len(tensor), device=tensor.device)[chosen]
    return tensor.to_sparse_coo().index_select(0, rows).to_sparse(layout=tensor.layout)
