"""Errors of the package's own, and warnings that point at the caller's line, however deep they arise."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from modeconn.tools.processes import joined

_INSIDE = (str(Path(__file__).parent.parent), contextlib.__file__)


def is_of_package(error: BaseException) -> bool:
    """Whether an error was raised by a line of the package itself, and so is a sentence for its user."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(_INSIDE[0])


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of the package from which it was called; of processes that share a call, the first."""
    if not joined().is_first:
        return
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth + 1)
