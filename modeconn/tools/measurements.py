"""Finished measurements, kept in a file so that a long evaluation goes on where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from modeconn.tools.files import taken_from
from modeconn.tools.fingerprint import identify
from modeconn.tools.processes import alone, joined
from modeconn.tools.warn import warn
from modeconn.tools.writing import check_writable, held

T = TypeVar("T")
_CHECKSUM = "crc32"
_WHOLE = re.compile(rf'"{_CHECKSUM}": .*}}$'.encode())  # the end of a line that was written to its end


class Records(contextlib.AbstractContextManager["Records"]):
    """Records by key, in memory and, if there is a path, in a file that only grows: one line of JSON each.

    Processes that share a call have the same records: each adds what any has found. A context manager, which lets the
    file go; until then other runs are told that it is in use.

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
        self._known = joined().first(self._open)

    def _open(self) -> dict[str, dict[str, Any]]:
        """Hold the file, and return the records in it."""
        with contextlib.ExitStack() as stack:
            check_writable(self._path)
            stack.enter_context(held(self._path))
            known = read_records(self._path) if self._path.exists() else {}
            self._until_end = stack.pop_all()
        return known

    def __exit__(self, *_: Any) -> None:
        self._until_end.close()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str, read: Callable[[dict[str, Any]], T]) -> T:
        """Return what ``read`` makes of a record.

        Raises:
            ValueError: If that fails, because the record is not what was added.
        """
        with nullcontext() if self._path is None else taken_from(self._path):
            return read(self._known[key])

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record, also on disk before this returns; of several processes, all keep it, and the first writes."""
        self._known[key] = record
        if self._path is not None and joined().is_first:
            with self._path.open("a", encoding="utf-8") as file:
                # Begin with a line break, because the last line may be incomplete.
                file.write(f"\n{_line({key: record})}")
                file.flush()
                os.fsync(file.fileno())

    def measure(
        self, tasks: Sequence[tuple[str, Callable[[], dict[str, Any]]]], done: Callable[[], Any] = lambda: None
    ) -> None:
        """Add what is not known yet, one key after another; processes that share a call share the work.

        Args:
            tasks: Keys, each with what makes its record; in each process alike.
            done: Called after each of them.
        """
        them = joined()
        waiting = list({key: (key, work) for key, work in tasks if key not in self}.values())
        for _ in range(len(tasks) - len(waiting)):
            done()
        for start in range(0, len(waiting), them.size):
            mine = waiting[start + them.rank : start + them.rank + 1]

            def records(mine: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = mine) -> dict[str, dict[str, Any]]:
                with alone():
                    return {key: work() for key, work in mine}

            for found in them.each(records):
                for key, record in found.items():
                    self.add(key, record)
                    done()


def read_records(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return the records in a file of `Records`, by key.

    Raises:
        ValueError: If it is some other file.

    Warns:
        UserWarning: If lines are damaged, which are left out.
    """
    path, known, damaged = Path(path), {}, 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    for line in lines:
        found = _records_in(line)
        if not line.startswith(b"{") or not _are_records(found or {}):
            raise ValueError(f"{str(path)!r} is no file of finished measurements. Choose another one, or delete it.")
        known |= found or {}
        # A line that breaks off before its checksum is one at which a process was killed: nothing to warn of.
        damaged += found is None and _WHOLE.search(line) is not None
    if damaged:
        warn(f"{str(path)!r} is damaged in {damaged} of its {len(lines)} lines; what they held is measured again.")
    return known


def _line(record: dict[str, dict[str, Any]]) -> str:
    """Return records as a line of the file, with a checksum of their text at its end."""
    text = json.dumps(record)
    return f'{text[:-1]}, "{_CHECKSUM}": {zlib.crc32(text.encode())}}}'


def _records_in(line: bytes) -> dict[str, dict[str, Any]] | None:
    """Return what a line holds; None if it is incomplete or damaged."""
    try:
        found = json.loads(line)
        checksum = found.pop(_CHECKSUM, None)  # files of older versions have none
        if checksum is not None and line != _line(found).encode():
            return None
    except (ValueError, AttributeError, RecursionError):
        return None
    return found


def _are_records(found: dict[str, Any]) -> bool:
    return all(isinstance(record, dict) for record in found.values())


def key(*parts: Any) -> str:
    """Return a digest of what makes a measurement what it is."""
    text = "\n".join(map(identify, parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
