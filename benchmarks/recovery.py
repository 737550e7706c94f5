"""Share of units that each method finds again in a network that was relabelled at random and disturbed.

    python benchmarks/recovery.py

Network b is a, relabelled, plus Gaussian noise of 0, 0.1, 0.5 or 1 standard deviation of each parameter tensor. A unit
is found if it returns to the place it came from; units that never fire look all alike to activations. Networks: MLPs
64-32-32-32-10 and 64-128-128-10 trained on the digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from timing import environment
from torch import nn

import modeconn
from modeconn import ActivationMatching, Permutation, WeightMatching, data, models
from modeconn.matching import Method, Sinkhorn, TransportMatching
from modeconn.tools.rng import seeded

NOISE = (0.0, 0.1, 0.5, 1.0)
HIDDEN = ((32, 32, 32), (128, 128))


def methods() -> dict[str, Method]:
    return {
        "activations": ActivationMatching(),
        "weights": WeightMatching(),
        "weights, 10 starts": WeightMatching(num_starts=10),
        "activations, then weights": WeightMatching(start=ActivationMatching()),
        "transport, activations": TransportMatching(),
        "transport, weights": TransportMatching(cost="weights"),
        "Sinkhorn of weights": Sinkhorn(objective="weights"),
    }


def disturbed(model: nn.Module, noise: float, generator: torch.Generator) -> nn.Module:
    """Add noise to a model in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def share_found(found: Permutation, planted: Permutation) -> float:
    back = found @ planted
    at_home = [perm == torch.arange(perm.shape[-1]) for perm in back.perms.values()]
    return torch.cat([home.flatten() for home in at_home]).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20, help="of each architecture")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    train, _ = data.load("digits")
    begin = time.perf_counter()
    shares: dict[str, dict[str, dict[float, list[float]]]] = {}
    for hidden in HIDDEN:
        name = f"64-{'-'.join(map(str, hidden))}-10"
        shares[name] = {row: {noise: [] for noise in NOISE} for row in methods()}
        untrained = [
            models.mlp(64, hidden, 10, mean=train.mean(), std=train.std() + 0.1, seed=seed)
            for seed in range(args.networks)
        ]
        networks = models.train_population(untrained, train, recipe=models.DIGITS_RECIPE)
        spec = modeconn.discover(networks[0])
        for number, network in enumerate(networks):
            for noise in NOISE:
                generator = torch.Generator().manual_seed(number)
                planted = spec.random(generator)
                other = disturbed(planted.apply(network), noise, generator)
                for row, method in methods().items():
                    with seeded(number):
                        found = method.match(spec, network, other, train).permutation
                    shares[name][row][noise].append(share_found(found, planted))
        print(name, "done", flush=True)
    minutes = (time.perf_counter() - begin) / 60
    lines = [f"Units found again, mean over {args.networks} networks, by noise in standard deviations of each tensor."]
    for name, rows in shares.items():
        lines += ["", f"| {name} | " + " | ".join(map(str, NOISE)) + " |", "|---" * (1 + len(NOISE)) + "|"]
        lines += [
            f"| {row} | " + " | ".join(f"{statistics.fmean(by_noise[n]):.1%}" for n in NOISE) + " |"
            for row, by_noise in rows.items()
        ]
    text = "\n".join(lines) + "\n"
    about = {
        "seeds": f"networks 0-{args.networks - 1}; relabelling, noise and methods have the network's",
        "environment": environment(torch.device("cpu")),
        "minutes": minutes,
    }
    (args.out / "recovery.json").write_text(json.dumps({**about, "share of units found": shares}, indent=1) + "\n")
    (args.out / "recovery.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
