"""The one command for an accelerator runs, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

BROKEN = """
import sys

sys.path.insert(0, {folder!r})
import accelerator
from accelerator_agreement import check


@check("on purpose: raises")
def _(agreement):
    raise RuntimeError("this check is broken")


@check("on purpose: differs")
def _(agreement):
    agreement.both(lambda at: {{"loss": float(len(seen)), "count": seen.append(0)}})


@check("on purpose: takes a random number")
def _(agreement):
    import torch

    agreement.once(lambda at: torch.rand(3))


@check("on purpose: changes a model")
def _(agreement):
    agreement.once(lambda at: at.networks("mlp", 1)[0].train() and None)


seen = []
sys.exit(accelerator.main([{arguments}]))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def run_on_the_cpu(folder: Path, out: str, *words: str) -> dict:
    """Run the command at a small size with a folder of work, and return what it wrote."""
    command = [str(FOLDER / "accelerator.py"), "--device", "cpu", "--quick", "--work", str(folder / "work"), *words]
    done = run(*command, "--out", str(folder / out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / out).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("accelerator")


@pytest.fixture(scope="module")
def everything(folder) -> dict:
    return run_on_the_cpu(folder, "everything.json")


def test_everything_runs_and_agrees_on_the_cpu_alone(everything):
    assert everything["finished"] and everything["failed"] == []
    parts = everything["parts"]
    assert list(parts) == ["environment", "agreement", "speed", "training"]
    counts = {part: sum(result.get("ok", False) for result in parts[part].values()) for part in parts}
    assert counts["agreement"] >= 35 and counts["speed"] >= 10 and counts["training"] == 5
    assert parts["training"]["settings"]["data"] == "synthetic"


def test_a_check_that_fails_is_reported_and_does_not_stop_the_others(tmp_path):
    out = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--quick", "--only", "agreement", "--name", "on purpose", "--out", str(out)]
    done = run("-c", BROKEN.format(folder=str(FOLDER), arguments=", ".join(map(repr, arguments))))
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(out.read_text())
    names = ["raises", "differs", "takes a random number", "changes a model"]
    assert found["failed"] == [f"agreement: on purpose: {name}" for name in names]
    raised, differs, random, changed = (found["parts"]["agreement"][f"on purpose: {name}"] for name in names)
    assert raised["error"] == "RuntimeError: this check is broken" and raised["traceback"]
    assert "loss differs by 1.00e+00" in differs["error"]
    assert "random state of torch moved" in random["error"]
    assert "training flags of a model passed in changed" in changed["error"]


def test_a_run_goes_on_where_its_folder_says_that_the_one_before_stopped(everything, folder):
    again = run_on_the_cpu(folder, "again.json", "--only", "training")
    first, second = (found["parts"]["training"] for found in (everything, again))
    rows = [name for name in first if name != "settings"]
    assert rows == [name for name in second if second[name].get("from an earlier call")]
    assert [first[row]["barrier"] for row in rows] == [second[row]["barrier"] for row in rows]
