"""The command line under torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeconn import Connection
from modeconn.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "processes.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("torchrun ")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "modeconn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two networks and their connection, made by the commands of docs/processes.md."""
    place = tmp_path_factory.mktemp("torchrun")
    for name, seed in (("a", 1), ("b", 2)):
        how = f"--data digits --model mlp --model-arg hidden=16,16 --epochs 3 --seed {seed}".split()
        alone(place, "train", f"{name}.safetensors", *how)
    for line in COMMANDS:
        done = torchrun(place, *line.split(" -m modeconn ")[1].split())
        assert done.returncode == 0 and done.stdout.count("Wrote curve") == 1, done.stderr
    return place


def alone(place, *command):
    """Give a command in this process, which has imported everything."""
    with contextlib.chdir(place):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done


def torchrun(place, *command):
    return subprocess.run([*TORCHRUN, *command], cwd=place, capture_output=True, text=True, timeout=100)


def said(text):
    return [line for line in text.splitlines() if line.startswith("modeconn: ")]


def test_a_fit_says_how_many_processes_made_it(folder):
    assert "2 processes" in alone(folder, "info", "curve.safetensors").stdout
    assert Connection.load(folder / "curve.safetensors").history.num_processes == 2
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name or path.name.startswith(".")]


def test_a_profile_is_that_of_one_process(folder):
    alone(folder, *"evaluate curve.safetensors --data digits --out one.json".split())
    two, one = (json.loads((folder / name).read_text()) for name in ("curve.json", "one.json"))
    assert two["loss"] == one["loss"] and two["accuracy"] == one["accuracy"]
    assert two["made_by"]["processes"] == 2 and "processes" not in one["made_by"]


def test_training_is_validated_once_for_all(folder):
    command = "train v.safetensors --data digits --model mlp --model-arg hidden=8, --epochs 2 --keep-every 1".split()
    done = torchrun(folder, *command, *"--validation 100 --validate-every 1".split())
    assert done.returncode == 0, done.stderr
    assert [line[:23] for line in said(done.stderr)] == [f"modeconn: epoch {n} of 2;" for n in (1, 2)]
    assert len((folder / "v.log.csv").read_text().splitlines()) == 3
    assert len(list((folder / "v.epochs").iterdir())) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "fit a.safetensors b.safetensors --out d.safetensors --data digits --train-examples 40",
            "2 processes and fewer batches",
        ),
        ("evaluate curve.safetensors --data digits --points 3 --out nowhere/c.json", "cannot write 'nowhere/c.json'"),
    ],
)
def test_what_is_wrong_is_said_once(folder, command, message):
    done = torchrun(folder, *command.split())
    assert done.returncode != 0
    (line,) = said(done.stderr)
    assert message in line
    assert not (folder / "d.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_process_ends_all_and_the_run_goes_on(folder):
    command = "fit a.safetensors b.safetensors --out k.safetensors --data digits --epochs 100000".split()
    command += ["--checkpoint", "k.checkpoint"]
    running = subprocess.Popen(
        [*TORCHRUN, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    kept, begun = folder / "k.checkpoint", time.monotonic()
    while not kept.exists() and time.monotonic() - begun < 60:
        time.sleep(0.1)
    (worker, *_) = children(running.pid)
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and running.returncode != 0
    assert ["another process of the group ended" in line for line in said(errors)] == [True]
    epochs = int(alone(folder, "info", "k.checkpoint").stdout.split("done")[1].split()[0])
    assert epochs > 0

    running = subprocess.Popen(
        [*TORCHRUN, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    before, begun = kept.stat().st_mtime_ns, time.monotonic()
    while kept.stat().st_mtime_ns == before and time.monotonic() - begun < 60:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert [line for line in said(errors) if "interrupted" in line] == ["modeconn: interrupted."]
    assert any("the run is kept in k.checkpoint" in line for line in said(errors))
    assert int(alone(folder, "info", "k.checkpoint").stdout.split("done")[1].split()[0]) > epochs


def children(number):
    """Return the processes that a process has started, in their order."""
    found = subprocess.run(["pgrep", "-P", str(number)], capture_output=True, text=True, check=True).stdout
    return list(map(int, found.split()))
