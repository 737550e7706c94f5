"""Results as JSON that every reader takes, with a digest of what they hold: a damaged number is not read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from modeconn.tools.door import shortened
from modeconn.tools.writing import write_text

KIND, DIGEST = "kind", "sha256"
"""The entries that say what a record is, and whether it is what was written."""


class JsonFile(ABC):
    """A result that is written to a file and read from one, by its ``to_json`` and ``from_json``."""

    @abstractmethod
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything as JSON; also write it to ``path`` if given."""

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Self:
        """Invert `to_json`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, as JSON, all or nothing; `load` reads it.

        Raises:
            OSError: If it cannot be written.
        """
        self.to_json(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: If there is no such file, or it is a folder.
            ValueError: If it holds something else, or is damaged.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text.lstrip().startswith("{"):
            raise ValueError(
                f"{os.fspath(path)!r} holds no {cls.__name__}: it is no JSON. save and to_json write files to load."
            )
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def to_json(record: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> str:
    """Return a record as JSON with a digest of it, and write it to ``path`` unless that is None, all or nothing.

    Args:
        record: By name whatever JSON holds, and tensors; numbers that are not finite become null and text.
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    plain = to_plain(record)
    return write_text(json.dumps({**plain, DIGEST: _digest(plain)}, indent=1, allow_nan=False) + "\n", path)


def from_json(text: str, what: str) -> dict[str, Any]:
    """Return the record that `to_json` made a text of.

    Args:
        text: The text; one without a digest is taken as it is.
        what: What it should be, for messages.

    Raises:
        ValueError: If it is no record, or another one than was written.
    """
    try:
        record = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        hint = "" if "{" in str(text) else " Pass the text of a file, not its name: Path(name).read_text()."
        raise ValueError(f"this is no {what}: it cannot be read as JSON ({shortened(error, 600)}).{hint}") from None
    if not isinstance(record, dict):
        raise ValueError(f"this is no {what}: it is no JSON object.")
    digest = record.pop(DIGEST, None)
    last = str(next(reversed(record.values()), ""))  # where the digest stands, whose name may be damaged
    has_lost_it = digest is None and re.fullmatch("[0-9a-f]{64}", last)
    if has_lost_it or digest not in (None, _digest(record)):
        raise ValueError(
            f"this {what} is damaged: it is not what was written. If it was changed on purpose, remove its entry "
            f'"{DIGEST}".'
        )
    return record


@contextmanager
def taken_as(what: str) -> Iterator[None]:
    """Say what a record is not, if it cannot be made into that.

    Raises:
        ValueError: In place of whatever shows that a record holds something else than was written.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"this is no {what} ({type(error).__name__}: {shortened(error)}).") from None


def _digest(record: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(record))  # where keys are text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def to_plain(value: Any) -> Any:
    """Return what every reader of JSON takes: it has neither tensors nor numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [to_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def numbers(value: Any) -> Any:
    """Invert `to_plain` for numbers and lists of them, however deep; what is no number is an error."""
    if isinstance(value, list):
        return [numbers(one) for one in value]
    if type(value) is int:
        return value
    return math.nan if value is None else float(value)
