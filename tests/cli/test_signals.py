"""The program is stopped from outside: it says so in one line, keeps its run, and goes on when it is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from modeconn import Connection, models

PROGRAM = [sys.executable, "-m", "modeconn"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")


def started(*words, folder, ctrl_c=signal.SIG_DFL):
    """Start the program as a terminal does, or with Ctrl-C ignored, as a shell starts jobs in the background."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
    )


@pytest.mark.parametrize(
    ("number", "ctrl_c", "status"),
    [(signal.SIGTERM, signal.SIG_IGN, 143), (signal.SIGINT, signal.SIG_DFL, 130)],
    ids=["terminated in the background", "interrupted"],
)
def test_a_fit_that_is_stopped_is_kept_and_goes_on(tmp_path, number, ctrl_c, status):
    for name, seed in (("a", 1), ("b", 2)):
        models.save(models.mlp(64, (8,), 10, seed=seed), tmp_path / name)
    command = ("fit", "a", "b", "--out", "c", "--data", "digits", "--method", "none", "--save-every", "0.2")
    process = started(*command, "--epochs", 80, folder=tmp_path, ctrl_c=ctrl_c)
    end = time.monotonic() + 120
    while not (tmp_path / "c.checkpoint").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors and "the run is kept in c.checkpoint" in errors and "interrupted" in errors
    assert not (tmp_path / "c").exists() and (tmp_path / "c.checkpoint").exists()
    again = started(*command, "--epochs", 80, folder=tmp_path)
    again.communicate(timeout=300)
    assert again.returncode == 0 and len(Connection.load(tmp_path / "c").history.loss) == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2])
def test_ctrl_c_during_imports_prints_no_traceback(tmp_path, seconds):
    process = started("demo", "--out", tmp_path / "demo", folder=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in errors
