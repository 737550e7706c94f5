"""Compare ways to match on networks with batch norm that are no ResNets: depthwise, gated, recurrent; digits.

    python -m benchmarks compare_gated [--networks NAME ...] [--pairs 6] [--out benchmarks/results]

"Residual" has plain residual blocks, for comparison; "squeeze" has depthwise convolutions and squeeze-and-excitation;
"recurrent" a GRU over the rows of the image and pooling by attention; "both" what the last two have; "gated" the same
with a gate after each depthwise convolution, and batch norm nowhere else but behind the first convolution. What decides
is the column "repaired": statistics of batch norm recalibrated at each point of the straight line. All numbers of each
pair go to compare_gated.json, where other networks stay as they are, and a table of all of them to compare_gated.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_real import markdown
from timing import environment
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn
from modeconn import ActivationMatching, Recipe, Sinkhorn, WeightMatching, data, models

METHODS = {
    "weights": WeightMatching(),
    "activations": ActivationMatching(),
    "activations, then weights": WeightMatching(start=ActivationMatching()),
    "Sinkhorn from activations": Sinkhorn(start=ActivationMatching(), num_steps=100),
    "Sinkhorn from both": Sinkhorn(start=WeightMatching(start=ActivationMatching()), num_steps=100),
}
RECIPE = Recipe(epochs=20, optimizer=partial(torch.optim.Adam, lr=4e-3), schedule=modeconn.one_cycle)


class Block(nn.Module):
    """Depthwise and pointwise convolution with batch norm, weighed by squeeze-and-excitation; residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.squeeze, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.pointwise(self.norm(self.depthwise(x))))
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return x + h * weight[:, :, None, None]


class GatedBlock(nn.Module):
    """A depthwise convolution with batch norm, a gated pointwise one, squeeze-and-excitation; scaled, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.squeeze, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.pointwise(self.norm(self.depthwise(x))).chunk(2, 1)
        h = F.mish(value) * torch.sigmoid(gate)
        weight = torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3))))))
        return x + self.scale * h * weight[:, :, None, None]


class PlainBlock(nn.Module):
    """Two convolutions with batch norm; residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


class Pooled(nn.Module):
    """A convolution with batch norm, two blocks, the mean over all places."""

    def __init__(self, width: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(block(width) for _ in range(2)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    """A convolution with batch norm, then other layers; a GRU reads the rows; attention pools its states."""

    def __init__(self, width: int, *body: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.body = nn.Sequential(*body)
        self.gru = nn.GRU(4 * width, 24, batch_first=True)
        self.score, self.head = nn.Linear(24, 1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(F.relu(self.norm(self.stem(x))))
        rows = F.avg_pool2d(h, (1, 2)).permute(0, 2, 1, 3).flatten(2)  # (N, 8, 4 * width)
        states, _ = self.gru(rows)
        return self.head((torch.softmax(self.score(states), 1) * states).sum(1))


def recurrent(width: int, block: type[nn.Module] | None = None) -> nn.Module:
    if block is None:
        return Recurrent(width, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    return Recurrent(width, block(width), block(width))


NETWORKS = {
    "residual, width 16": partial(Pooled, 16, PlainBlock),
    "squeeze, width 16": partial(Pooled, 16, Block),
    "recurrent, width 16": partial(recurrent, 16),
    "both, width 16": partial(recurrent, 16, Block),
    "gated, width 16": partial(recurrent, 16, GatedBlock),
    "gated, width 12": partial(recurrent, 12, GatedBlock),
}


def images(part: data.TensorLoader) -> data.TensorLoader:
    return part.with_(inputs=part.inputs.view(-1, 1, 8, 8))


def trained(build: Any, seed: int, train: data.TensorLoader) -> nn.Module:
    torch.manual_seed(seed)
    return models.train(build(), train, recipe=RECIPE, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--points", type=int, default=13)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    train, test = map(images, data.load("digits"))
    file = args.out / "compare_gated.json"
    known = json.loads(file.read_text())["networks"] if file.exists() else {}
    record: dict[str, Any] = {
        "data": f"digits, {train.num_examples} training and {test.num_examples} test images",
        "epochs of the endpoints": RECIPE.epochs,
        "points": args.points,
        "methods": {name: re.sub(" at 0x[0-9a-f]+", "", repr(method)) for name, method in METHODS.items()},
        "environment": environment(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
        "networks": {name: known[name] for name in NETWORKS if name in known},
    }
    seeds = [[2 * pair + 1, 2 * pair + 2] for pair in range(args.pairs)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        begin = time.perf_counter()
        pairs = [tuple(trained(NETWORKS[name], seed, train) for seed in pair) for pair in seeds]
        accuracies = [modeconn.evaluate(model, test).accuracy[0].item() for pair in pairs for model in pair]
        found = modeconn.compare(pairs, METHODS, train, test, num_points=args.points)
        minutes = (time.perf_counter() - begin) / 60
        print(f"\n{name}: {minutes:.1f} minutes\n{found}", flush=True)
        record["networks"][name] = {
            "seeds": seeds,
            "test accuracy": accuracies,
            "minutes": round(minutes, 2),
            "each pair": found.values,
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
    tables = [
        f"{name}:\n\n{markdown(modeconn.Comparison(one['each pair'], args.points, test.num_examples, 'interpolated'))}"
        for name, one in record["networks"].items()
    ]
    (args.out / "compare_gated.md").write_text("\n".join(tables))


if __name__ == "__main__":
    main()
