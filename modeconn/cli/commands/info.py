"""modeconn info: what a file is, or which versions are at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import modeconn
from modeconn.cli.files import describe_file


def info(
    file: Annotated[Path | None, typer.Argument(exists=True, show_default=False)] = None,
) -> None:
    """Say what a file is, or a folder of shards.

    Without a file: which versions are at work, and on which machine.

    For example:

        modeconn info curve.safetensors
    """
    typer.echo(_versions() if file is None else describe_file(file))


def _versions() -> str:
    import platform

    import numpy
    import safetensors
    import scipy

    versions = {module.__name__: module.__version__ for module in (torch, numpy, scipy, safetensors)}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return "\n".join(
        [f"modeconn {modeconn.__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
        + [f"{name} {version}" for name, version in versions.items()]
        + [where]
    )
