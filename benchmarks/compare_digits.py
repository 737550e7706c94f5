"""Compare ways to match on the digits: MLPs 64-32-32-32-10, three splits, 100 pairs of networks each.

    python benchmarks/compare_digits.py --work DIR

Barriers are those of the test loss over 25 points; ratios are paired, of means, with 95% bootstrap intervals. The work
folder keeps the networks and every finished measurement; a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import environment
from torch import nn

import modeconn
from modeconn import ActivationMatching, Comparison, WeightMatching, data, models
from modeconn.matching import Method, Sinkhorn, StraightThrough, TransportMatching

HIDDEN = (32, 32, 32)
SHIFT = 37  # pairs are (i, i + 37 mod the number of networks)


def methods() -> dict[str, Method]:
    chained = WeightMatching(start=ActivationMatching())
    return {
        "activations": ActivationMatching(),
        "weights": WeightMatching(),
        "weights, 10 starts": WeightMatching(num_starts=10),
        "activations, then weights": chained,
        "transport, activations": TransportMatching(),
        "transport, weights": TransportMatching(cost="weights"),
        "Sinkhorn from activations": Sinkhorn(start=ActivationMatching()),
        "Sinkhorn from weights": Sinkhorn(start=WeightMatching()),
        "straight-through from weights": StraightThrough(start=WeightMatching()),
    }


RATIOS = {
    "activations": ("identity", "random"),
    "weights": ("identity", "random"),
    "weights, 10 starts": ("identity", "weights"),
    "activations, then weights": ("identity", "activations", "weights"),
    "transport, activations": ("identity", "activations"),
    "transport, weights": ("identity", "weights"),
    "Sinkhorn from activations": ("identity", "activations"),
    "Sinkhorn from weights": ("identity", "weights"),
    "straight-through from weights": ("identity", "weights"),
}


def population(split: int, size: int, train: data.TensorLoader, work: Path) -> list[nn.Module]:
    """Network i of a split begins from seed 1000 split + i; its order of the data has that seed plus 100,000."""
    seeds = range(1000 * split, 1000 * split + size)
    files = [work / f"network-{seed}.safetensors" for seed in seeds]
    if not all(file.exists() for file in files):
        make = partial(models.mlp, 64, HIDDEN, 10, mean=train.mean(), std=train.std() + 0.1)
        untrained = [make(seed=seed) for seed in seeds]
        orders = [100_000 + seed for seed in seeds]
        start = time.perf_counter()
        trained = models.train_population(untrained, train, recipe=models.DIGITS_RECIPE, seeds=orders)
        print(f"split {split}: {size} networks in {time.perf_counter() - start:.1f} s", flush=True)
        for model, file in zip(trained, files, strict=True):
            models.save(model, file)
    return [models.load(file) for file in files]


def accuracy(networks: list[nn.Module], test: data.TensorLoader) -> float:
    with torch.no_grad():
        right = [(network(test.inputs).argmax(1) == test.targets).float().mean().item() for network in networks]
    return sum(right) / len(right)


def joined(comparisons: list[Comparison]) -> Comparison:
    """All splits as one comparison."""
    first = comparisons[0]
    values = {
        row: {column: [v for one in comparisons for v in one.values[row][column]] for column in first.columns}
        for row in first.values
    }
    return Comparison(values, first.num_points, first.num_examples)


def ratios(found: Comparison, column: str = "line") -> dict[str, dict[str, tuple[float, float, float]]]:
    return {
        row: {baseline: found.ratio(row, baseline, column=column) for baseline in baselines}
        for row, baselines in RATIOS.items()
        if row in found.values
    }


def markdown(splits: dict[int, Comparison]) -> str:
    everything = joined(list(splits.values()))
    names = [*(f"split {split}" for split in splits), "all"]
    header = ["", *(f"barrier, {name}" for name in names), "of identity", "repaired", "accuracy lost", "s a pair"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row, total in everything.summary().items():
        each = [one.summary()[row]["line"]["mean"] for one in splits.values()]
        share, low, high = (100 * x for x in everything.ratio(row))
        cells = [
            *(f"{mean:.4f}" for mean in each),
            f"{total['line']['mean']:.4f} ± {total['line']['std']:.4f}",
            f"{share:.2f}% ({low:.2f}-{high:.2f})",
            f"{total['repaired']['mean']:.4f}",
            f"{total['line accuracy lost']['mean']:.2%}",
            f"{total['seconds']['median']:.3f}",
        ]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    lines += ["", "Paired ratios of mean barriers on the straight line, with 95% intervals:", ""]
    for row, by_baseline in ratios(everything).items():
        for baseline, (ratio, low, high) in by_baseline.items():
            lines.append(f"- {row} / {baseline}: {ratio:.3f} ({low:.3f}-{high:.3f})")
    return "\n".join(lines) + "\n"


def record(splits: dict[int, Comparison], accuracies: dict[int, float], args: argparse.Namespace) -> dict[str, Any]:
    everything = joined(list(splits.values()))
    return {
        "model": f"mlp 64-{'-'.join(map(str, HIDDEN))}-10",
        "pairs": f"(i, i + {SHIFT} mod {args.networks}) of {args.networks} networks, i < {args.pairs}, in each split",
        "seeds": "network i of split s: weights 1000 s + i, order of data 100000 + 1000 s + i",
        "points": args.points,
        "methods": {name: re.sub(" at 0x[0-9a-f]+", "", repr(methods()[name])) for name in args.methods},
        "environment": environment(torch.device("cpu")),
        "test accuracy of the networks": accuracies,
        "minutes of matching": {
            row: sum(columns["seconds"]) / 60 for row, columns in everything.values.items() if "seconds" in columns
        },
        "ratios": {"all": ratios(everything), **{split: ratios(one) for split, one in splits.items()}},
        "repaired ratios": ratios(everything, "repaired"),
        "summary": {"all": everything.summary(), **{split: one.summary() for split, one in splits.items()}},
        "each pair": {
            split: {
                row: {column: [float(f"{v:.5g}") for v in columns[column]] for column in ("line", "repaired")}
                for row, columns in one.values.items()
            }
            for split, one in splits.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for networks and measurements")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", type=int, default=100, help="in each split")
    parser.add_argument("--pairs", type=int, default=100, help="in each split; pair i begins with network i")
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    chosen = {name: method for name, method in methods().items() if name in args.methods}
    splits: dict[int, Comparison] = {}
    accuracies: dict[int, float] = {}
    for split in args.splits:
        train, test = data.load("digits", seed=split)
        networks = population(split, args.networks, train, args.work)
        accuracies[split] = accuracy(networks, test)
        pairs = [(networks[i], networks[(i + SHIFT) % len(networks)]) for i in range(args.pairs)]
        splits[split] = modeconn.compare(
            pairs,
            chosen,
            train.with_(batch_size=256),
            test.with_(batch_size=500),
            num_points=args.points,
            checkpoint=args.work / "measurements.jsonl",
        )
        print(f"split {split}\n{splits[split]}", flush=True)
    (args.out / "compare_digits.json").write_text(json.dumps(record(splits, accuracies, args), indent=1) + "\n")
    (args.out / "compare_digits.md").write_text(markdown(splits))
    print(markdown(splits))


if __name__ == "__main__":
    main()
