"""Tables of classes by the name that files give them."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T", bound=type)


def place_of(cls: type) -> str:
    """Return where a class is defined, as ``module:name``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def register(table: dict[str, T], name: str, cls: T) -> None:
    """Enter a class under a name; a class of the same place, defined anew as in a notebook, takes the other's.

    Raises:
        ValueError: If the name belongs to another class: its files would be read as what they are not.
    """
    known = table.get(name)
    if known is not None and place_of(known) != place_of(cls):
        raise ValueError(
            f"{name!r} is already the name of {place_of(known)} in files. Call {place_of(cls)} another name."
        )
    table[name] = cls
