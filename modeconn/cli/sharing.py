"""A command that a launcher such as ``torchrun`` gave to several processes, which share its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from modeconn.tools import processes


@contextmanager
def launched_together() -> Iterator[None]:
    """Make a group of the processes of a launcher for the block, and keep it until what went wrong has been said.

    A launcher ends all processes once one of them has ended with an error.
    """
    with processes.launched():
        try:
            yield
        except BaseException:
            processes.wait_for_all(seconds=5)
            raise


@contextmanager
def shared_command() -> Iterator[processes.Processes]:
    """Let all processes of a group do the block together; the first prints its results and writes its files."""
    with ExitStack() as stack:
        stack.enter_context(processes.one_writes())
        them = stack.enter_context(processes.together())
        if not them.is_first:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        yield them
