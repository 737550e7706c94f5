"""Progress bars, only where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from modeconn.tools.processes import joined

_DELAY = 1.0  # seconds
_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def bars(show: bool) -> Iterator[None]:
    """Show the bars of what runs inside, methods that nobody asks included; if not ``show``, as it was outside."""
    before = _SHOWN.set(show or _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(before)


def progress_bar(*args: Any, show: bool | None = None, **kwargs: Any) -> tqdm:
    """Return a bar of `tqdm.auto` if it is to be shown, else one that does nothing.

    `tqdm.auto` is imported here, because in a notebook without ipywidgets its import alone warns.

    Args:
        args: For tqdm.
        show: Whether to show it; default: what `bars` says, and without it not.
        kwargs: For tqdm.

    Example:
        >>> sum(progress_bar(range(4)))
        6
    """
    if not (_SHOWN.get() if show is None else show) or not joined().is_first:
        return tqdm(*args, disable=True, **kwargs)
    from tqdm.auto import tqdm as fitting

    return fitting(*args, **kwargs)


def passing_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Return a bar of what is mostly over at once: it is shown after a second, where `bars` says so, and then goes."""
    return progress_bar(*args, delay=_DELAY, leave=False, **kwargs)
