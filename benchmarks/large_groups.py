"""Assignments and Procrustes problems of many thousand units: seconds, and memory beside the similarities.

    python -m benchmarks.large_groups [--assignment 4096 8192 16384] [--procrustes 4096 8192] [--out results.json]

Similarities are those of weight matching: of units and noisy copies of them, of strangers, and, worst for the search,
uniform random numbers.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Report, options_of
from modeconn.matching.assignment import match_units
from modeconn.matching.procrustes import best_rotations
from modeconn.symmetry.kinds import ORTHOGONAL
from modeconn.tools.memory import peak_memory

CASES = ("copies", "strangers", "random")


def similarity(size: int, case: str) -> Tensor:
    """Return similarities of so many units, in single precision."""
    generator = torch.Generator().manual_seed(0)
    if case == "random":
        return torch.rand(size, size, generator=generator)
    a = torch.randn(size, 512, generator=generator)
    if case == "strangers":
        return a @ torch.randn(size, 512, generator=generator).T
    b = a[torch.randperm(size, generator=generator)] + 0.5 * torch.randn(size, 512, generator=generator)
    return a @ b.T


def solve(what: str, given: Tensor) -> None:
    """Solve one problem."""
    if what == "assignment":
        match_units(given)
    else:
        best_rotations(given.double(), ORTHOGONAL)


def measured(what: str, size: int, case: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of one problem in each round, and the bytes that it takes at most."""
    given, seconds = similarity(size, case), []
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(rounds):
            begin = time.perf_counter()
            solve(what, given)
            seconds.append(time.perf_counter() - begin)
    return {"seconds": {what: seconds}, "units": size, "similarities": case, "bytes": peak.num_bytes}


def main() -> None:
    """Measure, print and write what was found."""
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--assignment", type=int, nargs="*", default=[4096, 8192, 16_384])
    parser.add_argument("--procrustes", type=int, nargs="*", default=[4096, 8192])
    options = parser.parse_args()
    report = Report(options)
    problems = (("assignment", options.assignment, CASES), ("procrustes", options.procrustes, CASES[:2]))
    for what, sizes, cases in problems:
        for size in sizes:
            for case in cases:
                report.add(f"{what}, {size:,} units, {case}", **measured(what, size, case, options.rounds))
    report.write()


if __name__ == "__main__":
    main()
