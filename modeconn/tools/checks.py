"""Checks of the settings of methods: one sentence that names the setting and its value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def there_are(names: Iterable[str]) -> str:
    """Say which names there are, at the end of a sentence.

    Example:
        >>> there_are(["a", "b"]), there_are(["a"])
        ('there are a, b', 'there is a')
    """
    names = list(names)
    return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"


def check_positive(settings: Any, *names: str) -> None:
    """Raise unless the named fields are positive numbers."""
    for name in names:
        value = getattr(settings, name)
        if not (isinstance(value, Real) and value > 0):
            raise ValueError(f"{name} must be positive, got {name}={value!r}.")


def check_at_least(settings: Any, lowest: float, *names: str) -> None:
    """Raise unless the named fields are numbers of ``lowest`` or more."""
    for name in names:
        value = getattr(settings, name)
        if not (isinstance(value, Real) and value >= lowest):
            raise ValueError(f"{name} must be at least {lowest}, got {name}={value!r}.")


def check_integers(settings: Any, *names: str) -> None:
    """Raise unless the named fields of a frozen dataclass are integers, or None where their annotation has it.

    Those of numpy become Python's.
    """
    annotations = {field.name: str(field.type) for field in fields(settings)}
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Integral):
            object.__setattr__(settings, name, int(value))
        elif value is not None or "None" not in annotations[name]:
            raise ValueError(f"{name} must be an integer, got {name}={value!r}.")
