"""One adversarial training step of a Bezier curve against its parts, in one run.

    python benchmarks/adversarial.py --model tinyten --batch 64 --steps 5

The parts: as many passes forward and back to the inputs as the attack has steps, and one ordinary step of the same
network, written out by hand. Aim: at most 1.10 times their sum. Beside it, what the attack would cost if gradients of
the weights were computed and thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from timing import Report, interleaved, options_of
from torch import Tensor, nn

from modeconn import PGD, models
from modeconn.attacks.training import AdversarialTraining
from modeconn.curves import Bezier
from modeconn.curves.step import CurveStep, stratified_positions
from modeconn.learning.step_loss import StepLoss
from modeconn.network.loss import cross_entropy
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace, Workspace

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, fused=True)
Batch = tuple[Tensor, Tensor]


def parts(model: nn.Module, batch: Batch, num_steps: int) -> Callable[[], object]:
    model, fixed = copy.deepcopy(model).train(), copy.deepcopy(model).train().requires_grad_(False)
    optimizer = SGD(model.parameters(), weight_decay=5e-4)
    inputs = batch[0].clone().requires_grad_()

    def run() -> None:
        for _ in range(num_steps):
            torch.autograd.grad(cross_entropy(fixed(inputs), batch[1]), inputs)
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return run


def with_weight_gradients(model: nn.Module, batch: Batch, num_steps: int) -> Callable[[], object]:
    """The attack alone as it is often written: backward, and only the inputs' gradient is used."""
    model = copy.deepcopy(model).train()

    def run() -> None:
        inputs = batch[0]
        for _ in range(num_steps):
            inputs = inputs.detach().requires_grad_()
            cross_entropy(model(inputs), batch[1]).backward()
            inputs = inputs.detach() + 2 / 255 * inputs.grad.sign()
            inputs = inputs.clamp(batch[0] - 8 / 255, batch[0] + 8 / 255).clamp(0, 1)

    return run


def curve_step(model_a: nn.Module, model_b: nn.Module, batch: Batch, attack: PGD) -> Callable[[], object]:
    space, curve = WeightSpace(model_a), Bezier(2)
    points = curve.initial_control_points(space.flatten(model_a), space.flatten(model_b))
    step = CurveStep(Workspace(model_a, space), curve, points, Recipe(optimizer=SGD))
    weights = iter(curve.basis(torch.cat([stratified_positions(0, block) for block in range(16)])).tolist())
    forward = StepLoss(cross_entropy, adversary=AdversarialTraining(attack)).at(1)
    return lambda: step(batch, next(weights), forward)


def main() -> None:
    parser = options_of(__doc__, rounds=20)
    parser.add_argument("--model", default="tinyten")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()

    device, report = options.device, Report(options, options.device)
    model_a, model_b = (models.build(options.model, seed=seed).to(device) for seed in (0, 1))
    batch = torch.rand(options.batch, 3, 32, 32, device=device), torch.randint(10, (options.batch,), device=device)
    attack = PGD(8 / 255, 2 / 255, options.steps)
    attacked = copy.deepcopy(model_a).train()
    rivals = {
        "parts": parts(model_a, batch, options.steps),
        "adversarial curve step": curve_step(model_a, model_b, batch, attack),
        "attack alone": lambda: attack(attacked, *batch),
        "attack with weight gradients": with_weight_gradients(model_a, batch, options.steps),
    }
    report.add(
        f"{options.model}, batch {options.batch}, PGD of {options.steps} steps",
        interleaved(rivals, options.rounds, device),
        [("adversarial curve step", "parts"), ("attack with weight gradients", "attack alone")],
    )
    report.write()


if __name__ == "__main__":
    main()
