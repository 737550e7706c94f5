"""How much memory a piece of work needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """The most memory in use during a block beyond what was in use when it began, None where that cannot be known."""

    num_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the memory that a block needs; the number is there at its end.

    On a CUDA device it is what torch allocates there. Otherwise it is the resident memory of the whole process, which
    Linux alone tells, of all libraries. What the process holds free is handed back to the system first, where its C
    library can: a block that uses it again would seem to need nothing.

    Args:
        device: Where the work is done.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     _ = torch.ones(10_000_000)  # 40 MB
        >>> peak.num_bytes is None or 39e6 < peak.num_bytes < 60e6
        True
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    _hand_back()
    if _forget_peak():
        before = _peak_of_process()
        yield peak
        peak.num_bytes = _peak_of_process() - before
    else:
        yield peak


def _hand_back() -> None:
    """Give free memory back to the system; nothing happens with a C library that cannot."""
    gc.collect(1)  # what has just become garbage; to look at all objects of a large process takes seconds
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    """Let the peak of resident memory be what is resident now; return whether the system can."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_of_process() -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
