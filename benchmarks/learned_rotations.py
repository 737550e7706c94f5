"""Barriers between transformers whose rotations are learned, of the straight line and of a curve that is fitted then.

    python -m benchmarks.learned_rotations gpt --text tinyshakespeare.txt --folder runs --out table.json
    python -m benchmarks.learned_rotations llama --folder runs
    python -m benchmarks.learned_rotations fashion_mnist --root DIR --folder runs
    python -m benchmarks.learned_rotations tables --folder benchmarks/results

Networks and data are those of `benchmarks.rotations`, trained if the folder does not hold them. Each way to bring b to
a has a row: the barrier of the straight line over 11 points on the test set, of a quadratic Bezier curve after 200
steps (AdamW 1e-3, one cycle) from there, and the lowest accuracy on each. Rotations are learned by
``Sinkhorn(objective="middle")`` from those by weights, with its own learning rate, "mapped" with ``invertible=True``.
From the alignment by weights a curve of 1,000 steps is fitted, too. The learning rate of curves was chosen on pieces of
the training text, for one pair.
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
from modeconn.plot import style

RECIPE = Recipe(epochs=1, optimizer=partial(torch.optim.AdamW, lr=1e-3), schedule=one_cycle, weight_decay=0.0)


def measured(a: nn.Module, b: nn.Module, steps: dict[str, Any], test: Any) -> dict[str, Any]:
    """Return the barrier and the lowest accuracy of the line and of curves, and how good the ends are."""
    found: dict[str, Any] = {}
    for name, batches in {"line": [], **steps}.items():
        curve = Bezier(2) if batches else Line()
        begin = time.perf_counter()
        connection = modeconn.fit_curve(
            a, b, batches or next(iter(steps.values())), align=False, curve=curve, recipe=RECIPE
        )
        found[f"seconds of the {name}"] = time.perf_counter() - begin
        profile = connection.evaluate(test, num_points=POINTS)
        found[f"barrier of the {name}"] = profile.barrier
        found[f"losses on the {name}"] = profile.loss.tolist()
        found[f"lowest accuracy of the {name}"] = float(profile.accuracy.min())
        found[f"accuracy in the middle of the {name}"] = float(profile.accuracy[POINTS // 2])
        found["loss of the ends"] = float(profile.loss[[0, -1]].mean())
        found["accuracy of the ends"] = float(profile.accuracy[[0, -1]].mean())
    return found


def rows_of(a: nn.Module, b: nn.Module, train: Any, test: Any, specs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a row for each way to bring b to a."""
    steps = train.with_(batch_size=16) if hasattr(train, "tokens") else train
    few = {"curve": drawn(steps, 200)}
    many = few | {"curve of 1,000 steps": drawn(steps, 1_000)}
    rotating, permuting = specs["orthogonal"], specs["permutation"]
    learned = partial(Sinkhorn, start=WeightMatching(), objective="middle", num_rounds=5, num_examples=256)
    ways = {
        "as they are": None,
        "permutations by weights": (permuting, WeightMatching()),
        "orthogonal by weights": (rotating, WeightMatching()),
        "orthogonal, learned 200 steps": (rotating, learned(num_steps=200)),
        "orthogonal, learned 600 steps": (rotating, learned(num_steps=600)),
        "mapped, learned 200 steps": (rotating, learned(num_steps=200, invertible=True)),
        "mapped, learned 600 steps": (rotating, learned(num_steps=600, invertible=True)),
    }
    rows = {}
    for name, way in ways.items():
        ends, seconds = (a, b), 0.0
        if way is not None:
            begin = time.perf_counter()
            aligned = modeconn.align(a, b, train, method=way[1], spec=way[0])
            ends, seconds = (aligned.model_a, aligned.model_b), time.perf_counter() - begin
        rows[name] = measured(*ends, many if name == "orthogonal by weights" else few, test) | {
            "seconds of the alignment": seconds
        }
    return rows


def drawn(loader: Any, num_steps: int) -> list[Any]:
    """Return so many batches of a loader that shuffles, from all of its data, in as many passes as that takes."""
    torch.manual_seed(0)
    found: list[Any] = []
    while len(found) < num_steps:
        found += itertools.islice(loader, num_steps - len(found))
    return found


PATHS = ("line", "curve", "curve of 1,000 steps")


def write_tables(folder: Path) -> None:
    """Write what the runs in a folder found as one page, and draw each."""
    lines = [
        "# Barriers of transformers, with rotations that are learned, and of curves from there",
        "",
        "Made by [benchmarks/learned_rotations.py](../learned_rotations.py), which says what each row is. The barrier",
        "of the straight line over 11 points on the test set, as a share of that of the networks as they are, for each",
        "pair of seeds and in the mean; the same of a quadratic Bezier curve of 200 steps from there, and of 1,000;",
        "the lowest accuracy on line and curve; and the seconds of the alignment with the correlations that it",
        "reports (discovery apart).",
    ]
    for path in sorted(folder.glob("learned_rotations_*.json")):
        found = json.loads(path.read_text())
        pairs = found["pairs"]
        lines += ["", f"## {found['task']}", "", f"{found['environment']}; {found['minutes']:.0f} minutes.", ""]
        head = [*pairs, "mean", "curve", "1,000 steps", "lowest on the line", "on the curve", "seconds"]
        lines += [f"| | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
        naive = [rows["as they are"]["barrier of the line"] for rows in pairs.values()]
        for name in next(iter(pairs.values())):
            rows = [of_pair[name] for of_pair in pairs.values()]
            of_path = {path: _shares(rows, naive, path) for path in PATHS}
            cells = [f"{share:.3f}" for share in of_path["line"]]
            cells += [f"{sum(shares) / len(shares):.3f}" if shares else "" for shares in of_path.values()]
            cells += [f"{min(row[f'lowest accuracy of the {path}'] for row in rows):.1%}" for path in PATHS[:2]]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {max(row['seconds of the alignment'] for row in rows):.0f} |"
            )
        ends = [row["as they are"] for row in pairs.values()]
        loss, accuracy = (sum(end[f"{what} of the ends"] for end in ends) / len(ends) for what in ("loss", "accuracy"))
        lines += ["", f"The ends have a loss of {loss:.3f} and an accuracy of {accuracy:.1%} in the mean.", ""]
        draw(pairs, path.with_suffix(".png"))
        lines.append(f"![losses along the lines and curves]({path.stem}.png)")
    (folder / "learned_rotations.md").write_text("\n".join(lines) + "\n")


def _shares(rows: list[dict[str, Any]], naive: list[float], path: str) -> list[float]:
    key = f"barrier of the {path}"
    return [row[key] / whole for row, whole in zip(rows, naive, strict=True)] if key in rows[0] else []


def draw(pairs: dict[str, Any], path: Path) -> None:
    """Draw the mean loss over pairs along lines and curves, side by side, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, what, title in zip(axes, PATHS, ("straight line", "curve of 200 steps"), strict=False):
        for number, (name, label) in enumerate(DRAWN.items()):
            losses = torch.tensor([rows[name][f"losses on the {what}"] for rows in pairs.values()])
            look = style.line(number)
            t = torch.linspace(0, 1, losses.shape[1])
            ax.plot(t, losses.mean(0), label=label, **look)
            style.band(ax, t, losses.min(0).values, losses.max(0).values, look["color"])
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("t")
        ax.set_xlim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test loss")
    axes[1].legend(frameon=False, fontsize="small", loc="upper right")
    figure.savefig(path, dpi=150)


DRAWN = {
    "as they are": "as they are",
    "permutations by weights": "permuted",
    "orthogonal by weights": "rotated",
    "orthogonal, learned 200 steps": "learned, 200 steps",
    "mapped, learned 600 steps": "learned, 600 steps, any maps in heads",
}


def main() -> None:
    """Measure each pair of three networks; print, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("gpt", "llama", "fashion_mnist", "cifar10", "tables"))
    parser.add_argument(
        "--text", type=Path, help="a text file, for gpt and llama; default the sources of Python's library"
    )
    parser.add_argument("--root", type=Path, help="folder of the data set, for the others")
    parser.add_argument("--folder", type=Path, required=True, help="where networks are kept; of tables, the results")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.task == "tables":
        write_tables(arguments.folder)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
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
            shares = [
                f"{path} {row[f'barrier of the {path}'] / naive:.3f}"
                for path in PATHS
                if f"barrier of the {path}" in row
            ]
            print(f"{one}-{other} {name:32} {', '.join(shares)} of naive", flush=True)
        if arguments.out:
            about = {"environment": environment(torch.device("cpu")), "minutes": (time.perf_counter() - begin) / 60}
            arguments.out.write_text(json.dumps({**about, "task": arguments.task, "pairs": pairs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
