"""Compare ways to match on real images; a table for each network in benchmarks/results.

    python benchmarks/compare_real.py mlp --root DIR --work DIR         # Fashion-MNIST
    python benchmarks/compare_real.py tinyten --root DIR --work DIR     # CIFAR-10; resnet20, resnet20_x2

Endpoints and finished measurements are kept in the work folder; a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import environment
from torch import nn

import modeconn
from modeconn import ActivationMatching, Recipe, Sinkhorn, StraightThrough, WeightMatching, data, models
from modeconn.network.recipe import one_cycle

METHODS = {
    "activations": ActivationMatching(num_examples=5_000),
    "weights": WeightMatching(),
    "activations, then weights": WeightMatching(start=ActivationMatching(num_examples=5_000)),
    "Sinkhorn from activations": Sinkhorn(start=ActivationMatching(num_examples=5_000), num_steps=100, num_rounds=5),
    "straight-through from weights": StraightThrough(start=WeightMatching(), num_steps=100),
}


@dataclass(frozen=True)
class Subject:
    """A network, the first ``train_examples`` of a data set, and how both are trained."""

    build: Callable[..., nn.Module]
    data: str
    train_examples: int
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer]
    weight_decay: float = 5e-4

    @property
    def recipe(self) -> Recipe:
        return Recipe(epochs=self.epochs, optimizer=self.optimizer, schedule=one_cycle, weight_decay=self.weight_decay)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
ADAM = partial(torch.optim.Adam, lr=1e-3)
SUBJECTS = {
    "mlp": Subject(partial(models.mlp, 784, (512, 512, 512), 10), "fashion_mnist", 60_000, 5, ADAM, 0.0),
    "tinyten": Subject(models.tinyten, "cifar10", 15_000, 15, SGD),
    "resnet20": Subject(models.resnet20, "cifar10", 5_000, 10, SGD),
    "resnet20_x2": Subject(partial(models.resnet20, width=2), "cifar10", 5_000, 10, SGD),
}


def endpoint(name: str, seed: int, train: data.TensorLoader, work: Path) -> nn.Module:
    path, subject = work / f"{name}-{seed}.safetensors", SUBJECTS[name]
    if not path.exists():
        mean, std = (s.item() if s.numel() == 1 else s.tolist() for s in (train.mean(), train.std()))
        model = subject.build(mean=mean, std=std, seed=seed)
        begin = time.perf_counter()
        models.save(models.train(model, train, recipe=subject.recipe, seed=seed), path)
        print(f"endpoint {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    return models.load(path)


def markdown(found: modeconn.Comparison) -> str:
    titles = ["peak MB" if column == "peak bytes" else column for column in found.columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row, summary in found.summary().items():
        cells = [_cell(column, summary[column]) if column in summary else "" for column in found.columns]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cell(column: str, values: dict[str, float]) -> str:
    if column == "peak bytes":
        return f"{values['mean'] / 1e6:.1f}"
    if column.endswith("seconds"):
        return f"{values['mean']:.2f}"
    form = ".1%" if "accuracy" in column else ".1f" if column.endswith("length") else ".4f"
    return format(values["mean"], form) + (f" ± {format(values['std'], form)}" if "std" in values else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=SUBJECTS)
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for endpoints and measurements")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--test-examples", type=int, default=2_000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = SUBJECTS[args.network]
    train, test = data.load(subject.data, args.root)
    train = train.subset(torch.arange(subject.train_examples))  # the first of the files
    test = test.subset(torch.arange(args.test_examples))
    pairs = [
        tuple(endpoint(args.network, seed, train, args.work) for seed in (2 * pair + 1, 2 * pair + 2))
        for pair in range(args.pairs)
    ]
    found = modeconn.compare(
        pairs,
        {name: METHODS[name] for name in args.methods},
        train,
        test,
        num_points=args.points,
        checkpoint=args.work / f"{args.network}.jsonl",
    )
    print(found)
    record: dict[str, Any] = {
        "network": args.network,
        "data": f"{subject.data}, the first {train.num_examples} training and {test.num_examples} test images",
        "seeds": [[2 * pair + 1, 2 * pair + 2] for pair in range(args.pairs)],
        "epochs of the endpoints": subject.epochs,
        "points": args.points,
        "methods": {name: re.sub(" at 0x[0-9a-f]+", "", repr(METHODS[name])) for name in args.methods},
        "environment": environment(torch.device("cpu")),
        "each pair": found.values,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"compare_{args.network}.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / f"compare_{args.network}.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
