"""Barriers between networks without norms, as they are and with the scales of their units balanced first.

    python -m benchmarks.balanced digits --out table.json
    python -m benchmarks.balanced cifar10 --root DIR --folder runs --out table.json

"digits" are perceptrons 64-128-128-10, ten networks in five pairs. "cifar10" are VGGs without batch norm, of five
stages of 16 to 64 channels and a hidden layer of 64, three networks on 10,000 images in three pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modeconn
from benchmarks.timing import environment
from modeconn import ActivationMatching, Recipe, WeightMatching, data, models, one_cycle


class NarrowVGG(nn.Module):
    """A VGG11 of a quarter of the channels and less, without batch norm and dropout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            channels = 3
            for width, count in zip((16, 32, 64, 64, 64), (1, 1, 2, 2, 2), strict=True):
                for _ in range(count):
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                    channels = width
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, ``(N, 10)``."""
        return self.classifier(self.features(2 * x - 1).flatten(1))


def digits() -> tuple[list[tuple[nn.Module, nn.Module]], Any, Any]:
    """Return pairs of perceptrons and their data."""
    train, test = data.load("digits")

    def network(seed: int) -> nn.Module:
        model = models.mlp(64, (128, 128), 10, mean=train.mean(), std=train.std() + 0.1, seed=seed)
        return models.train(model, train, recipe=models.DIGITS_RECIPE, seed=seed)

    return [(network(seed), network(seed + 1)) for seed in range(1, 11, 2)], train, test


def cifar10(root: Path, folder: Path) -> tuple[list[tuple[nn.Module, nn.Module]], Any, Any]:
    """Return pairs of VGGs, which are trained if ``folder`` does not hold them, and their data."""
    train, test = data.load("cifar10", root, augment=False)
    few = torch.randperm(train.num_examples, generator=torch.Generator().manual_seed(0))[:10_000]
    train = train.subset(few).with_(batch_size=64)
    recipe = Recipe(20, partial(torch.optim.AdamW, lr=1e-3), one_cycle, weight_decay=1e-2)
    ends = []
    for seed in (1, 2, 3):
        model, path = NarrowVGG(seed), folder / f"vgg-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            model = models.train(model, train, recipe=recipe, seed=seed)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        ends.append(model.eval())
    return list(itertools.combinations(ends, 2)), train, test


def main() -> None:
    """Compare methods on the pairs as they are and balanced; print both tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("digits", "cifar10"))
    parser.add_argument("--root", type=Path, help="folder of the data set, for cifar10")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where trained networks are kept")
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    pairs, train, test = digits() if arguments.task == "digits" else cifar10(arguments.root, arguments.folder)
    example = next(iter(train))[0]
    spec = modeconn.discover(pairs[0][0], example)
    even = [tuple(modeconn.balance(model, example, spec=spec) for model in pair) for pair in pairs]
    methods = {"weights": WeightMatching(), "activations": ActivationMatching()}
    tables = {}
    for name, networks in (("as they are", pairs), ("balanced", even)):
        tables[name] = modeconn.compare(networks, methods, train, test, num_points=11, spec=spec)
        print(name, tables[name], sep="\n", flush=True)
    if arguments.out:
        about = {"environment": environment(torch.device("cpu")), "minutes": (time.perf_counter() - begin) / 60}
        values = {name: table.values for name, table in tables.items()}
        arguments.out.write_text(json.dumps({**about, "task": arguments.task, "tables": values}, indent=1) + "\n")


if __name__ == "__main__":
    main()
