"""Balanced networks: the same function, the least sum of squares, and one network for all scales of it."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn import WeightMatching, balance


class Residual(nn.Module):
    """A stream that two blocks add to: one scale for all that makes it and all that reads it, and one in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.up, self.down = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((6, 5), (5, 6)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(up(h.relu()).relu())
        return self.head(h.relu())


def perceptron(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), between[0], nn.Linear(8, 6), between[-1], nn.Linear(6, 3))


def image_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(20, 7), nn.PReLU(), nn.Linear(7, 4),
    )  # fmt: skip


NETWORKS = {
    "ReLU": (lambda: perceptron(nn.ReLU()), (5, 4), 2),
    "images": (image_network, (2, 3, 8, 8), 3),
    "residual": (Residual, (5, 4), 3),
    "one of two": (lambda: perceptron(nn.GELU(), nn.ReLU()), (5, 4), 1),
    "GELU and tanh": (lambda: perceptron(nn.GELU(), nn.Tanh()), (5, 4), 0),
    "a norm": (lambda: perceptron(nn.LayerNorm(8), nn.ReLU()), (5, 4), 1),
    "batch norm": (lambda: perceptron(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), nn.ReLU()), (5, 4), 1),
}


def drawn(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    build, shape, _ = NETWORKS[name]
    torch.manual_seed(seed)
    return build().double().eval(), torch.rand(shape, dtype=torch.float64)


def sum_of_squares(model: nn.Module) -> float:
    return sum(float(parameter.detach().square().sum()) for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_no_scale_of_a_unit_has_a_smaller_sum_of_squares(name):
    model, x = drawn(name)
    before = copy.deepcopy(model.state_dict())
    even = balance(model, x)
    torch.testing.assert_close(even(x), model(x), atol=1e-12, rtol=1e-10)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert (sum_of_squares(even) < sum_of_squares(model) - 1e-3) == (NETWORKS[name][2] > 0)
    torch.testing.assert_close(balance(even, x).state_dict(), even.state_dict())
    layers = [layer for layer in even.modules() if isinstance(layer, nn.Linear)] if name == "ReLU" else []
    for makes, reads in pairwise(layers):
        made = makes.weight.square().sum(1) + makes.bias.square()
        torch.testing.assert_close(made, reads.weight.square().sum(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["ReLU", "images", "residual"])
def test_planted_scales_are_undone_and_a_planted_permutation_is_found_below_them(name):
    model, x = drawn(name)
    spec = modeconn.discover(model, x)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        first, then = (
            (scaled.stem, scaled.up) if name == "residual" else (scaled[0], scaled[2] if name == "ReLU" else scaled[3])
        )
        if name == "residual":
            factors = torch.rand(5, dtype=torch.float64) * 20 + 0.1
            for layer in (then[0],):
                layer.weight.mul_(factors[:, None])
                layer.bias.mul_(factors)
            scaled.down[0].weight.div_(factors)
        else:
            factors = torch.rand(len(first.bias), dtype=torch.float64) * 20 + 0.1
            first.weight.mul_(factors.view(-1, *[1] * (first.weight.dim() - 1)))
            first.bias.mul_(factors)
            then.weight.div_(factors.view(1, -1, *[1] * (then.weight.dim() - 2)))
    torch.testing.assert_close(scaled(x), model(x))
    torch.testing.assert_close(balance(scaled, x, spec=spec).state_dict(), balance(model, x).state_dict())
    planted = spec.random(torch.Generator().manual_seed(1))
    ends = balance(model, x), balance(planted.apply(scaled), x)
    found = modeconn.align(*ends, method=WeightMatching(num_starts=5), spec=spec)
    torch.testing.assert_close(found.model_b.state_dict(), ends[0].state_dict())


def test_single_precision_and_what_is_no_part_of_it():
    model, x = drawn("ReLU")
    even = balance(model.float(), x.float())
    torch.testing.assert_close(even(x.float()), model(x.float()))
    assert next(even.parameters()).dtype == torch.float32
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # of a unit that nobody reads no scale is the balanced one
    even = balance(model, x.float())
    torch.testing.assert_close(even[0].weight[3], model[0].weight[3])
    other = perceptron(nn.ReLU())
    with pytest.raises(ValueError, match="this spec is of another model"):
        balance(nn.Sequential(*other[:3]), x.float(), spec=modeconn.discover(other, x.float()))
    with pytest.raises(ValueError, match="outputs= is for discovery"):
        balance(other, x.float(), spec=modeconn.discover(other, x.float()), outputs="x")


def test_layers_that_share_their_weights_are_scaled_as_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = torch.rand(5, 6, dtype=torch.float64)
    even = balance(model, x)
    torch.testing.assert_close(even(x), model(x))
    assert even[2].weight is even[0].weight
    residual, inputs = drawn("residual")
    residual.up[1].weight, residual.up[1].bias = residual.up[0].weight, residual.up[0].bias
    residual.down[1].weight = residual.down[0].weight
    even = balance(residual, inputs)
    torch.testing.assert_close(even(inputs), residual(inputs))
    assert sum_of_squares(even) < sum_of_squares(residual) - 1e-3


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = perceptron(nn.ReLU())
    with pytest.raises(ValueError, match="model is on the meta device"):
        balance(model, torch.rand(2, 4))
