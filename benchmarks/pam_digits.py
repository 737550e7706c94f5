"""Refine relabellings on the straight line between digits MLPs 64-32-32-32-10: three splits, 20 pairs of networks each.

    python benchmarks/pam_digits.py --work DIR

Networks and pairs are those of ``compare_digits.py``, which may share its work folder. Barriers are those of the test
loss over 25 points of the straight line, before any curve is trained; ratios are paired, with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_digits import HIDDEN, SHIFT, joined, population
from timing import environment
from torch import nn

import modeconn
from modeconn import ActivationMatching, Comparison, Line, PermutationSpec, Recipe, WeightMatching, data
from modeconn.matching import Match, Method, Sinkhorn
from modeconn.refinement import PAM, ProximalLinear, RelaxedStep, SinkhornStep


@dataclass(frozen=True)
class OnTheLine:
    """Refine what ``start`` finds on the straight line."""

    refine: PAM
    start: Method | None = None

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
    ) -> Match:
        line = modeconn.fit_curve(
            model_a,
            model_b,
            loader,
            align=self.start or False,
            spec=spec,
            curve=Line(),
            refine=self.refine,
            recipe=Recipe(epochs=self.refine.iterations),
        )
        return Match(line.permutation)


def methods() -> dict[str, Method]:
    steps = {"PAM": ProximalLinear(), "PAM, Sinkhorn": SinkhornStep(), "PAM, relaxed": RelaxedStep()}
    refined = {name: PAM(iterations=1, step=step) for name, step in steps.items()}
    return {
        "activations": ActivationMatching(),
        "weights": WeightMatching(),
        "Sinkhorn from activations": Sinkhorn(start=ActivationMatching()),
        **{f"{name} from activations": OnTheLine(pam, ActivationMatching()) for name, pam in refined.items()},
        "PAM from weights": OnTheLine(refined["PAM"], WeightMatching()),
        **{f"{name} from identity": OnTheLine(pam) for name, pam in refined.items()},
    }


def markdown(splits: dict[int, Comparison]) -> str:
    everything = joined(list(splits.values()))
    header = ["", *(f"split {split}" for split in splits), "all", "of activations", "s a pair"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row, total in everything.summary().items():
        each = [one.summary()[row]["line"]["mean"] for one in splits.values()]
        ratio, low, high = everything.ratio(row, "activations")
        cells = [f"{mean:.4f}" for mean in (*each, total["line"]["mean"])]
        cells += [
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{total['seconds']['median']:.2f}" if "seconds" in total else "",
        ]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for networks and measurements")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", type=int, default=100, help="in each split")
    parser.add_argument("--pairs", type=int, default=20, help="in each split")
    parser.add_argument("--first", type=int, default=0, help="pair i begins with network first + i")
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = {name: method for name, method in methods().items() if name in args.methods}
    splits: dict[int, Comparison] = {}
    for split in args.splits:
        train, test = data.load("digits", seed=split)
        networks = population(split, args.networks, train, args.work)
        numbers = range(args.first, args.first + args.pairs)
        splits[split] = modeconn.compare(
            [(networks[i], networks[(i + SHIFT) % len(networks)]) for i in numbers],
            chosen,
            train.with_(batch_size=256),
            test.with_(batch_size=500),
            num_points=args.points,
            checkpoint=args.work / "refined.jsonl",
        )
        print(f"split {split}\n{splits[split]}", flush=True)
    print(markdown(splits))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pam_digits.md").write_text(markdown(splits))
    record = {
        "model": f"mlp 64-{'-'.join(map(str, HIDDEN))}-10",
        "pairs": f"(i, i + {SHIFT} mod {args.networks}), i in {args.first}..{args.first + args.pairs - 1}",
        "methods": {name: repr(method) for name, method in chosen.items()},
        "environment": environment(torch.device("cpu")),
        "each pair": {split: one.values for split, one in splits.items()},
    }
    (args.out / "pam_digits.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
