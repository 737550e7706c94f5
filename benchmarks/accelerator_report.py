"""What `accelerator.py` found so far, on disk after every step, and the time that it has left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LAST_LINES = 12
_ROOT = f"{Path(__file__).parents[1]}/"


class Clock:
    """The seconds that a run has.

    Args:
        budget: How many, from now.
    """

    def __init__(self, budget: float) -> None:
        self._budget, self._start = budget, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds until the budget is used up."""
        return self._budget - self.spent


class Report:
    """Results by part and name, in one JSON file that is always whole.

    Args:
        path: The file; its folder is made.
        about: What the run is, kept beside the parts.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {**about, "finished": False, "failed": [], "parts": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def failed(self) -> list[str]:
        """What failed, as ``part: name``."""
        return self._content["failed"]

    @property
    def parts(self) -> dict[str, Any]:
        """All that was found, by part."""
        return self._content["parts"]

    def put(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Keep a result; one with ``"ok": False`` counts as failed, unless it is of a ``"known"`` fault."""
        self.parts.setdefault(part, {})[name] = result
        if result.get("ok") is False and "known" not in result:
            self.failed.append(f"{part}: {name}")
        self.write()

    def leave_out(self, part: str, name: str, reason: str) -> None:
        """Keep why something was not done, and say it."""
        print(f"  left out: {name}: {reason}", flush=True)
        self.put(part, name, {"left out": reason})

    def note_seconds(self, part: str, seconds: float) -> None:
        """Keep how long a part took, beside the parts."""
        self._content.setdefault("seconds by part", {})[part] = round(seconds, 1)
        self.write()

    def finish(self, seconds: float) -> None:
        """Note that the run came to its end."""
        self._content |= {"finished": True, "seconds": round(seconds, 1)}
        self.write()

    def write(self) -> None:
        """Replace the file in one step, so that a run that is killed keeps what it had."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(_plain(self._content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


class LeftOut(Exception):
    """Raised by a check or a measurement that cannot be made here; its text says why."""


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns, with its seconds; an exception becomes a result too, and the run goes on."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = {"ok": True, **work()}
        if caught:
            found["warnings"] = sorted({str(one.message).splitlines()[0][:300] for one in caught})
    except LeftOut as reason:
        return {"left out": str(reason)}
    except Exception as error:  # of any kind: the next check may still tell something
        lines = "".join(traceback.format_exception(error)).replace(_ROOT, "").rstrip().splitlines()
        found = {"ok": False, "error": _described(error), "traceback": lines[-_LAST_LINES:]}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def _described(error: Exception) -> str:
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error} {notes}".strip()[:2000]


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite as text, anything odd as its repr."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return repr(value)
