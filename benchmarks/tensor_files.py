"""Interpolate, compare, shuffle and align models of a billion weights in files: seconds, and the most memory in use.

    python -m benchmarks.tensor_files --folder runs [--layers 19] [--out results.json]

The models are Llamas of 19 layers, 2,048 wide, of random numbers in bfloat16, gains of norms between 0.5 and 1.5, in
shards of 500 MB. A plain copy of the same bytes is timed beside it. Of what was relabelled at random, by
permutations and by rotations, alignment has to find the first network back: how far it is from that is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama import Config, Llama
from benchmarks.timing import environment
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


def measured(what: str, a: Path, b: Path, out: Path, layers: int) -> dict[str, float]:
    """Do something in a process of its own; return its seconds and the most memory it had beyond that at the start."""
    command = [sys.executable, "-m", "benchmarks.tensor_files", "--layers", str(layers)]
    command += ["--worker", what, *map(str, (a, b, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def told(what: str, row: dict[str, float]) -> dict[str, float]:
    """Print a row, and return it."""
    print(f"{what:20} {row['seconds']:6.1f} s, {row['bytes'] / 1e6:7.0f} MB of memory", flush=True)
    return row


def main() -> None:
    """Make two models, measure, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the models are kept")
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
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
    files = TensorFiles(a)
    found: dict[str, Any] = {"environment": environment(torch.device("cpu")), "bytes": files.num_bytes}
    found["weights"] = sum(entry.num_bytes // 2 for entry in files.entries.values())
    print(f"{found['weights']:,} weights, {found['bytes']:,} bytes; {found['environment']}; {os.cpu_count()} cores")
    for what in ("copy", "interpolate", "difference"):
        found[what] = told(what, measured(what, a, b, out, arguments.layers))
    shutil.rmtree(out, ignore_errors=True)
    for symmetries in ("permutation", "orthogonal"):
        shuffled, back = (arguments.folder / f"{name}-{symmetries}" for name in ("shuffled", "back"))
        what = f"shuffle {symmetries}"
        found[what] = told(what, measured(what, a, b, shuffled, arguments.layers))
        what = f"align {symmetries}"
        found[what] = told(what, measured(what, a, shuffled, back, arguments.layers))
        compared = difference(_folded(back) if symmetries == "orthogonal" else a, back)
        found[what]["largest relative difference"] = max(compared.relative.values())
        print(f"  found back to {found[what]['largest relative difference']:.2g} of each tensor's norm", flush=True)
        for folder in (shuffled, back, _folded(back)):
            shutil.rmtree(folder, ignore_errors=True)
    what = "align permutation"
    found["strangers"] = told("strangers", measured(what, a, b, out, arguments.layers))
    shutil.rmtree(out, ignore_errors=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
