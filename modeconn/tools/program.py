"""How the program ``modeconn`` takes signals: in silence while it imports, as an interruption while it works.

The package imports this module first. It imports nothing of size, and changes nothing where modeconn is a library.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def is_program() -> bool:
    """Whether this process is the program ``modeconn`` or ``python -m modeconn``."""
    return Path(sys.argv[0] if sys.argv else "").stem == "modeconn" or _runs_module(sys.orig_argv)


def _runs_module(command: list[str]) -> bool:
    return ("-m", "modeconn") in itertools.pairwise(command)


def end_in_silence() -> None:
    """Let Ctrl-C end the program at once, without a traceback, until `interrupt` is called."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if is_program() and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGTERM") and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


was_terminated = False
"""Whether SIGTERM came, so that the exit status says so."""


def _terminated(number: int, frame: Any) -> None:
    global was_terminated
    was_terminated = True
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background, which Ctrl-C is not for
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


end_in_silence()
