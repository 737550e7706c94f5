"""Connect real networks: straight and curved, aligned, refined and not; a table in benchmarks/results.

    python benchmarks/connect.py cifar10 --root DIR --work DIR
    python benchmarks/connect.py fashion_mnist --root DIR --work DIR

Each pair's endpoints, curves and numbers are kept in the work folder as soon as they are there; a run that is started
again goes on where it stopped. Numbers are means over the curve seeds of a pair, then mean and spread over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from profiles import numbers_of
from spread import Spread, shown, spread
from timing import environment
from torch import nn

import modeconn
from modeconn import PAM, ProximalLinear, Recipe, data, models
from modeconn.models import files
from modeconn.network.recipe import one_cycle

SETTINGS = {
    "cifar10": {"model": {}, "train_examples": 15_000, "endpoint_epochs": 15, "curve_epochs": 8},
    "fashion_mnist": {
        "model": {"in_channels": 1, "image_size": 28},
        "train_examples": 60_000,
        "endpoint_epochs": 5,
        "curve_epochs": 5,
    },
}
REFINEMENT = PAM(iterations=2, step=ProximalLinear(num_tries=32, num_rounds=5))
ROWS = ("straight", "straight aligned", "curve", "PAM curve", "curve aligned", "PAM curve aligned")


def sgd(epochs: int, lr: float) -> Recipe:
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return Recipe(epochs=epochs, optimizer=optimizer, schedule=one_cycle, weight_decay=5e-4)


def endpoint(seed: int, train: data.TensorLoader, settings: dict[str, Any], work: Path) -> nn.Module:
    path = work / f"endpoint-{seed}.safetensors"
    if not path.exists():
        model = models.tinyten(**settings["model"], mean=train.mean().tolist(), std=train.std().tolist(), seed=seed)
        model = model.to(memory_format=torch.channels_last)
        files.save(models.train(model, train, recipe=sgd(settings["endpoint_epochs"], 0.1), seed=seed), path)
    return files.load(path).to(memory_format=torch.channels_last)


def run(
    a: nn.Module,
    b: nn.Module,
    alignment: modeconn.Alignment,
    row: str,
    train: data.TensorLoader,
    test: data.TensorLoader,
    recipe: Recipe,
    seed: int,
    stem: Path,
    points: int,
) -> dict[str, float]:
    """Fit and measure one connection; rows with PAM make as many gradient steps on the curve as those without."""
    done = stem.with_name(f"{stem.name}-{row.replace(' ', '-')}-{seed}.json")
    if done.exists():
        return json.loads(done.read_text())
    begin = time.perf_counter()
    connection = modeconn.fit_curve(
        a,
        b,
        train,
        align=alignment if "aligned" in row else False,
        spec=alignment.spec,
        curve=modeconn.Bezier(2) if "curve" in row else modeconn.Line(),
        refine=REFINEMENT if "PAM" in row else None,
        recipe=recipe,
        seed=seed,
        checkpoint=done.with_suffix(".safetensors") if "curve" in row else None,
    )
    fitted = time.perf_counter() - begin
    found = {**numbers_of(connection.evaluate(test, num_points=points)), "seconds to fit": fitted}
    if connection.history:
        moved = [turn["num_moved"] for turn in connection.history.turns]
        found["units moved by PAM"] = sum(moved)
    done.write_text(json.dumps(found))
    return found


def run_pair(
    pair: int,
    train: data.TensorLoader,
    test: data.TensorLoader,
    settings: dict[str, Any],
    work: Path,
    points: int,
    curve_seeds: int,
) -> dict[str, Any]:
    path = work / f"pair-{pair}.json"
    if path.exists():
        return json.loads(path.read_text())
    a, b = (endpoint(seed, train, settings, work) for seed in (2 * pair + 1, 2 * pair + 2))
    begin = time.perf_counter()
    alignment = modeconn.align(a, b, train)
    result: dict[str, Any] = {"seconds to align": time.perf_counter() - begin, "correlation": alignment.correlation}
    recipe = sgd(settings["curve_epochs"], 0.05)
    for row in ROWS:
        runs = [
            run(a, b, alignment, row, train, test, recipe, seed, work / f"curve-{pair}", points)
            for seed in ([100 * pair + k for k in range(curve_seeds)] if "curve" in row else [pair])
        ]
        result[row] = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        result[f"{row}, each seed"] = runs
        print(pair, row, json.dumps(result[row]), flush=True)
    path.write_text(json.dumps(result, indent=1))
    return result


def summary(pairs: list[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    return {row: {key: spread([pair[row][key] for pair in pairs]) for key in pairs[0][row]} for row in ROWS}


def table(rows: dict[str, dict[str, Spread]]) -> str:
    percent = ("end accuracy", "min accuracy", "mean accuracy", "arc-length mean accuracy")
    lines = ["| | " + " | ".join([*(f"{k}, %" for k in percent), "barrier", "minutes to fit"]) + " |", "|---" * 7 + "|"]
    for name, row in rows.items():
        cells = [shown(row[k], ".1f", 100) for k in percent]
        cells += [shown(row["barrier"], ".3f"), f"{row['seconds to fit'][0] / 60:.1f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for endpoints, curves and numbers")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--curve-seeds", type=int, default=2, help="curves of each kind between each pair")
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[args.data]
    train, test = data.load(args.data, args.root)
    train = train.subset(torch.arange(settings["train_examples"]))  # the first of the files
    pairs = []
    for pair in range(args.pairs):
        pairs.append(run_pair(pair, train, test, settings, args.work, args.points, args.curve_seeds))
        rows = summary(pairs)
        record = {
            "data": args.data,
            "train examples": train.num_examples,
            "test examples": test.num_examples,
            "model": "tinyten",
            "pairs": [[2 * p + 1, 2 * p + 2] for p in range(len(pairs))],
            "settings": {k: v for k, v in settings.items() if k != "model"},
            "points": args.points,
            "curve seeds": args.curve_seeds,
            "environment": environment(train.device),
            "rows": rows,
            "each pair": pairs,
        }
        name = f"connect_{args.data}"
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
