"""Time of PAM's permutation step against its parts: the passes it makes, forward and backward, and its assignments.

    python benchmarks/pam_step.py --model tinyten

Both do the same passes on the same batches; the parts know neither curve, nor gradient by group, nor moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
from timing import Report, interleaved, options_of
from torch import Tensor, nn

import modeconn
from modeconn import Line, models
from modeconn.curves.loss import CurveLoss, Sample
from modeconn.matching.assignment import match_tree
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.refinement import moves
from modeconn.refinement.proximal_linear import ProximalLinear
from modeconn.refinement.relabelled import Relabelled
from modeconn.symmetry.spec import PermutationSpec

FORWARD = supervised(cross_entropy)


class Step:
    """One permutation step from the identity, always the same; what it did is counted."""

    def __init__(self, a: nn.Module, b: nn.Module, spec: PermutationSpec, sample: Sample, num_tries: int) -> None:
        self.spec, self.space = spec, WeightSpace(a)
        self.theta_b = self.space.flatten(b)
        self.bend = self.theta_b.new_zeros((0, len(self.theta_b)))
        self.loss = CurveLoss(Workspace(a, self.space), Line(), self.space.flatten(a), FORWARD, sample)
        self.step = ProximalLinear(num_rounds=2, num_tries=num_tries)
        self.gradients = 0
        self.looked_at: list[int] = []  # places of the sample, one after another
        self.assignments: list[tuple[list, dict[str, Tensor]]] = []

    def __call__(self) -> None:
        self.step(Relabelled(self.space, self.loss, self.theta_b.clone(), self.bend, self.spec.identity()))

    def count(self) -> None:
        """Take the step once and note its passes and assignments."""

        def noted(tree: list, similarities: dict[str, Tensor]) -> dict[str, Tensor]:
            self.assignments.append((tree, similarities))
            return match_tree(tree, similarities)

        def looked(loss: CurveLoss, theta_b: Tensor, bend: Tensor, places: Sequence[int] | None = None) -> Tensor:
            self.looked_at += range(len(loss)) if places is None else places
            return values(loss, theta_b, bend, places)

        gradient, values = CurveLoss.gradient, CurveLoss.values
        with (
            mock.patch.object(moves, "match_tree", noted),
            mock.patch.object(CurveLoss, "gradient", autospec=True, side_effect=gradient) as gradients,
            mock.patch.object(CurveLoss, "values", looked),
        ):
            self()
        self.gradients = gradients.call_count


def parts(step: Step, model: nn.Module, sample: Sample) -> Callable[[], None]:
    """The same number of passes of an ordinary network, and the same assignments."""

    def run() -> None:
        for _ in range(step.gradients):
            for _, batch in sample:
                model.zero_grad()
                FORWARD(model, batch).backward()
        with torch.no_grad():
            for place in step.looked_at:
                FORWARD(model, sample[place][1])
        for tree, similarities in step.assignments:
            match_tree(tree, similarities)

    return run


def main() -> None:
    parser = options_of(__doc__, rounds=7)
    parser.add_argument("--model", default="tinyten", help="a name of the zoo; mlp is 784-256-256-10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--num-tries", type=int, default=32, help="moves that are tried in each round")
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()

    device, report = options.device, Report(options, options.device)
    make = partial(models.mlp, 784, (256, 256), 10) if options.model == "mlp" else partial(models.build, options.model)
    a, b = (make(seed=seed).to(device).eval() for seed in (0, 1))
    torch.manual_seed(0)
    shape = a.example_input().shape[1:]
    batches = [
        (torch.rand(options.batch, *shape, device=device), torch.randint(10, (options.batch,), device=device))
        for _ in range(options.batches)
    ]
    sample = [((i + 0.5) / len(batches), batch) for i, batch in enumerate(batches)]
    step = Step(a, b, modeconn.discover(a), sample, options.num_tries)
    step.count()
    report.add(
        f"{options.model}, {options.batches} batches of {options.batch}",
        interleaved({"step": step, "parts": parts(step, a.train(), sample)}, options.rounds, device),
        [("step", "parts")],
        gradients=step.gradients,
        **{"losses of batches": len(step.looked_at), "assignments": len(step.assignments)},
    )
    report.write()


if __name__ == "__main__":
    main()
