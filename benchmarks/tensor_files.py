"""Interpolate, compare, shuffle and align models of a billion weights in files: seconds, and the most memory in use.

    python -m benchmarks.tensor_files --folder runs [--layers 19] [--out results.json]

The models are Llamas of 19 layers, 2,048 wide, of random numbers in bfloat16, gains of norms between 0.5 and 1.5, in
shards of 500 MB. A plain copy of the same bytes is timed beside it. Of what was relabelled at random, by
permutations and by rotations, alignment has to find the first network back: how far it is from that is written down.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama import Config, Llama
from benchmarks.timing import Report, options_of
from modeconn.tensor_files import Entry, TensorFiles, align, difference, interpolate, shuffle, write
from modeconn.tools.memory import peak_memory

SHARD = 500 * 10**6


def make(folder: Path, layers: int, seed: int) -> None:
    """Write a model of random numbers, unless it is there."""
    if folder.exists():
        return
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in Llama(Config(layers=layers)).state_dict().items()}
    entries = {name: Entry(shape, torch.bfloat16, folder) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    write(folder, entries, lambda name: _random(entries[name].shape, generator), shard_bytes=SHARD)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.rand(shape, generator=generator).add_(0.5).bfloat16()
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def measured(what: str, a: Path, b: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Do something in processes of their own; return their seconds, and the most memory beyond that at the start."""
    command = [sys.executable, "-m", "benchmarks.tensor_files", "--layers", str(options.layers)]
    command += ["--worker", what, *map(str, (a, b, out))]
    rounds = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for _ in range(options.rounds)
    ]
    return {
        "seconds": {what: [one["seconds"] for one in rounds]},
        "most bytes": max(one["bytes"] for one in rounds),
    }


def work(what: str, a: Path, b: Path, out: Path, layers: int) -> None:
    """Do it here; print seconds and bytes."""
    shutil.rmtree(out, ignore_errors=True)
    verb, _, symmetries = what.partition(" ")
    how = {"model": lambda: Llama(Config(layers=layers)), "symmetries": symmetries, "shard_bytes": SHARD}
    begin = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        if verb == "shuffle":
            shuffle(a, out, seed=1, **how)
        elif verb == "align":
            align(a, b, out, out_a=_folded(out) if symmetries == "orthogonal" else None, overwrite=True, **how)
        elif what == "copy":
            shutil.copytree(a, out)
        elif what == "interpolate":
            interpolate(a, b, out, t=0.3, shard_bytes=SHARD)
        else:
            difference(a, b)
    print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": peak.num_bytes}))


def _folded(out: Path) -> Path:
    """Return where the network is written that an aligned one agrees with."""
    return out.with_name(f"{out.name}-a")


def main() -> None:
    """Make two models, measure, print and write what was found."""
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--folder", type=Path, help="where the models are kept")
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, *paths = arguments.worker
        work(what, *map(Path, paths), arguments.layers)
        return
    a, b, out = (arguments.folder / name for name in ("a", "b", "between"))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed, folder in enumerate((a, b)):
        make(folder, arguments.layers, seed)
    report, num_bytes = Report(arguments), TensorFiles(a).num_bytes
    for what in ("copy", "interpolate", "difference"):
        report.add(what, **measured(what, a, b, out, arguments))
    shutil.rmtree(out, ignore_errors=True)
    for symmetries in ("permutation", "orthogonal"):
        shuffled, back = (arguments.folder / f"{name}-{symmetries}" for name in ("shuffled", "back"))
        what = f"shuffle {symmetries}"
        report.add(what, **measured(what, a, b, shuffled, arguments))
        what = f"align {symmetries}"
        found = measured(what, a, shuffled, back, arguments)
        compared = difference(_folded(back) if symmetries == "orthogonal" else a, back)
        report.add(what, **found, **{"largest relative difference": max(compared.relative.values())})
        for folder in (shuffled, back, _folded(back)):
            shutil.rmtree(folder, ignore_errors=True)
    report.add("strangers", **measured("align permutation", a, b, out, arguments))
    shutil.rmtree(out, ignore_errors=True)
    report.write(bytes=num_bytes, weights=num_bytes // 2)


if __name__ == "__main__":
    main()
