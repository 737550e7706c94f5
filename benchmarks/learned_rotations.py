"""Barriers between transformers whose rotations are learned, of the straight line and of a curve that is fitted then.

    python -m benchmarks.learned_rotations gpt --text tinyshakespeare.txt --folder runs --out table.json
    python -m benchmarks.learned_rotations fashion_mnist --root DIR --folder runs

Networks and data are those of `benchmarks.rotations`, trained if the folder does not hold them. Each way to bring b to
a has a row: the barrier of the straight line over 11 points on the test set, of a quadratic Bezier curve after 200
steps (AdamW 3e-4, one cycle) from there, and the lowest accuracy on each. Rotations are learned by
``Sinkhorn(objective="middle")`` from those by weights, with its own learning rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modeconn
from benchmarks.rotations import POINTS, SEEDS, task, trained
from benchmarks.timing import environment
from modeconn import Bezier, Line, Recipe, Sinkhorn, WeightMatching, one_cycle

RECIPE = Recipe(epochs=1, optimizer=partial(torch.optim.AdamW, lr=3e-4), schedule=one_cycle, weight_decay=0.0)


def measured(a: nn.Module, b: nn.Module, loader: Any, test: Any) -> dict[str, float]:
    """Return the barrier and the lowest accuracy of the line and of a curve, and how good the ends are."""
    found: dict[str, float] = {}
    for name, curve in (("line", Line()), ("curve", Bezier(2))):
        begin = time.perf_counter()
        connection = modeconn.fit_curve(a, b, loader, align=False, curve=curve, recipe=RECIPE)
        found[f"seconds of the {name}"] = time.perf_counter() - begin
        profile = connection.evaluate(test, num_points=POINTS)
        found[f"barrier of the {name}"] = profile.barrier
        found[f"lowest accuracy of the {name}"] = float(profile.accuracy.min())
        found[f"accuracy in the middle of the {name}"] = float(profile.accuracy[POINTS // 2])
        found["loss of the ends"] = float(profile.loss[[0, -1]].mean())
        found["accuracy of the ends"] = float(profile.accuracy[[0, -1]].mean())
    return found


def rows_of(a: nn.Module, b: nn.Module, train: Any, test: Any, specs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return a row for each way to bring b to a."""
    steps = train.with_(batch_size=16) if hasattr(train, "tokens") else train
    steps = _first(steps, 200)
    rotating, permuting = specs["orthogonal"], specs["permutation"]
    learned = partial(Sinkhorn, start=WeightMatching(), objective="middle", num_rounds=5, num_examples=256)
    ways = {
        "as they are": None,
        "permutations by weights": (permuting, WeightMatching()),
        "orthogonal by weights": (rotating, WeightMatching()),
        "orthogonal, learned 200 steps": (rotating, learned(num_steps=200)),
        "orthogonal, learned 600 steps": (rotating, learned(num_steps=600)),
    }
    rows = {}
    for name, way in ways.items():
        ends, seconds = (a, b), 0.0
        if way is not None:
            begin = time.perf_counter()
            aligned = modeconn.align(a, b, train, method=way[1], spec=way[0])
            ends, seconds = (aligned.model_a, aligned.model_b), time.perf_counter() - begin
        rows[name] = measured(*ends, steps, test) | {"seconds of the alignment": seconds}
    return rows


def _first(loader: Any, num_steps: int) -> Any:
    """Return as much of a loader, drawn from all of it, as makes so many steps of one epoch."""
    count = num_steps * loader.batch_size
    if hasattr(loader, "tokens"):
        return loader.with_(tokens=loader.tokens[: count * loader.length + 1])
    return loader.subset(torch.randperm(loader.num_examples, generator=torch.Generator().manual_seed(0))[:count])


def main() -> None:
    """Measure each pair of three networks; print, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("gpt", "fashion_mnist", "cifar10"))
    parser.add_argument("--text", type=Path, help="a text file, for gpt")
    parser.add_argument("--root", type=Path, help="folder of the data set, for the others")
    parser.add_argument("--folder", type=Path, required=True, help="where the networks are kept")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    build, train, test, training = task(arguments)
    ends = {seed: trained(build, train, training, seed, arguments.folder) for seed in SEEDS}
    example = ends[1].example_input()
    specs = {kind: modeconn.discover(ends[1], example, symmetries=kind) for kind in ("permutation", "orthogonal")}
    pairs: dict[str, Any] = {}
    for one, other in itertools.combinations(SEEDS, 2):
        rows = pairs[f"{one}-{other}"] = rows_of(ends[one], ends[other], train, test, specs)
        naive = rows["as they are"]["barrier of the line"]
        for name, row in rows.items():
            shares = [row[f"barrier of the {path}"] / naive for path in ("line", "curve")]
            print(f"{one}-{other} {name:32} line {shares[0]:6.3f}  curve {shares[1]:6.3f} of naive", flush=True)
        if arguments.out:
            about = {"environment": environment(torch.device("cpu")), "minutes": (time.perf_counter() - begin) / 60}
            arguments.out.write_text(json.dumps({**about, "task": arguments.task, "pairs": pairs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
