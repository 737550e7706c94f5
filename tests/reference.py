"""Slow and obvious versions of what modeconn computes fast."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modeconn.curves import Curve
from modeconn.network.recipe import Recipe
from modeconn.network.weights import WeightSpace


def de_casteljau(control_points: Tensor, t: float) -> Tensor:
    """A Bezier curve by repeated straight-line interpolation."""
    points = control_points
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def walk_chain(control_points: Tensor, t: float) -> Tensor:
    """A polygonal chain by finding the segment first."""
    position = t * (len(control_points) - 1)
    start = min(int(position), len(control_points) - 2)
    return torch.lerp(control_points[start], control_points[start + 1], position - start)


def sampled_length(curve: Curve, control_points: Tensor, t: float = 1.0, num_points: int = 20_001) -> float:
    """The length of a curve up to t by summing many short chords."""
    positions = torch.linspace(0, t, num_points, dtype=torch.float64)
    return float((curve.basis(positions) @ control_points.double()).diff(dim=0).norm(dim=1).sum())


def pooled_statistics(model: nn.Module, data: list) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of everything that reaches each batch-norm layer, which normalises batch by batch."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.register_forward_hook(
                lambda module, args, _, name=name: seen.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1))
            )
    with torch.no_grad():
        for inputs, _ in data:
            model(inputs)
    values = {name: torch.cat(rows, dim=1) for name, rows in seen.items()}
    return {name: (value.mean(1), value.var(1)) for name, value in values.items()}


def fit_by_autograd(
    model: nn.Module,
    curve: Curve,
    control_points: Tensor,
    recipe: Recipe,
    data: list,
    positions: list[float],
) -> Tensor:
    """Learn a curve by differentiating through basis, mixing and penalty, one step for each batch and position."""
    model = copy.deepcopy(model).train()
    space = WeightSpace(model)
    fixed = control_points.clone()
    inner = nn.Parameter(control_points[curve.trained].clone())
    optimizer = recipe.make_optimizer([inner])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for index, t in enumerate(positions):
        recipe.set_learning_rate(optimizer, index / len(data))
        points = fixed.clone()
        points[curve.trained] = inner
        theta = curve.basis(t).to(points) @ points
        inputs, targets = data[index % len(data)]
        views = {name: v.detach() if name in frozen else v for name, v in space.unflatten(theta).items()}
        outputs = functional_call(copy.deepcopy(model), views, (inputs,))  # it spoils a module of two names
        penalty = sum((view**2).sum() for name, view in views.items())
        optimizer.zero_grad()
        (nn.functional.cross_entropy(outputs, targets) + recipe.weight_decay / 2 * penalty).backward()
        optimizer.step()
    points = fixed.clone()
    points[curve.trained] = inner.detach()
    return points
