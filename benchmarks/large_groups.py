"""Assignments and Procrustes problems of many thousand units: seconds, and memory beside the similarities.

    python -m benchmarks.large_groups [--assignment 4096 8192 16384] [--procrustes 4096 8192] [--out results.json]

Similarities are those of weight matching: of units and noisy copies of them, of strangers, and, worst for the search,
uniform random numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import environment
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


def measured(what: str, size: int, case: str) -> dict[str, Any]:
    """Return seconds and bytes of one problem."""
    given = similarity(size, case)
    with peak_memory(torch.device("cpu")) as peak:
        begin = time.perf_counter()
        if what == "assignment":
            match_units(given)
        else:
            best_rotations(given.double(), ORTHOGONAL)
        seconds = time.perf_counter() - begin
    row = {"units": size, "case": case, "seconds": seconds, "bytes": peak.num_bytes}
    print(f"{what} {size:6} {case:10} {seconds:8.2f} s {(peak.num_bytes or 0) / 1e9:6.2f} GB", flush=True)
    return row


def main() -> None:
    """Measure, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assignment", type=int, nargs="*", default=[4096, 8192, 16_384])
    parser.add_argument("--procrustes", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    print(found["environment"])
    found["assignment"] = [measured("assignment", size, case) for size in options.assignment for case in CASES]
    found["procrustes"] = [measured("procrustes", size, case) for size in options.procrustes for case in CASES[:2]]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
