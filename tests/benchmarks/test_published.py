"""What benchmarks/published.py keeps of a trial, without any of the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import published


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Return a function that goes on with a trial of no further models, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "subjects", list)
    found = {"model": "torch/linear", "how": "proved", "seconds": 1.5, "ratio": 1.25}
    Path("rows.jsonl").write_text(json.dumps(found) + "\n")

    def run(*words):
        monkeypatch.setattr("sys.argv", ["published.py", "--rows", "rows.jsonl", *words])
        return published.main()

    return run


def test_a_trial_is_added_with_all_of_its_arguments_and_its_note(tried):
    for words in ([], ["--only", "linear", "--seconds", "5", "--note", "nothing else ran"]):
        assert tried("--out", "x.json", *words) == 0
    whole, part = json.loads(Path("x.json").read_text())
    assert whole["arguments"] == {"only": None, "processes": 2, "seconds": 240}
    assert part["arguments"] == {"only": "linear", "processes": 2, "seconds": 5}
    assert "note" not in whole and part["note"] == "nothing else ran"
    for run in (whole, part):
        assert run["libraries"] == {"torch": {"proved": 1}} and run["versions"]["torch"] and len(run["models"]) == 1


@pytest.mark.parametrize("option", ["--out", "--rows"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_model_is_tried(option, tried, monkeypatch, capsys):
    monkeypatch.setattr(published, "tried", lambda *_: pytest.fail("models were tried"))
    with pytest.raises(SystemExit):
        tried(option, "nowhere/x.json")
    assert f"argument {option}: cannot write 'nowhere/x.json'" in capsys.readouterr().err
