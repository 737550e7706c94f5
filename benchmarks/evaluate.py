"""``Connection.evaluate`` and ``Connection.robustness`` against the passes they cannot do without, each in one run.

    python benchmarks/evaluate.py --model tinyten
    python benchmarks/evaluate.py --model tinyten --attack pgd20 --points 11

The bound is, for each of T points, one train-mode pass over the recalibration tensors and one eval-mode pass over the
test tensors, with nothing around them. Aim: at most 1.1 times that. With ``--attack`` the bound is to attack one
network T times over, without any recalibration: an eval-mode pass, the attack, an eval-mode pass. Aim: 1.05 times that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timing import Report, interleaved, options_of
from torch import Tensor, nn

from modeconn import attacks, models
from modeconn.connection import Connection
from modeconn.network.attack import Attack
from modeconn.network.loss import TrainingData

Batches = list[tuple[Tensor, Tensor]]


def passes(model: nn.Module, train: Batches, test: Batches, num_points: int) -> Callable[[], object]:
    model = copy.deepcopy(model)

    @torch.no_grad()
    def run() -> None:
        for _ in range(num_points):
            for flag, data in ((True, train), (False, test)):
                model.train(flag)
                for inputs, _targets in data:
                    model(inputs)

    return run


def attacked(model: nn.Module, test: Batches, attack: Attack, num_points: int) -> Callable[[], object]:
    model = copy.deepcopy(model).eval().requires_grad_(False)

    def run() -> None:
        for _ in range(num_points):
            for inputs, targets in test:
                model(inputs)
                model(attack(model, inputs, targets))

    return run


def main() -> None:
    parser = options_of(__doc__, rounds=5)
    parser.add_argument("--model", default="tinyten")
    parser.add_argument("--points", type=int, default=61)
    parser.add_argument("--train", type=int, default=128, help="examples to recalibrate on")
    parser.add_argument("--test", type=int, default=256, help="examples to evaluate")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--attack", help="measure `robustness` under it: pgd20, apgd, autoattack, ...")
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()

    device, report = options.device, Report(options, options.device)
    model_a, model_b = (models.build(options.model, seed=seed).to(device) for seed in (0, 1))
    train, test = (
        list(
            zip(
                torch.rand(size, 3, 32, 32, device=device).split(options.batch),
                torch.randint(10, (size,), device=device).split(options.batch),
                strict=True,
            )
        )
        for size in (options.train, options.test)
    )
    connection = Connection.straight_between(model_a, model_b, training=TrainingData(train))
    bound, ours = "passes", "evaluate"
    rivals = {
        bound: passes(model_a, train, test, options.points),
        ours: lambda: connection.evaluate(test, num_points=options.points),
    }
    if options.attack:
        attack = attacks.build(options.attack, eps=8 / 255)
        bound, ours = "one network, T times", "robustness"
        rivals = {
            bound: attacked(model_a, test, attack, options.points),
            ours: lambda: connection.robustness(test, [attack], num_points=options.points),
        }
    images = f"{options.train} + {options.test}" if not options.attack else f"{options.test}"
    about = f"{options.model}, {options.points} points, {images} images, batch {options.batch}"
    about += f", {options.attack}" if options.attack else ""
    report.add(about, interleaved(rivals, options.rounds, device), [(ours, bound)])
    report.write()


if __name__ == "__main__":
    main()
