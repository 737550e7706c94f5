"""Write a model of any size: shard by shard, all or nothing."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from modeconn.tensor_files.reading import Entry, TensorFiles
from modeconn.tools import provenance
from modeconn.tools.files import ARCHITECTURE, write_content
from modeconn.tools.processes import writes
from modeconn.tools.progress import progress_bar
from modeconn.tools.writing import held

SHARD_BYTES = 5 * 10**9


def planned(entries: Mapping[str, Entry], shard_bytes: int) -> list[list[str]]:
    """Return which tensors go into which shard: in their order, each shard at most so large if it holds several."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.num_bytes
    return shards


def write(
    out: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    make: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    like: TensorFiles | None = None,
    instead: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write tensors that are made one by one, of which no more than one is in memory.

    Args:
        out: A file that ends in ``.safetensors``, which takes all, or a folder, which gets shards and an index, or one
            ``model.safetensors`` if that is small enough. It takes its name when everything is written.
        entries: Names, shapes and types of what is made.
        make: Returns the tensor of a name.
        shard_bytes: How large a shard may be; a tensor that is larger has one of its own.
        like: The model whose other files, such as its configuration, a folder gets too; a file says its architecture if
            that one does, and both hold the same names.
        instead: What some of them say in place of what they said, by name.
        overwrite: Whether to replace what ``out`` holds.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a setting makes no sense.
        OSError: If ``out`` exists and is not to be overwritten, or cannot be written; then it is as it was.
    """
    target = Path(out)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got shard_bytes={shard_bytes}.")
    if not writes():  # of processes that share a command line, the first alone does
        return target
    check_target(target, overwrite=overwrite)
    is_file = target.suffix == ".safetensors"
    shards = [list(entries)] if is_file else planned(entries, shard_bytes)
    names = [_name(number, len(shards)) for number in range(len(shards))]
    is_same = like is not None and like.entries.keys() == entries.keys()  # not if weights were untied
    architecture = like.architecture if is_same and len(shards) == 1 else None
    bar = progress_bar(total=len(entries), show=progress, desc="write", unit="tensor")
    with held(target):
        _remove_left(target)
        staged = _staged(target)
        try:
            staged.mkdir()
            with bar:
                for file, members in zip(names, shards, strict=True):
                    _write_shard(staged / file, members, entries, make, bar.update, architecture)
            for path in () if like is None else like.beside_weights():
                if path.name in instead:
                    (staged / path.name).write_text(instead[path.name], encoding="utf-8")
                else:
                    shutil.copyfile(path, staged / path.name)
            if len(shards) > 1:
                _write_index(staged / "model.safetensors.index.json", names, shards, entries)
            _take_place(staged / names[0] if is_file else staged, target)
        except OSError as error:
            raise type(error)(
                f"cannot write {str(target)!r} ({error.strerror or error}). Choose a place that can be written to."
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return target


_TOKEN = 12  # hexadecimal digits


def _staged(target: Path) -> Path:
    """Return a name beside the target for what has not taken its place yet."""
    return target.with_name(f".{target.name}.{secrets.token_hex(_TOKEN // 2)}.tmp")


def _remove_left(target: Path) -> None:
    """Remove what runs left that were killed while they wrote the same target, which this one holds now."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{{_TOKEN}}}\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def check_target(out: str | os.PathLike[str], *, overwrite: bool, read: Iterable[Any] = ()) -> None:
    """Raise unless a model can be written there without the loss of anything else.

    Args:
        out: Where to write.
        overwrite: Whether a model that is there is to be replaced.
        read: The models that are read.

    Raises:
        FileExistsError: If there is something, and it is not to be replaced.
        ValueError: If it holds more than a model, or one of the models that are read.
    """
    target = Path(out)
    if target.name in ("", ".."):
        raise ValueError(f"out must name a file or folder of its own, got {str(out)!r}.")
    if target.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"models are written as safetensors: {str(out)!r} is no name for a folder or such a file.")
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{str(out)!r} exists. Choose another name, or pass overwrite=True to replace it.")
    if not target.is_dir():
        return
    whole = target.resolve()
    inside = [path for path in read if whole in Path(path).resolve().parents]
    held = list(target.iterdir())
    is_of_a_model = not held or any(path.suffix == ".safetensors" for path in held)
    if inside or any(path.is_dir() for path in held) or not is_of_a_model:
        what = f"{str(inside[0])!r}, which is read" if inside else "more than a model, or none"
        raise ValueError(f"the folder {str(out)!r} holds {what}, and would be replaced. Choose another name.")


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(
    path: Path,
    names: Sequence[str],
    entries: Mapping[str, Entry],
    make: Callable[[str], Tensor],
    done: Callable[[], Any],
    architecture: Any,
) -> None:
    """Write one file, of whose tensors one is in memory at a time."""
    about = provenance.now()
    metadata = {"format": "pt"}
    if about is not None:
        metadata[provenance.ATTRIBUTE] = json.dumps(about)
    if architecture is not None:
        metadata[ARCHITECTURE] = json.dumps(architecture)

    def made(name: str) -> Tensor:
        done()
        return make(name)

    with path.open("wb") as file:
        write_content(file, {name: (entries[name].shape, entries[name].dtype) for name in names}, metadata, made)
        file.flush()
        os.fsync(file.fileno())


def _write_index(path: Path, names: list[str], shards: list[list[str]], entries: Mapping[str, Entry]) -> None:
    places = {name: file for file, members in zip(names, shards, strict=True) for name in members}
    index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())}, "weight_map": places}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _take_place(staged: Path, target: Path) -> None:
    """Give what was written its name; of a folder that is replaced, files that are no weights stay."""
    if target.is_dir() and staged.is_dir():
        for path in target.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
                if not (staged / path.name).exists():
                    shutil.copyfile(path, staged / path.name)
    if not (target.is_dir() and staged.is_dir()):
        os.replace(staged, target)
        return
    old = _staged(target)
    os.rename(target, old)
    try:
        os.rename(staged, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
