"""Models in files: the weights, and for models of the zoo how to build the architecture again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of
from modeconn.network.registry import build, describe
from modeconn.tools import files
from modeconn.tools.door import checked

KIND = "model"
_FORMAT = 1
_ZIP = b"PK"  # the first bytes of a file that torch.save writes
_BARE_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # and of one that it wrote before version 1.6
_HEADER = slice(8, 9)
_SAFETENSORS = b"{"


@checked
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters and buffers to a safetensors file, all or nothing.

    Args:
        model: Any module. For one of `modeconn.models` the file also says how to build it.
        path: The file; its folder must exist.

    Raises:
        OSError: If the file cannot be written.
    """
    files.write(path, KIND, model.state_dict(), {"format": _FORMAT, "model": describe(model)})


@checked
def load(path: str | os.PathLike[str], template: nn.Module | None = None) -> nn.Module:
    """Read a model, in eval mode.

    Args:
        path: A file of `save`, or one of ``torch.save(model.state_dict(), path)``, which is read without running code
            (``weights_only=True``); the state may be the one state among the entries of a larger files.
        template: A model of the same architecture, whose device the result takes; it is copied. Needed unless `save`
            wrote the file and the model is of `modeconn.models`.

    Returns:
        A new model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else, ``template`` is needed and missing, or it is of
            another architecture: the first name that differs.

    Example:
        >>> import tempfile
        >>> from modeconn import models
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     models.save(models.mlp(64, (32,), 10, seed=1), f"{folder}/a.safetensors")
        ...     models.load(f"{folder}/a.safetensors").layers[0]
        Linear(in_features=64, out_features=32, bias=True)
    """
    path = Path(path)
    if _is_pickle(path):
        state, described = _read_pickle(path), None
    else:
        state, about = files.read(path, KIND)
        described = about["model"]
    if template is not None:
        model = copy_of(template)
    elif described is not None:
        model = _build_like(described, state)
    else:
        raise ValueError(
            f"{str(path)!r} does not say how to build its model. Pass template=, a model of the same architecture "
            f"(--model on the command line)."
        )
    _check_state(path, state, model.state_dict())
    model.load_state_dict(state)
    return model.eval()


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_HEADER.stop)
    # the length that a safetensors file begins with may look like a pickle; the brace after it does not
    return start[_HEADER] != _SAFETENSORS and start.startswith((_ZIP, *_BARE_PICKLE))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or holds more than tensors and plain values, which could run code "
            f"({str(error).splitlines()[0]}). Write it with torch.save(model.state_dict(), path)."
        ) from None
    states = [one for one in (content, *_values(content)) if _is_state(one)]
    if len(states) != 1:
        raise ValueError(
            f"{str(path)!r} should hold one state dict, a mapping from names to tensors; it holds {len(states)}."
        )
    return dict(states[0])


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, Mapping) else []


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and len(content) > 0 and all(isinstance(v, Tensor) for v in content.values())


def _build_like(described: list[Any], state: Mapping[str, Tensor]) -> nn.Module:
    name, arguments = described
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    return build(name, **arguments).to(dtype)


def _check_state(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in [*expected, *state]:
        sides = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (state, expected)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"{str(path)!r} is of another architecture: "
                f"{name!r} is {sides[0]} in the file, {sides[1]} in the model."
            )
