"""Recover planted elements of the whole group by weights alone, and time the matching of a large GPT.

    python -m benchmarks.recover_rotations [--seeds 10] [--large] [--out FILE]

A random element (rotation of the stream, order of heads, rotation inside of each, order of hidden units) is applied to
a network of random weights in double precision, and `WeightMatching` must undo it. ``error`` is the largest entry by
which the product of both differs from the identity; ``steps`` is how often a group of units was moved.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn
from benchmarks.timing import environment
from benchmarks.transformers import CharGPT, SmallViT
from modeconn import WeightMatching


class GroupedQueries(nn.Module):
    """A language model with RMS norms, grouped queries and gated layers: Llama without rotary positions."""

    def __init__(self, vocabulary: int = 200, *, width: int = 64, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(width),
                    "norm2": nn.RMSNorm(width),
                    **{name: nn.Linear(width, width // 2, bias=False) for name in ("k", "v")},
                    **{name: nn.Linear(width, width, bias=False) for name in ("q", "o")},
                    **{name: nn.Linear(width, 3 * width, bias=False) for name in ("gate", "up")},
                    "down": nn.Linear(3 * width, width, bias=False),
                }
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, T)`` to scores ``(B, T, V)``."""
        x = self.tokens(x)
        for layer in self.layers:
            y = layer["norm1"](x)
            q, k, v = (layer[name](y).unflatten(-1, (-1, 16)).transpose(1, 2) for name in "qkv")
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + layer["o"](heads.transpose(1, 2).flatten(2))
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.head(self.norm(x))

    def example_input(self) -> Tensor:
        """Return two windows."""
        return torch.arange(16).view(2, 8)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "GPT": lambda seed: CharGPT(200, seed=seed, width=128),
    "ViT wider than its patch, positions and head": lambda seed: SmallViT(width=128, seed=seed),
    "grouped queries, RMS norm, SwiGLU": lambda seed: GroupedQueries(seed=seed),
}


def recovered(build: Callable[[int], nn.Module], seed: int) -> dict[str, float]:
    """Plant an element and return how well it is undone."""
    model = build(seed).eval()
    spec = modeconn.discover(model, symmetries="orthogonal")
    model, generator = model.double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    element = spec.random(generator)
    begin = time.perf_counter()
    aligned = modeconn.align(model, element.apply(model), method=WeightMatching(), spec=spec)
    seconds = time.perf_counter() - begin
    undone, still = (aligned.permutation @ element).elements, spec.identity().elements
    error = max(float((matrix - still[name]).abs().max()) for name, matrix in undone.items())
    return {"error": error, "steps": len(aligned.history) - 1, "groups": len(spec.groups), "seconds": seconds}


def large() -> dict[str, Any]:
    """Match two GPTs of 12 layers and width 768 with random weights and gains; memory is that of the whole process.

    Counted are copies of the weights of one network, beside the two that are given and the two that are returned.
    """
    a, b = (CharGPT(5000, length=256, width=768, num_heads=12, depth=12, seed=seed).eval() for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (a, b):
            for module in network.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5, generator=generator)
    size = sum(parameter.numel() * parameter.itemsize for parameter in a.parameters())
    begin = time.perf_counter()
    spec = modeconn.discover(a, symmetries="orthogonal")
    found = time.perf_counter()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    aligned = modeconn.align(a, b, method=WeightMatching(), spec=spec)
    matched = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in a.parameters()),
        "discovery seconds": found - begin,
        "matching seconds": matched - found,
        "steps": len(aligned.history) - 1,
        "copies of the weights at the peak": (peak - before) / size - 2,
    }


def main() -> None:
    """Print a table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--large", action="store_true", help="match a large GPT, too")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    table: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    for name, build in NETWORKS.items():
        rows = [recovered(build, seed) for seed in range(arguments.seeds)]
        table[name] = rows
        worst = max(row["error"] for row in rows)
        sweeps = max(row["steps"] / row["groups"] for row in rows)
        print(f"{name:46} worst error {worst:.1e}, at most {sweeps:.1f} moves a group, {rows[0]['seconds']:.2f} s")
    if arguments.large:
        table["large"] = large()
        print(table["large"])
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
