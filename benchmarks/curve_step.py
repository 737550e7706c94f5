"""One training step of a Bezier curve against the fastest ordinary step of ``torch.optim.SGD``, in one run.

    python benchmarks/curve_step.py --model tinyten --batch 128

Aim: at most 1.05 for TinyTen and ResNet20 at batch 128, 1.10 for VGG16 at batch 16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import Report, interleaved, options_of
from torch import Tensor, nn

from modeconn import models
from modeconn.curves import Bezier
from modeconn.curves.step import CurveStep, stratified_positions
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace, Workspace

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True)
Batch = tuple[Tensor, Tensor]


def ordinary_step(model: nn.Module, batch: Batch, **kwargs: bool) -> Callable[[], object]:
    model = copy.deepcopy(model).train()
    optimizer = SGD(model.parameters(), weight_decay=5e-4, **kwargs)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def curve_step(model_a: nn.Module, model_b: nn.Module, batch: Batch) -> Callable[[], object]:
    space, curve = WeightSpace(model_a), Bezier(2)
    points = curve.initial_control_points(space.flatten(model_a), space.flatten(model_b))
    step = CurveStep(Workspace(model_a, space), curve, points, Recipe(optimizer=partial(SGD, fused=True)))
    weights = iter(curve.basis(torch.cat([stratified_positions(0, block) for block in range(16)])).tolist())
    forward = supervised(cross_entropy)
    return lambda: step(batch, next(weights), forward)


def main() -> None:
    parser = options_of(__doc__, rounds=30)
    parser.add_argument("--model", default="tinyten")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()

    device, report = options.device, Report(options, options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model_a, model_b = (
        models.build(options.model, seed=seed).to(device=device, memory_format=layout) for seed in (0, 1)
    )
    batch = torch.rand(options.batch, 3, 32, 32, device=device), torch.randint(10, (options.batch,), device=device)
    rivals = {
        "SGD, foreach": ordinary_step(model_a, batch, foreach=True),
        "SGD, fused": ordinary_step(model_a, batch, fused=True),
        "curve": curve_step(model_a, model_b, batch),
    }
    seconds = interleaved(rivals, options.rounds, device)
    fastest = min(("SGD, foreach", "SGD, fused"), key=lambda name: statistics.median(seconds[name]))
    about = f"{options.model}, batch {options.batch}{', channels last' if options.channels_last else ''}"
    report.add(about, seconds, [("curve", fastest)])
    report.write()


if __name__ == "__main__":
    main()
