"""``modeconn.plane`` beside as many plain evaluations, in one run.

    python -m benchmarks.plane [--model tinyten] [--points 21] [--out results.json]

A plain evaluation takes a network that is there, recalibrates its norm layers as the plane does, and adds up loss and
right answers over the test tensors. Aim: at most 1.1 times one for each point of the grid, though the plane also moves
its network, measures the three that it goes through, and looks for its extent.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

import modeconn
from benchmarks.timing import Report, interleaved, options_of
from modeconn import models
from modeconn.network.batch_norm import recalibrate

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def evaluations(model: torch.nn.Module, train: Batches, test: Batches, num_points: int) -> None:
    """Evaluate a network as often as a plane does."""
    model.eval()
    with torch.no_grad():
        for _ in range(num_points):
            recalibrate(model, train)
            loss, right = 0.0, 0
            for inputs, targets in test:
                outputs = model(inputs)
                loss += float(cross_entropy(outputs, targets, reduction="sum"))
                right += int((outputs.argmax(1) == targets).sum())


def main() -> None:
    """Measure, print and write what was found."""
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--model", default="tinyten")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--examples", type=int, nargs=2, default=(128, 256), help="for statistics, and to measure on")
    options = parser.parse_args()
    report = Report(options)
    networks = [models.build(options.model, seed=seed) for seed in (1, 2, 3)]
    torch.manual_seed(0)
    train, test = (
        [(torch.rand(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(count // 64)]
        for count in options.examples
    )
    size = options.points**2
    rivals = {
        "plane": lambda: modeconn.plane(networks, test, num_points=options.points, recalibrate=train),
        "evaluations": lambda: evaluations(models.build(options.model, seed=1), train, test, size),
    }
    images = " + ".join(map(str, options.examples))
    about = f"{options.model}, {options.points} × {options.points} points, {images} images"
    report.add(about, interleaved(rivals, options.rounds), [("plane", "evaluations")])
    report.write()


if __name__ == "__main__":
    main()
