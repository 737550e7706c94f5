"""Progress bars, only where they are asked for."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, show: bool, **kwargs: Any) -> tqdm:
    """Return a bar of `tqdm.auto` if it is to be shown, else one that does nothing.

    `tqdm.auto` is imported here, because in a notebook without ipywidgets its import alone warns.

    Args:
        args: For tqdm.
        show: Whether to show it.
        kwargs: For tqdm.

    Example:
        >>> sum(progress_bar(range(4), show=False))
        6
    """
    if not show:
        return tqdm(*args, disable=True, **kwargs)
    from tqdm.auto import tqdm as fitting

    return fitting(*args, **kwargs)
