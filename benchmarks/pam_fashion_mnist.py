"""Refine MLPs 784-256-256-10 of Fashion-MNIST from the identity, on the straight line: loss in the middle, seconds.

    python benchmarks/pam_fashion_mnist.py --root DIR --work DIR

Networks are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from timing import environment
from torch import nn

import modeconn
from modeconn import PAM, Line, Recipe, data, models
from modeconn.network.recipe import one_cycle

TRAINING = Recipe(epochs=5, optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=one_cycle, weight_decay=0.0)


def endpoint(seed: int, train: data.TensorLoader, work: Path) -> nn.Module:
    path = work / f"fashion-mlp-{seed}.safetensors"
    if not path.exists():
        model = models.mlp(784, (256, 256), 10, mean=float(train.mean()), std=float(train.std()), seed=seed)
        models.save(models.train(model, train, recipe=TRAINING, seed=seed), path)
    return models.load(path)


def middle(connection: modeconn.Connection, test: data.TensorLoader) -> float:
    return float(connection.evaluate(test, num_points=3).loss[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = data.load("fashion_mnist", args.root)
    train = train.with_(batch_size=128)
    pam = PAM(iterations=1)
    pairs = []
    for pair in range(args.pairs):
        a, b = (endpoint(seed, train, args.work) for seed in (2 * pair + 1, 2 * pair + 2))
        spec = modeconn.discover(a, train.inputs[:2])
        naive = modeconn.fit_curve(a, b, train, align=False, curve=Line())
        aligned = modeconn.fit_curve(a, b, train, spec=spec, curve=Line())
        begin, cpu = time.perf_counter(), time.process_time()
        refined = modeconn.fit_curve(
            a, b, train, align=False, spec=spec, curve=Line(), refine=pam, recipe=Recipe(epochs=1)
        )
        row = {"seconds": time.perf_counter() - begin, "CPU seconds": time.process_time() - cpu}
        row |= {
            "naive": middle(naive, test),
            "activations": middle(aligned, test),
            "PAM from identity": middle(refined, test),
            **{name: value for name, value in refined.history.turns[0].items() if name.startswith("num_")},
        }
        row["ratio"] = row["PAM from identity"] / row["naive"]
        pairs.append(row)
        print(pair, json.dumps(row), flush=True)
    record = {
        "model": "mlp 784-256-256-10",
        "seeds": [[2 * p + 1, 2 * p + 2] for p in range(args.pairs)],
        "method": repr(pam),
        "environment": environment(torch.device("cpu")),
        "mean ratio": statistics.mean(row["ratio"] for row in pairs),
        "each pair": pairs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pam_fashion_mnist.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
