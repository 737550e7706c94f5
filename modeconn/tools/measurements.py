"""Finished measurements, kept in a file so that a long evaluation goes on where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from modeconn.tools.fingerprint import identify
from modeconn.tools.writing import check_writable, held


class Records(contextlib.AbstractContextManager["Records"]):
    """Records by key, in memory and, if there is a path, in a file that only grows: one line of JSON each.

    A context manager, which lets the file go; until then other runs are told that it is in use.

    Args:
        path: The file, whose records are read if it exists; None keeps records in memory alone.

    Raises:
        OSError: If the file cannot be written, or another run holds it.
        ValueError: If it is some other file; nothing is written to it.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, dict[str, Any]] = {}
        self._until_end = contextlib.ExitStack()
        if self._path is None:
            return
        with contextlib.ExitStack() as stack:
            check_writable(self._path)
            stack.enter_context(held(self._path))
            if self._path.exists():
                self._read(self._path)
            self._until_end = stack.pop_all()

    def __exit__(self, *_: Any) -> None:
        self._until_end.close()

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            found = _record(line)
            if not isinstance(found, dict) or not all(isinstance(record, dict) for record in found.values()):
                raise ValueError(
                    f"{str(path)!r} is no file of finished measurements. Choose another one, or delete it."
                )
            self._known |= found

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._known[key]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record, also on disk before this returns."""
        self._known[key] = record
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                # Begin with a line break, because the last line may be incomplete.
                file.write(f"\n{json.dumps({key: record})}")
                file.flush()
                os.fsync(file.fileno())


def _record(line: bytes) -> Any:
    """Read a line of the file; one at which a process was killed holds nothing."""
    try:
        return json.loads(line) if line else {}
    except ValueError:
        return {} if line.startswith(b"{") else None


def key(*parts: Any) -> str:
    """Return a digest of what makes a measurement what it is."""
    text = "\n".join(map(identify, parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
