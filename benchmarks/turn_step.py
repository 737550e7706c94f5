"""Time of a step that learns rotations against its parts: one pass forward and backward, and the matrix exponentials.

    python -m benchmarks.turn_step [--invertible] [--rounds 15]

For the character GPT and the small ViT of `benchmarks.transformers`, at the batch sizes of `benchmarks.rotations`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import modeconn
from benchmarks.timing import Report, interleaved, options_of
from benchmarks.transformers import CharGPT, SmallViT
from modeconn.matching.learned import PathLoss
from modeconn.matching.turned import TurnedWeights
from modeconn.network.loss import cross_entropy
from modeconn.network.weights import WeightSpace
from modeconn.symmetry.invertible import duals_of


def rivals(build: Callable[[int], nn.Module], batch: tuple[Tensor, Tensor], invertible: bool) -> dict[str, Callable]:
    """Return a step and its parts."""
    given = [build(seed) for seed in (0, 1)]
    spec = modeconn.discover(given[0], given[0].example_input(), symmetries="orthogonal")
    a, b = (spec.prepared(model) for model in given)
    space = WeightSpace(a)
    theta_b = space.flatten(b)
    loss = PathLoss(a, [batch], cross_entropy, path="middle", num_examples=4, batches_per_step=1, seed=0)
    duals = duals_of(spec, a, given[0].example_input()) if invertible else {}
    turned = TurnedWeights(spec, space, theta_b, spec.random(torch.Generator().manual_seed(0)), duals)
    optimizer = torch.optim.Adam(turned.parameters, lr=1e-3)
    rotating = [group for group in spec.groups if group.rotates]
    skew = [
        z.detach().clone().requires_grad_()
        for g, z in zip(rotating, turned.parameters, strict=True)
        if g.name not in duals
    ]

    def step() -> None:
        optimizer.zero_grad()
        turned.backward(loss.gradient)
        optimizer.step()

    def parts() -> None:
        loss.gradient(theta_b)
        for z in skew:
            found = torch.linalg.matrix_exp(z - z.mT)
            found.backward(torch.ones_like(found))

    return {"step": step, "parts": parts}


def main() -> None:
    """Print the seconds of both and their ratio."""
    parser = options_of(__doc__, rounds=15)
    parser.add_argument("--invertible", action="store_true", help="map units inside of heads instead")
    options = parser.parse_args()
    report = Report(options)
    tokens, images = torch.randint(65, (16, 64)), torch.rand(64, 1, 28, 28)
    for name, build, batch in (
        ("GPT", lambda seed: CharGPT(65, seed=seed), (tokens, tokens)),
        ("ViT", lambda seed: SmallViT(seed=seed), (images, torch.randint(10, (64,)))),
    ):
        seconds = interleaved(rivals(build, batch, options.invertible), options.rounds)
        report.add(f"{name}, {'maps' if options.invertible else 'rotations'}", seconds, [("step", "parts")])
    report.write()


if __name__ == "__main__":
    main()
