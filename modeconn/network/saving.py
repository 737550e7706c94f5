"""One network written to a file, with how to build its architecture again."""

from __future__ import annotations

import os

from torch import Tensor, nn

from modeconn.network.registry import describe
from modeconn.network.weights import are_finite
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
        ValueError: If parameters or buffers have no values, or parameters hold numbers that are not finite: a file with
            them could not be loaded.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(
                f"{name!r} of the model is on the device 'meta', without values: there is nothing to write."
            )
    for name, parameter in model.named_parameters():
        if not are_finite(parameter):
            raise ValueError(
                f"{name!r} of the model holds numbers that are not finite: its training failed, and modeconn would not "
                f"read the file again. torch.save(model.state_dict(), PATH) keeps it as it is."
            )
    about = {"format": _FORMAT, "model": describe(model), **provenance.entry(model)}
    files.write(path, KIND, model.state_dict(), about)
