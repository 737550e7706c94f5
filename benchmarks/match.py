"""Seconds and memory of weight matching, against the matrix products and assignments that its steps cannot do without.

    python benchmarks/match.py [--only resnet20] [--rounds 5] [--threads 2] [--cpu]

Two pairs of each network: initialised independently, and a network beside its own relabelling under noise of half the
standard deviation of each weight. The bound is taken in the same run, in turn: for every group that is matched, the
products of its weights, already laid out as matrices, and one call of scipy on the result. Discovery is not counted.
Each pair is measured in a process of its own, so that its peak memory is its own; planting takes memory itself, so that
of the first pair is given. On a busy machine the seconds of one processor (--threads 1 --cpu) say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from typing import Any
from unittest import mock

import torch
from discover import resnet50
from scipy.optimize import linear_sum_assignment
from timing import Report, options_of
from torch import Tensor, nn

from modeconn import PermutationSpec, WeightMatching, discover, models
from modeconn.matching import weight_matching


def seeded_resnet50(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet50()


SUBJECTS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], float]] = {  # and the seconds to stay below
    "mlp": (lambda seed: models.mlp(784, (512, 512, 512), 10, seed=seed), (2, 784), 0.4),
    "resnet20": (lambda seed: models.resnet20(seed=seed), (2, 3, 32, 32), 0.3),
    "resnet20 x4": (lambda seed: models.resnet20(width=4, seed=seed), (2, 3, 32, 32), 1.5),
    "resnet20 x16": (lambda seed: models.resnet20(width=16, seed=seed), (2, 3, 32, 32), 15),
    "resnet50": (seeded_resnet50, (2, 3, 224, 224), 20),
    "vgg16": (lambda seed: models.vgg16(seed=seed), (2, 3, 32, 32), 10),
}
PAIRS = ("independent", "planted")


class Bound:
    """The time of the products and assignments alone, taken while a match runs."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.products = self.assignments = 0.0
        self.matched = self.largest = 0

    def similarities(self, tree: weight_matching._Tree) -> dict[str, Tensor]:
        operands = []
        for each in tree._operands:
            both = tree._pair.pieces(each.piece.weight)[each.piece.number]
            units_first = (x.movedim(each.dims, tuple(range(len(each.dims)))) for x in both)
            size = prod(tree._groups[each.group].shape)
            operands.append((each.group, *(x.reshape(size, -1).contiguous() for x in units_first)))
        found: dict[str, Tensor] = {}
        start = self.now()
        for name, a, b in operands:
            found[name] = found[name].addmm_(a, b.T) if name in found else a @ b.T
        self.products += self.now() - start
        for similarity in found.values():
            matrix = similarity.double().cpu().numpy()
            start = self.now()
            linear_sum_assignment(matrix, maximize=True)
            self.assignments += self.now() - start
            self.largest = max(self.largest, matrix.nbytes)
        self.matched += 1
        return found

    @property
    def seconds(self) -> float:
        return self.products + self.assignments


def bound(spec: PermutationSpec, a: nn.Module, b: nn.Module, now: Callable[[], float]) -> Bound:
    found = Bound(now)
    with mock.patch.object(weight_matching._Tree, "_similarities", lambda tree, _: found.similarities(tree)):
        WeightMatching().match(spec, a, b)
    return found


def planted(spec: PermutationSpec, a: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    b = spec.random(generator).apply(a)
    with torch.no_grad():
        for weight in b.parameters():
            if weight.std() > 0:
                weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
    return b


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, kind: str, rounds: int, now: Callable[[], float]) -> dict[str, Any]:
    build, shape, _ = SUBJECTS[name]
    small = models.mlp(4, (4,), 2)
    WeightMatching().match(discover(small), small, small)  # imports
    a = build(1)
    spec = discover(a, torch.empty(shape))
    b = build(2) if kind == "independent" else planted(spec, a)
    before = memory_mb()
    match = WeightMatching().match(spec, a, b)
    above = memory_mb() - before
    ours: list[float] = []
    bounds: list[Bound] = []
    for _ in range(rounds):
        start = now()
        again = WeightMatching().match(spec, a, b)
        ours.append(now() - start)
        bounds.append(bound(spec, a, b, now))
        assert again.history == match.history
    return {
        "seconds": {
            "match": ours,
            "bound": [one.seconds for one in bounds],
            "products": [one.products for one in bounds],
            "assignments": [one.assignments for one in bounds],
        },
        "groups": len(spec.groups),
        "matched": bounds[0].matched,
        "moved": len(match.history) - 1,
        "MB above the networks": above,
        "MB of weights": sum(p.numel() * p.element_size() for p in a.parameters()) / 2**20,
        "MB of costs": bounds[0].largest / 2**20,
    }


def main() -> None:
    parser = options_of(__doc__, rounds=5)
    parser.add_argument("--only", choices=SUBJECTS, help="measure one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pair", choices=PAIRS, help=argparse.SUPPRESS)
    parser.add_argument("--cpu", action="store_true", help="count processor time, not the clock's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.pair:
        now = time.process_time if options.cpu else time.perf_counter
        print(json.dumps(measure(options.only, options.pair, options.rounds, now)))
        return
    report = Report(options)
    for name in [options.only] if options.only else SUBJECTS:
        for kind in PAIRS:
            command = [sys.executable, __file__, "--only", name, "--pair", kind, "--rounds", str(options.rounds)]
            command += ["--threads", str(options.threads), *(["--cpu"] if options.cpu else [])]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds, aim = found.pop("seconds"), SUBJECTS[name][2]
            report.add(f"{name}, {kind}", seconds, [("match", "bound")], aim=f"{aim} s", **found)
    report.write()


if __name__ == "__main__":
    main()
