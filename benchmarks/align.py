"""Seconds and memory of aligning two networks by activations, against two plain forward passes over the same images.

python benchmarks/align.py [--model resnet32] [--images 10000] [--rounds 5]
"""

from __future__ import annotations

import resource

import torch
from timing import Report, interleaved, options_of

from modeconn import ActivationMatching, align, discover, models


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = options_of(__doc__, rounds=5)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    report = Report(args)
    a, b = (getattr(models, args.model)(seed=seed).eval() for seed in (1, 2))
    inputs = torch.rand(args.images, *a.input_shape)
    loader = [(x, None) for x in inputs.split(args.batch_size)]
    spec = discover(a)
    spec.verify(a)

    def two_passes() -> None:
        with torch.no_grad():
            for model in (a, b):
                for x, _ in loader:
                    model(x)

    def ours() -> None:
        align(a, b, loader, method=ActivationMatching(num_examples=None), spec=spec)

    two_passes()
    before = peak_memory_mb()
    ours()
    above = peak_memory_mb() - before
    report.add(
        f"{args.model}, {args.images:,} images, batch {args.batch_size}",
        interleaved({"align": ours, "two forward passes": two_passes}, args.rounds),
        [("align", "two forward passes")],
        **{"MB beyond the passes": above},
    )
    report.write()


if __name__ == "__main__":
    main()
