"""Deep-Align on the digits: MLPs 64-32-32-32-10, fitted on 1,000 networks, tested on 100 pairs of others.

    python benchmarks/deep_align.py --work DIR

Test networks and pairs are those of split 0 of ``compare_digits.py``, which may share its work folder; networks to fit
and to choose the best state on have seeds of their own. Barriers are those of the test loss over 25 points; ratios are
paired, of means, with 95% bootstrap intervals. The work folder keeps networks, aligners and every finished measurement;
a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from compare_digits import HIDDEN, SHIFT, population
from pam_digits import OnTheLine
from timing import environment
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import modeconn
from modeconn import PAM, ActivationMatching, Comparison, DeepAlign, Sinkhorn, WeightMatching, data, models
from modeconn.matching import Method
from modeconn.refinement import ProximalLinear
from modeconn.tools.memory import peak_memory

TRAIN, VALIDATION = 10, 11  # in place of a split: networks 10,000 to 10,999 and 11,000 to 11,099
SEEDS = (0, 1, 2)
STRENGTHS = (0.5, 1, 2, 5)
Networks = list[nn.Module]


def fitted(seed: int, train: data.TensorLoader, work: Path, steps: int | None = None) -> DeepAlign:
    settings = DeepAlign(seed=seed) if steps is None else DeepAlign(seed=seed, num_steps=steps)
    path = work / f"aligner-{settings.steps}-{seed}.safetensors"
    if not path.exists():
        networks = [population(number, size, train, work) for number, size in ((TRAIN, 1000), (VALIDATION, 100))]
        start = time.perf_counter()
        aligner = settings.fit(networks[0], train, validation=networks[1])
        seconds = time.perf_counter() - start
        aligner.save(path)
        path.with_suffix(".json").write_text(json.dumps({"seconds": seconds, "validation": aligner.fitted.validation}))
        print(f"aligner of seed {seed}: {seconds:.0f} s", flush=True)
    return DeepAlign.load(path)


def one_pass(aligners: dict[int, DeepAlign], untrained: DeepAlign) -> dict[str, Method]:
    return {
        "weights": WeightMatching(),
        "activations": ActivationMatching(),
        "activations, then weights": WeightMatching(start=ActivationMatching()),
        "untrained encoder": untrained,
        **{f"Deep-Align, seed {seed}": aligner for seed, aligner in aligners.items()},
        **{f"Deep-Align {seed}, then weights": WeightMatching(start=one) for seed, one in aligners.items()},
    }


def starts(aligners: dict[int, DeepAlign]) -> dict[str, Method | None]:
    learned = {f"Deep-Align {seed}": aligner for seed, aligner in aligners.items()}
    return {"identity": None, "weights": WeightMatching(), "activations": ActivationMatching(), **learned}


def short(aligners: dict[int, DeepAlign]) -> dict[str, Method]:
    return {
        f"{name} x{strength}, Sinkhorn 50": Sinkhorn(start=start, strength=strength, num_steps=50)
        for name, start in starts(aligners).items()
        for strength in STRENGTHS
    }


def refined(aligners: dict[int, DeepAlign]) -> dict[str, Method]:
    pam = PAM(iterations=1, step=ProximalLinear())
    found: dict[str, Method] = {f"{name}, PAM": OnTheLine(pam, start) for name, start in starts(aligners).items()}
    return found | {f"{name} x1, Sinkhorn 300": Sinkhorn(start=start) for name, start in starts(aligners).items()}


def throughput(aligner: DeepAlign, tests: Networks, work: Path) -> dict[str, Any]:
    spec = modeconn.discover(tests[0])
    seconds: dict[str, list[float]] = {"Deep-Align": [], "weights": []}
    for i in range(50):
        for name, method in (("Deep-Align", aligner), ("weights", WeightMatching())):
            start = time.perf_counter()
            method.match(spec, tests[i], tests[(i + SHIFT) % len(tests)], None)
            seconds[name].append(time.perf_counter() - start)
    fits = [json.loads(file.read_text())["seconds"] for file in sorted(work.glob(f"aligner-{aligner.steps}-*.json"))]
    states = aligner.fitted.encoder.graph.read(tests)
    with torch.no_grad():
        aligner.fitted.encoder(states)
        start = time.perf_counter()
        aligner.fitted.encoder(states)
        batched = time.perf_counter() - start
    return {
        "seconds of each fit": fits,
        "training pairs a second, median fit": aligner.steps * aligner.batch_size / statistics.median(fits),
        "ms a pair, alone": 1e3 * statistics.median(seconds["Deep-Align"]),
        "ms a pair, weight matching": 1e3 * statistics.median(seconds["weights"]),
        "ms a network, encoded 100 at once": 1e3 * batched / len(tests),
        "one pair of MLPs 784-128-128-128-10, untrained": {f"features={f}": wide(f) for f in (64, 128)},
    }


def wide(features: int, rounds: int = 5) -> dict[str, float | None]:
    """What it takes to compare two networks of the size that is usual for MNIST."""
    pair = [models.mlp(784, (128, 128, 128), 10, seed=seed) for seed in range(2)]
    untrained = DeepAlign(features=features, num_steps=0, connectivity=0, num_validation_pairs=1)
    aligner = untrained.fit(pair, example_input=torch.rand(2, 784))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        aligner.similarities(*pair)
        seconds.append(time.perf_counter() - start)
    with FlopCounterMode(display=False) as counter:
        aligner.similarities(*pair)
    with peak_memory(torch.device("cpu")) as peak:
        aligner.similarities(*pair)
    return {
        "seconds": statistics.median(seconds),
        "multiply-adds, millions": counter.get_total_flops() / 2e6,
        "peak memory, MB": None if peak.num_bytes is None else peak.num_bytes / 1e6,
    }


def laws(aligner: DeepAlign, tests: Networks, count: int = 20) -> dict[str, Any]:
    """Equivariance in float64, and how many relabelled copies are recovered completely."""
    spec = modeconn.discover(tests[0])
    generator = torch.Generator().manual_seed(0)
    encoder = aligner.fitted.encoder
    recovered, worst = 0, 0.0
    for i in range(count):
        a, b = tests[i], tests[(i + SHIFT) % len(tests)]
        p, q = spec.random(generator), spec.random(generator)
        recovered += (aligner.match(spec, a, p.apply(a)).permutation @ p).num_moved == 0
        encoder.double()
        before = aligner.similarities(a, b)
        after = aligner.similarities(p.apply(a), q.apply(b))
        encoder.float()
        for group in spec.groups:
            moved = before[group.name][p.perms[group.name]][:, q.perms[group.name]]
            worst = max(worst, float((moved - after[group.name]).abs().max()))
    return {"copies recovered": f"{recovered} of {count}", "equivariance error, float64": worst}


def barriers(table: Comparison) -> dict[str, list[float]]:
    return {row: [float(f"{value:.5g}") for value in columns["line"]] for row, columns in table.values.items()}


def baseline(table: Comparison) -> str:
    """The better of weight and activation matching, where they are; else the best row without Deep-Align."""
    summary = table.summary()
    rows = [row for row in ("weights", "activations") if row in summary]
    rows = rows or [row for row in summary if "Deep-Align" not in row]
    return min(rows, key=lambda row: summary[row]["line"]["mean"])


def markdown(tables: dict[str, Comparison]) -> str:
    lines = []
    for title, table in tables.items():
        best = baseline(table)
        lines += [f"{title}, {table.num_pairs} pairs:", ""]
        lines += [f'| | barrier (± s.e.) | of "{best}" | s a pair |', "|---|---|---|---|"]
        for row, cells in table.summary().items():
            seconds = f"{cells['seconds']['median']:.3f}" if "seconds" in cells else ""
            share = "{:.3f} ({:.3f}-{:.3f})".format(*table.ratio(row, best))
            lines.append(f"| {row} | {cells['line']['mean']:.4f} ± {cells['line']['sem']:.4f} | {share} | {seconds} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for networks, aligners and measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the aligners")
    parser.add_argument("--steps", type=int, help="of the aligners, if not the default")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--refined-pairs", type=int, default=20, help="for PAM and 300 steps of Sinkhorn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = data.load("digits", seed=0)
    tests = population(0, 100, train, args.work)
    aligners = {seed: fitted(seed, train, args.work, args.steps) for seed in args.seeds}
    untrained, first = fitted(0, train, args.work, steps=0), aligners[args.seeds[0]]
    record: dict[str, Any] = {
        "model": f"mlp 64-{'-'.join(map(str, HIDDEN))}-10",
        "pairs": f"(i, i + {SHIFT} mod 100) of networks 0 to 99",
        "aligner": repr(first),
        "environment": environment(torch.device("cpu")),
        "laws": laws(first, tests),
        "laws, untrained": laws(untrained, tests),
        "throughput": throughput(first, tests, args.work),
    }
    print(json.dumps(record, indent=1), flush=True)
    tables: dict[str, Comparison] = {}
    for title, methods, count in (
        ("One pass", one_pass(aligners, untrained), args.pairs),
        ("50 steps of Sinkhorn, by start and its strength", short(aligners), args.pairs),
        ("Refined", refined(aligners), args.refined_pairs),
    ):
        tables[title] = modeconn.compare(
            [(tests[i], tests[(i + SHIFT) % 100]) for i in range(count)],
            methods,
            train.with_(batch_size=256),
            test.with_(batch_size=500),
            repair=False,
            checkpoint=args.work / "deep-align.jsonl",
        )
        text = markdown(tables)
        print(text, flush=True)
        record["each pair"] = {name: barriers(table) for name, table in tables.items()}
        (args.out / "deep_align_digits.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "deep_align_digits.md").write_text(text)


if __name__ == "__main__":
    main()
