"""No wrong call of any verb ends in anything but one clear sentence of modeconn's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "wrong_calls.py"
_spec = importlib.util.spec_from_file_location("wrong_calls", PATH)
wrong_calls = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(wrong_calls)


@pytest.mark.parametrize("verb", list(wrong_calls.VERBS))
def test_wrong_calls_are_refused_in_one_sentence(verb):
    ends = [(name, repr(value)[:80], wrong_calls.ending(call)) for name, value, call in wrong_calls.calls(verb)]
    assert any(end == "refused" for *_, end in ends)
    assert [one for one in ends if one[2].startswith("raw")] == []


def test_the_count_sees_a_raw_error_and_a_call_that_never_ends(monkeypatch):
    def hang() -> None:
        while True:
            pass

    monkeypatch.setattr(wrong_calls, "SECONDS", 1)
    assert wrong_calls.ending(lambda: (3).nothing).startswith("raw: AttributeError")
    assert wrong_calls.ending(hang) == "raw: it did not end within 1 s"
