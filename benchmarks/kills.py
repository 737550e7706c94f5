"""Kill long commands at random moments, give them again, and compare what they end with.

    python -m benchmarks.kills [--kills 300] [--seed 0] [--only NAME] [--out FILE]

Each command is run once undisturbed. Then it is started, killed with SIGKILL after a random time, and started again
with the same words, until it ends; its files must hold the same bits, but for seconds, and nothing else may lie beside
them. Each process is forked from one that has imported everything, so that moments inside the work are hit.

The exit status is 1 if a run ended with other bits, with an error, or left something behind.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import environment
from modeconn.cli import app as command_line
from modeconn.tools import files

MLP = "--data digits --model mlp --model-arg hidden=16,"
ADAM = "--optimizer adam:lr=0.003 --schedule one_cycle --weight-decay 0"
ENDS = "a.safetensors b.safetensors"
COMMANDS = {
    "train": f"train out {MLP} --epochs 12 {ADAM}",
    "train under attack": f"train out {MLP} --epochs 4 {ADAM} --adversary free --eps 0.1",
    "fit": f"fit {ENDS} --out out --data digits --epochs 10 {ADAM} --save-every 0.01",
    "refine": f"fit {ENDS} --out out --data digits --epochs 4 {ADAM} --refine pam:iterations=4,num_batches=8",
    "refine exactly": f"fit {ENDS} --out out --data digits --epochs 4 {ADAM} --batch-size 512 "
    "--refine pam:iterations=2,exact=True,num_points=3",
    "robustness": "robustness c.safetensors --data digits --points 5 --attack pgd10 --eps 0.1 --overwrite",
    "compare": f"compare {ENDS} --data digits --points 5 --method weight --method activation --method sinkhorn "
    "--out out",
    "deepalign": "deepalign fit --data digits --out out --networks 6 --model mlp --model-arg hidden=8, --epochs 2 "
    f"--settings num_steps=12,features=8,depth=1,validate_every=3 {ADAM}",
}
INPUTS = {"a.safetensors", "b.safetensors", "c.safetensors"}


@dataclass
class Count:
    """What became of the runs of one command."""

    runs: int = 0
    kills: int = 0
    equal: int = 0
    other_bits: int = 0
    failed: int = 0
    left_behind: int = 0

    @property
    def is_good(self) -> bool:
        """Whether every run ended as it would have undisturbed."""
        return self.equal == self.runs and not self.left_behind


def start(words: str, folder: Path) -> int:
    """Fork a process that runs a command in a folder, and return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        command_line.app(words.split(), standalone_mode=False)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int, limit: float) -> int | None:
    """Return the exit status of a process, or None if it was killed after ``limit`` seconds."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def content(folder: Path) -> dict[str, Any]:
    """Return what a command left in a folder, without seconds."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in INPUTS or path.suffix in (".png", ".csv"):
            continue
        if path.read_bytes()[:1] == b"{":
            found[path.name] = _timeless(json.loads(path.read_text()))
        else:
            tensors, about = files.read(path)
            found[path.name] = (files.digest_of(tensors), _timeless(about))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        timed = ("seconds", "curve seconds", "sha256", "peak bytes", "summary")
        return {name: _timeless(one) for name, one in value.items() if name not in timed}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def one_run(
    words: str, inputs: Path, expected: dict[str, Any], seconds: float, rng: random.Random, count: Count
) -> None:
    """Run a command, killed and given again until it ends, and count how it ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        for path in inputs.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        status, kills = None, 0
        while status is None:
            limit = seconds * rng.uniform(0, 1.1) if kills < 12 else 100 * seconds
            status = finish(start(words, folder), limit)
            kills += status is None
        count.runs += 1
        count.kills += kills
        if status:
            count.failed += 1
            print(f"failed: {words}: {folder.with_suffix('.log').read_text()[-600:]}", flush=True)
            return
        found = content(folder)
        names = sorted(set(os.listdir(folder)) - INPUTS)
        beside = [one for one in names if one not in found and not one.endswith((".png", ".csv"))]
        if found.keys() != expected.keys() or beside:
            count.left_behind += 1
            print(f"left behind: {words}: {names}", flush=True)
        if all(found.get(name) == value for name, value in expected.items()):
            count.equal += 1
        else:
            count.other_bits += 1
            print(f"other bits: {words}", flush=True)


def prepare(folder: Path) -> None:
    """Write the networks and the curve that commands read."""
    for name, seed in (("a", 1), ("b", 2)):
        assert finish(start(f"train {name}.safetensors {MLP} --epochs 1 {ADAM} --seed {seed}", folder), 600) == 0
    words = f"fit {ENDS} --out c.safetensors --data digits --epochs 1 {ADAM}"
    assert finish(start(words, folder), 600) == 0


def measure(kills: int, seed: int, only: str | None) -> dict[str, Count]:
    """Kill each command until it was killed about as often as any other, ``kills`` times in all."""
    chosen = {name: words for name, words in COMMANDS.items() if only is None or only in name}
    counts: dict[str, Count] = collections.defaultdict(Count)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        prepare(inputs)
        for command, words in chosen.items():
            alone = Path(name) / command.replace(" ", "_")
            alone.mkdir()
            for path in inputs.iterdir():
                (alone / path.name).write_bytes(path.read_bytes())
            begin = time.perf_counter()
            if finish(start(words, alone), 600) != 0:
                raise SystemExit(f"{words} fails undisturbed: {alone.with_suffix('.log').read_text()[-600:]}")
            seconds, expected = time.perf_counter() - begin, content(alone)
            rng = random.Random(f"{command} {seed}")
            while counts[command].kills < kills / len(chosen):
                one_run(words, inputs, expected, seconds, rng, counts[command])
            print(f"{command} ({seconds:.1f} s undisturbed): {counts[command]}", flush=True)
    return counts


def main() -> int:
    """Kill, count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begin = time.perf_counter()
    counts = measure(given.kills, given.seed, given.only)
    minutes = (time.perf_counter() - begin) / 60
    rows = {name: vars(count) for name, count in counts.items()}
    total = sum(count.kills for count in counts.values())
    print(f"{total} kills in {minutes:.1f} minutes; all good: {all(count.is_good for count in counts.values())}")
    if given.out is not None:
        record = {
            "seed": given.seed,
            "minutes": minutes,
            "environment": environment(torch.device("cpu")),
            "commands": rows,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(count.is_good for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
