"""The tensors of one model in files, in one or in shards: names and shapes at once, values when they are asked for."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from modeconn.network.weights import are_finite
from modeconn.tools import provenance
from modeconn.tools.door import check, shortened
from modeconn.tools.files import check_regular, description, dtype_named, metadata_of
from modeconn.tools.shown import Shown
from modeconn.tools.warn import warn

_INDEX = ".safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_SHOWN = 10


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, without its values.

    Args:
        shape: Its shape.
        dtype: Its type.
        file: The file that holds it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(Shown):
    """The tensors of one model: a safetensors file, a folder of them, or the state dict in a file of ``torch.save``.

    A folder is one as Hugging Face has it: ``model.safetensors``, or shards and a ``model.safetensors.index.json`` that
    says which tensor is in which. Opening reads the headers alone.

    Args:
        path: The file or folder.

    Attributes:
        path: The same.
        entries: What there is, by name, in the order of the files.

    Raises:
        FileNotFoundError: If there is no such file or folder, or a shard is missing.
        ValueError: If a file is damaged, a folder holds no weights, or its index says what is not so.

    Example:
        >>> import tempfile, safetensors.torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, f"{folder}/model.safetensors")
        ...     TensorFiles(folder)
        TensorFiles(1 tensors, 24 bytes, in 1 file)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check("path", path, str | os.PathLike[str])
        self.path = Path(path)
        check_regular(self.path)
        self._state: Mapping[str, Tensor] | None = None
        self._begins: dict[str, int] = {}  # where in its file a tensor begins
        self._states: dict[Path, tuple[int, ...]] = {}  # what tells whether a file was replaced
        if self.path.is_dir():
            self.entries = self._of_folder()
        elif not self.path.exists():
            raise FileNotFoundError(f"there is no file or folder {str(path)!r}.")
        elif self.path.name.endswith(_INDEX):
            self.entries = self._of_index(self.path)
        elif self.path.suffix == ".safetensors":
            self.entries = self._of_file(self.path)
        else:
            self.entries = self._of_pickle()

    def __repr__(self) -> str:
        count = len({entry.file for entry in self.entries.values()})
        return (
            f"TensorFiles({len(self.entries)} tensors, {self.num_bytes:,} bytes, in {count} file"
            f"{'s' if count > 1 else ''})"
        )

    @property
    def num_bytes(self) -> int:
        """How many bytes all tensors take together."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU.

        Raises:
            ValueError: If there is none of this name, or its file is damaged.
        """
        if name not in self.entries:
            raise ValueError(f"{str(self.path)!r} holds no tensor {name!r}.")
        if self._state is not None:
            return self._state[name].detach()
        file = self.entries[name].file
        try:
            if _state(file) != self._states[file]:
                raise ValueError(f"{str(file)!r} was replaced while it was read. Give the command again.")
            return _values(self.entries[name], self._begins[name])
        except OSError as error:
            raise ValueError(f"{str(file)!r} cannot be read any more ({shortened(error, 200)}).") from error

    @property
    def architecture(self) -> Any:
        """How the file says that its model is built, as `modeconn.models.describe` does; None if it does not."""
        return (description(self.path) or {}).get("model") if self.path.is_file() else None

    def beside_weights(self) -> list[Path]:
        """Return the other files of a folder, such as its configuration and tokenizer; none of a single file."""
        if not self.path.is_dir():
            return []
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith((*_WEIGHTS, ".index.json"))
        ]

    def warn_of_statistics(self, done: str) -> None:
        """Warn if there are running statistics, which are "averaged" or "interpolated" as weights are."""
        if any(name.endswith("running_var") for name in self.entries):
            warn(
                f"statistics of batch norm are {done} like weights, and are not those of the network that is written: "
                f"recalibrate it with training data, modeconn.recalibrate."
            )

    def check_like(self, other: TensorFiles) -> None:
        """Raise a ValueError unless another model has the same names and shapes; all that differs is said."""
        missing, unexpected, mismatching = self.compared(other)
        said = []
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                said.append(f"{len(names)} {what}: {listed(names)}")
        if mismatching:
            shapes = [f"{name} {self.entries[name].shape} and {other.entries[name].shape}" for name in mismatching]
            said.append(f"{len(mismatching)} of other shapes: {listed(shapes)}")
        if said:
            raise ValueError(
                f"{str(other.path)!r} does not hold the model of {str(self.path)!r}: {'; '.join(said)}. Both must be "
                f"of one architecture."
            )

    def compared(self, other: TensorFiles) -> tuple[list[str], list[str], list[str]]:
        """Return the names that are missing in another model, those only there, and those whose shapes differ."""
        missing = [name for name in self.entries if name not in other.entries]
        unexpected = [name for name in other.entries if name not in self.entries]
        mismatching = [
            name
            for name, entry in self.entries.items()
            if name in other.entries and other.entries[name].shape != entry.shape
        ]
        return missing, unexpected, mismatching

    def _of_folder(self) -> dict[str, Entry]:
        indices = sorted(self.path.glob(f"*{_INDEX}"))
        files = sorted(path for path in self.path.glob("*.safetensors") if not path.name.startswith("."))
        if len(indices) == 1:
            return self._of_index(indices[0])
        if not indices and len(files) == 1:
            return self._of_file(files[0])
        if not files:
            raise ValueError(
                f"the folder {str(self.path)!r} holds no safetensors files. Name the file of weights itself."
            )
        raise ValueError(
            f"the folder {str(self.path)!r} holds {len(files)} safetensors files and {len(indices)} indices, so it is "
            f"not known which of them make a model. Name the file, or the index, itself."
        )

    def _of_index(self, index: Path) -> dict[str, Entry]:
        try:
            told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): index.with_name(file) for name, file in told.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{str(index)!r} is no index of shards: it has no 'weight_map' of file names.") from error
        shards = dict.fromkeys(places.values())
        if lost := [shard.name for shard in shards if not shard.is_file()]:
            raise FileNotFoundError(f"{str(index)!r} names shards that are missing: {listed(lost)}.")
        found: dict[str, Entry] = {}
        for shard in shards:
            held = self._of_file(shard)
            wrong = [name for name, place in places.items() if place == shard and name not in held]
            wrong += [name for name in held if places.get(name) != shard]
            if wrong:
                raise ValueError(f"{str(index)!r} is not right about {shard.name!r}: it differs in {listed(wrong)}.")
            found |= held
        return found

    def _of_file(self, file: Path) -> dict[str, Entry]:
        try:
            found = {}
            with safetensors.safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    part = handle.get_slice(name)
                    found[name] = Entry(tuple(part.get_shape()), dtype_named(part.get_dtype()), file)
            self._begins |= _begins(file)
            self._states[file] = _state(file)
        except (safetensors.SafetensorError, RuntimeError, ValueError, OverflowError, OSError, AttributeError) as error:
            raise ValueError(f"{str(file)!r} is truncated or no safetensors file ({shortened(error, 200)}).") from error
        return found

    def _of_pickle(self) -> dict[str, Entry]:
        try:
            is_mapped = zipfile.is_zipfile(self.path)  # files of torch before 1.6 are read at once
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_mapped)
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ValueError(
                f"{str(self.path)!r} is no safetensors file, and no file of torch.save that holds tensors alone "
                f"({lines[0][:200]})."
            ) from error
        if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(
                f"{str(self.path)!r} holds more than one state dict of tensors. Write it with "
                f"torch.save(model.state_dict(), path)."
            )
        self._state = state
        return {name: Entry(tuple(tensor.shape), tensor.dtype, self.path) for name, tensor in state.items()}


def in_dtype(entries: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, Entry]:
    """Return entries with another type of their numbers of floating point, if one is given."""
    if dtype is None:
        return dict(entries)
    if dtype not in _WRITTEN:
        known = ", ".join(str(one).removeprefix("torch.") for one in _WRITTEN)
        raise ValueError(f"dtype= must be one of {known}, got {dtype}.")
    return {name: replace(x, dtype=dtype) if x.dtype.is_floating_point else x for name, x in entries.items()}


_WRITTEN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return a type in which tensors of this type are computed: single precision at least."""
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another type.

    Raises:
        ValueError: If it holds numbers that are too large for it.
    """
    found = tensor.to(dtype)
    if found.is_floating_point() and found.dtype.itemsize in (2, 4) and found.dtype.itemsize < tensor.dtype.itemsize:
        if not are_finite(found) and are_finite(tensor):
            raise ValueError(
                f"{name!r} holds numbers up to {float(tensor.abs().max()):.1e}, too large for "
                f"{str(dtype).removeprefix('torch.')}. Pass another dtype=."
            )
    return found


def _begins(file: Path) -> dict[str, int]:
    """Return where in a safetensors file, which was looked at, each tensor begins."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}


def _state(file: Path) -> tuple[int, ...]:
    about = file.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _values(entry: Entry, begin: int) -> Tensor:
    """Read a tensor into memory of its own: pages of a mapped file would count as memory of this process."""
    values = torch.empty(entry.num_bytes, dtype=torch.uint8, device="cpu")
    with entry.file.open("rb", buffering=0) as file:
        file.seek(begin)
        view, done = memoryview(values.numpy()), 0
        while done < entry.num_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise OSError("it ends too early")
            done += count
    return values.view(entry.dtype).reshape(entry.shape)


def made_by(path: Path) -> dict[str, Any] | None:
    """Return how a safetensors file of this package says that it was made; None for those of others."""
    try:
        found = json.loads((metadata_of(path) or {}).get(provenance.ATTRIBUTE, "null"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def listed(names: list[str], limit: int | None = _SHOWN) -> str:
    """Return names as words, so many of them; all without a limit."""
    more = f" and {len(names) - limit} more" if limit is not None and len(names) > limit else ""
    return ", ".join(names[:limit]) + more
