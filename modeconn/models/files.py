"""Models in files: the weights, and for models of the zoo how to build the architecture again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.models.states import choose, materialised, states_of_pickle, states_of_safetensors
from modeconn.network.copies import copy_of
from modeconn.network.registry import rebuild
from modeconn.network.saving import KIND, save
from modeconn.network.weights import are_finite
from modeconn.tools import files, provenance
from modeconn.tools.door import checked

__all__ = ["load", "save"]

_ZIP = b"PK"  # the first bytes of a file that torch.save writes
_BARE_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # and of one that it wrote before version 1.6
_HEADER = slice(8, 9)
_SAFETENSORS = b"{"


@checked
def load(path: str | os.PathLike[str], template: nn.Module | None = None, *, entry: str | None = None) -> nn.Module:
    """Read a model, in eval mode.

    Names may carry what wrappers add: those of DataParallel, ``torch.compile``, Lightning and averaged models. Counters
    of batches may be missing, as torch lets them. All that differs is said at once.

    Args:
        path: A file of `save`; one of ``torch.save``, read without running code (``weights_only=True``), that holds a
            state dict, alone or among epochs, arguments and other state dicts; or a safetensors file of any program.
        template: A model of the same architecture, whose device the result takes; it is copied. Needed unless `save`
            wrote the file and the model is of `modeconn.models`.
        entry: Where in the file the state dict stands, such as ``"ema"`` or ``"models.student"``; needed if several
            are of this architecture.

    Returns:
        A new model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else or numbers that are not finite, ``template`` or
            ``entry`` is needed and missing, or it is of another architecture.

    Example:
        >>> import tempfile
        >>> from modeconn import models
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     models.save(models.mlp(64, (32,), 10, seed=1), f"{folder}/a.safetensors")
        ...     models.load(f"{folder}/a.safetensors").layers[0]
        Linear(in_features=64, out_features=32, bias=True)
    """
    path, described, made_by = Path(path), None, None
    is_foreign = False
    if _is_pickle(path):
        states = states_of_pickle(path)
    elif is_foreign := not files.is_ours(path):
        states = states_of_safetensors(path)
        described = (files.description(path) or {}).get("model")
    else:
        with files.opened(path, KIND) as (state, about):
            states, described, made_by = {"": state}, about["model"], about.get(provenance.ATTRIBUTE)
    if template is not None:
        model = copy_of(template)
    elif described is not None:
        model = _build_like(path, described, states[""])
    else:
        raise ValueError(
            f"{str(path)!r} does not say how to build its model. Pass template=, a model of the same architecture."
        )
    own = model.state_dict()
    place, names = choose(path, states, own, entry)
    tensors = materialised(path, names) if is_foreign else {new: states[place][name] for name, new in names.items()}
    _check_finite(path, {name: tensors[name] for name, _ in model.named_parameters() if name in tensors})
    _load(path, model, own | tensors)
    provenance.keep(model, made_by)
    return model.eval()


def _load(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        model.load_state_dict(state, strict=False)  # names were compared before; extra state may be missing
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise files.damaged(path, error) from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_HEADER.stop)
    # the length that a safetensors file begins with may look like a pickle; the brace after it does not
    return start[_HEADER] != _SAFETENSORS and start.startswith((_ZIP, *_BARE_PICKLE))


def _build_like(path: Path, described: Any, state: Mapping[str, Tensor]) -> nn.Module:
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    try:
        return rebuild(described, state, dtype)
    except (TypeError, ValueError) as error:
        raise files.damaged(path, error) from error


def _check_finite(path: Path, parameters: Mapping[str, Tensor]) -> None:
    for name, tensor in parameters.items():
        if not are_finite(tensor):
            raise ValueError(f"{str(path)!r} holds numbers that are not finite, in {name!r}: its training failed.")
