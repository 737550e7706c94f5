"""Interpolate and compare models of a billion weights in files: seconds, and the most memory in use.

    python -m benchmarks.tensor_files --folder runs [--layers 16] [--out results.json]

The models have the tensors of a Llama of 16 layers, 2,048 wide, of random numbers in bfloat16, in shards of 500 MB. A
plain copy of the same bytes is timed beside it.
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

from benchmarks.timing import environment
from modeconn.tensor_files import Entry, TensorFiles, difference, interpolate, write

SHARD = 500 * 10**6


def llama(layers: int, width: int = 2048, hidden: int = 5632, vocabulary: int = 32_000) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a Llama, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for number in range(layers):
        start = f"model.layers.{number}."
        found |= {f"{start}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        found |= {f"{start}mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        found |= {f"{start}mlp.down_proj.weight": (width, hidden)}
        found |= {f"{start}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(folder: Path, layers: int, seed: int) -> None:
    """Write a model of random numbers, unless it is there."""
    if folder.exists():
        return
    entries = {name: Entry(shape, torch.bfloat16, folder) for name, shape in llama(layers).items()}
    generator = torch.Generator().manual_seed(seed)
    write(folder, entries, lambda name: _random(entries[name].shape, generator), shard_bytes=SHARD)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()


def measured(what: str, a: Path, b: Path, out: Path) -> dict[str, float]:
    """Do something in a process of its own; return its seconds and the most memory it had beyond that at the start."""
    command = [sys.executable, "-m", "benchmarks.tensor_files", "--worker", what, *map(str, (a, b, out))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(what: str, a: Path, b: Path, out: Path) -> None:
    """Do it here; print seconds and bytes."""
    shutil.rmtree(out, ignore_errors=True)
    before, begin = _most(), time.perf_counter()
    if what == "copy":
        shutil.copytree(a, out)
    elif what == "interpolate":
        interpolate(a, b, out, t=0.3, shard_bytes=SHARD)
    else:
        difference(a, b)
    print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": _most() - before}))


def _most() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Make two models, measure, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the models are kept")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, *paths = arguments.worker
        work(what, *map(Path, paths))
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
        row = found[what] = measured(what, a, b, out)
        print(f"{what:12} {row['seconds']:6.1f} s, {row['bytes'] / 1e6:7.0f} MB of memory", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
