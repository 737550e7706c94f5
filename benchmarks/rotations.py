"""Barriers of the straight line between transformers: as they are, permuted, rotated, and with products interpolated.

    python -m benchmarks.rotations gpt --text tinyshakespeare.txt --folder runs --out table.json
    python -m benchmarks.rotations fashion_mnist --root DIR --folder runs
    python -m benchmarks.rotations cifar10 --root DIR --folder runs
    python -m benchmarks.rotations tables --folder benchmarks/results

Networks of three seeds are trained (and kept in ``--folder``), and each pair of them is compared. A barrier is the
largest loss on the test set on the line, over 11 points, less what the ends would give there. "Products of heads" is
the line in an enlarged architecture, whose parameters are the products of the heads' weights (Theus et al., 2025).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modeconn
from benchmarks.timing import environment
from benchmarks.transformers import CharGPT, CharLlama, SmallViT, with_products
from modeconn import ActivationMatching, WeightMatching, data

SEEDS = (1, 2, 3)
POINTS = 11


@dataclass(frozen=True)
class Training:
    """How a network is trained: AdamW, a warm-up, half a cosine down to nothing, gradients clipped to length 1."""

    epochs: int
    learning_rate: float
    weight_decay: float
    warmup: int = 50

    def run(self, model: nn.Module, loader: Any, seed: int) -> nn.Module:
        """Train a network in place, in the order that a seed gives."""
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps, step = self.epochs * len(loader), 0
        for _ in range(self.epochs):
            for inputs, targets in loader:
                rise, fall = (step + 1) / self.warmup, (1 + math.cos(math.pi * step / steps)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * min(rise, fall)
                optimizer.zero_grad()
                scores = model(inputs)
                nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
        return model.eval()


GPT, VIT = Training(1, 1e-3, 0.01), Training(15, 1e-3, 0.01)


def task(arguments: argparse.Namespace) -> tuple[Callable[[int], nn.Module], Any, Any, Training]:
    """Return how to build a network from a seed, the data and the training."""
    if arguments.task in ("gpt", "llama"):
        train, test = data.text(arguments.text or source_text(arguments.folder))
        test = test.with_(tokens=test.tokens[: 256 * 64 + 1], batch_size=64)
        network = CharGPT if arguments.task == "gpt" else CharLlama
        return lambda seed: network(train.num_classes, seed=seed), train, test, GPT
    train, test = data.load(arguments.task, arguments.root, augment=False)
    few = torch.randperm(train.num_examples, generator=torch.Generator().manual_seed(0))[:10_000]
    train = train.subset(few).with_(batch_size=64)
    if arguments.task == "cifar10":
        return lambda seed: SmallViT(channels=3, size=32, patch=4, seed=seed), train, test, VIT
    return lambda seed: SmallViT(seed=seed), train, test, VIT


def source_text(folder: Path) -> Path:
    """Write a million characters of the sources of Python's standard library to a file, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, found = folder / "sources.txt", ""
    for source in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        found += source.read_text(encoding="utf-8")
    path.write_text("".join(letter for letter in found if letter.isascii())[:1_100_000], encoding="utf-8")
    return path


def trained(build: Callable[[int], nn.Module], train: Any, training: Training, seed: int, folder: Path) -> nn.Module:
    """Return the network of a seed, from the folder if it is there."""
    path, model = folder / f"{seed}.pt", build(seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    training.run(model, train, seed)
    torch.save(model.state_dict(), path)
    return model


def profile_of(a: nn.Module, b: nn.Module, test: Any) -> dict[str, float]:
    """Return barrier, the largest loss, and the accuracy in the middle of the line."""
    line = modeconn.fit_curve(a, b, test, align=False, curve=modeconn.Line())
    profile = line.evaluate(test, num_points=POINTS)
    return {
        "barrier": profile.barrier,
        "middle accuracy": float(profile.accuracy[POINTS // 2]),
        "ends": float(profile.loss[[0, -1]].mean()),
    }


def rows_of(a: nn.Module, b: nn.Module, train: Any, test: Any, specs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return a row for each way to bring b to a."""
    rotating, permuting = specs["orthogonal"], specs["permutation"]
    activations = ActivationMatching(num_examples=1000)
    ways = {
        "permutations by weights": (permuting, WeightMatching(), None),
        "permutations by activations": (permuting, activations, train),
        "orthogonal by weights": (rotating, WeightMatching(), None),
        "orthogonal by activations": (rotating, activations, train),
        "orthogonal by activations, then weights": (rotating, WeightMatching(start=activations), train),
    }
    rows = {"as they are": profile_of(a, b, test)}
    rows["gains folded"] = profile_of(rotating.prepared(a), rotating.prepared(b), test)
    for name, (spec, method, loader) in ways.items():
        begin = time.perf_counter()
        aligned = modeconn.align(a, b, loader, method=method, spec=spec)
        seconds = time.perf_counter() - begin
        rows[name] = profile_of(aligned.model_a, aligned.model_b, test) | {"seconds": seconds}
        if spec is rotating and loader is None:
            enlarged = [with_products(end) for end in (aligned.model_a, aligned.model_b)]
            rows[name + ", products of heads"] = profile_of(*enlarged, test)
    return rows


def write_tables(folder: Path) -> None:
    """Write what the runs in a folder found as one page."""
    lines = [
        "# Barriers of transformers, permuted and rotated",
        "",
        "Made by [benchmarks/rotations.py](../rotations.py), which says what each row is. The barrier of the straight",
        "line over 11 points on the test set, for each pair of seeds, the mean over pairs of its share of that of the",
        "networks as they are, the mean accuracy in the middle, and the seconds that matching took (discovery apart).",
    ]
    for path in sorted(folder.glob("rotations_*.json")):
        found = json.loads(path.read_text())
        pairs = found["pairs"]
        lines += [
            "",
            f"## {found['task']}",
            "",
            f"{found['environment']}; {found['minutes']:.0f} minutes{_commit(found)}.",
            "",
        ]
        lines += [
            f"| | {' | '.join(pairs)} | of naive | middle accuracy | seconds |",
            "| --- |" + " --- |" * (len(pairs) + 3),
        ]
        naive = [rows["as they are"]["barrier"] for rows in pairs.values()]
        for name in next(iter(pairs.values())):
            rows = [of_pair[name] for of_pair in pairs.values()]
            share = sum(row["barrier"] / whole for row, whole in zip(rows, naive, strict=True)) / len(rows)
            middle = sum(row["middle accuracy"] for row in rows) / len(rows)
            seconds = f"{max(row['seconds'] for row in rows):.1f}" if "seconds" in rows[0] else ""
            cells = [f"{row['barrier']:.3f}" for row in rows]
            lines.append(f"| {name} | {' | '.join(cells)} | {share:.2f} | {middle:.1%} | {seconds} |")
        ends = sum(row["as they are"]["ends"] for row in pairs.values()) / len(pairs)
        lines += ["", f"The ends have a loss of {ends:.3f} in the mean."]
    (folder / "rotations.md").write_text("\n".join(lines) + "\n")


def _commit(found: dict[str, Any]) -> str:
    return f"; at commit {found['commit']}" if "commit" in found else ""


def main() -> None:
    """Train, compare, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("gpt", "fashion_mnist", "cifar10", "tables"))
    parser.add_argument("--text", type=Path, help="a text file, for gpt")
    parser.add_argument("--root", type=Path, help="folder of the data set, for the others")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the networks are kept; of tables, the results"
    )
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
    specs["orthogonal"].verify(ends[1], example)
    pairs = {}
    for one, other in itertools.combinations(SEEDS, 2):
        rows = pairs[f"{one}-{other}"] = rows_of(ends[one], ends[other], train, test, specs)
        for name, row in rows.items():
            share = row["barrier"] / rows["as they are"]["barrier"]
            print(
                f"{one}-{other} {name:42} {row['barrier']:7.3f} {share:6.2f} {row['middle accuracy']:6.3f}", flush=True
            )
    for name in rows:
        shares = [found[name]["barrier"] / found["as they are"]["barrier"] for found in pairs.values()]
        print(f"mean {name:40} {sum(shares) / len(shares):6.3f}  of naive: {', '.join(f'{s:.3f}' for s in shares)}")
    if arguments.out:
        about = {"environment": environment(torch.device("cpu")), "minutes": (time.perf_counter() - begin) / 60}
        arguments.out.write_text(json.dumps({**about, "task": arguments.task, "pairs": pairs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
