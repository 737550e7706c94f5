"""One network written to a file, with how to build its architecture again."""

from __future__ import annotations

import os

from torch import nn

from modeconn.network.registry import describe
from modeconn.tools import files, provenance
from modeconn.tools.door import checked

KIND = "model"
_FORMAT = 1


@checked
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters and buffers to a safetensors file, all or nothing.

    Args:
        model: Any module. For one of `modeconn.models` the file also says how to build it.
        path: The file; its folder must exist.

    Raises:
        OSError: If the file cannot be written.
    """
    about = {"format": _FORMAT, "model": describe(model), **provenance.entry(model)}
    files.write(path, KIND, model.state_dict(), about)
