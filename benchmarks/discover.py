"""Seconds and memory of discovery, by model and by depth; everything on the meta device.

    python benchmarks/discover.py

Each model is analysed in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from timing import Report, options_of
from torch import Tensor, nn

import modeconn
from modeconn import PermutationSpec, models
from modeconn.symmetry.explore import Exploration, example_for
from modeconn.symmetry.export import export
from modeconn.symmetry.rules import RULES


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = channels == out and stride == 1
        down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else down

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu_()


def resnet50() -> nn.Module:
    """He et al., 2016: 25.6 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            layers.append(Bottleneck(channels, 64 * 2**stage, 2 if stage and not block else 1))
            channels = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., 2021): 86 million parameters."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 197, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


def chain(depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(16, 4))

    return build


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp, 10 layers": (chain(10), (2, 16)),
    "mlp, 100 layers": (chain(100), (2, 16)),
    "mlp, 1000 layers": (chain(1000), (2, 16)),
    "resnet20": (models.resnet20, (2, 3, 32, 32)),
    "googlenet": (models.googlenet, (2, 3, 32, 32)),
    "preresnet164": (models.preresnet164, (2, 3, 32, 32)),
    "resnet50": (resnet50, (2, 3, 224, 224)),
    "vit_b_16": (ViT, (2, 3, 224, 224)),
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, float]:
    build, shape = SUBJECTS[name]
    with torch.device("meta"):
        model, example = build(), torch.empty(shape)
        modeconn.discover(nn.Linear(2, 2), torch.empty(2, 2))  # imports and first-use costs of torch.export
    before = peak_mb()
    start = time.perf_counter()
    graphs = [export(model, example_for(model, example), training=mode) for mode in (False, True)]
    exported = time.perf_counter()
    walk = Exploration(model, RULES)
    for graph in graphs:
        walk.run(graph)
    spec = PermutationSpec.of(walk.finish())
    walked = time.perf_counter()
    return {
        "export": exported - start,
        "walk": walked - exported,
        "MB above": peak_mb() - before,
        "nodes": sum(len(graph.nodes) for graph in graphs),
        "groups": len(spec.groups),
        "log10 of the group": spec.log10_size,
    }


def main() -> None:
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--only", choices=SUBJECTS, nargs="+", default=list(SUBJECTS), help="measure these")
    parser.add_argument("--worker", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return
    report = Report(options)
    for name in options.only:
        command = [sys.executable, __file__, "--worker", name]
        rounds = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(options.rounds)
        ]
        seconds = {part: [one[part] for one in rounds] for part in ("walk", "export")}
        report.add(name, seconds, [("walk", "export")], **{k: v for k, v in rounds[0].items() if k not in seconds})
    report.write()


if __name__ == "__main__":
    main()
