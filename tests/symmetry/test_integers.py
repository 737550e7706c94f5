"""Inputs that are whole numbers, which the model scales itself: proved and aligned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn


class Scaled(nn.Module):
    """A perceptron that makes real numbers of whole ones in its own way."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.scale, self.first, self.last = scale, nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.scale(self, x)).relu())


WAYS = {
    "division": lambda model, x: x / 255,
    "float": lambda model, x: x.float().div(255).sub(0.5),
    "the weights' type": lambda model, x: x.to(model.first.weight.dtype) * 0.01,
    "a mean": lambda model, x: x - x.float().mean(1, keepdim=True),
    "one hot": lambda model, x: F.one_hot(x[:, 0].long() % 12, 12).type_as(model.first.weight) + x.bool().float(),
    "positions": lambda model, x: x * 0 + torch.arange(x.shape[1], device=x.device) / x.shape[1],
    "a root": lambda model, x: x.sqrt() * 0.1,
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_integer_inputs_are_proved_and_a_planted_permutation_is_found(way, dtype):
    torch.manual_seed(0)
    x, model = torch.randint(1, 256, (40, 12), dtype=dtype), Scaled(way).eval()
    spec = modeconn.discover(model, x)
    assert spec.verify(model, x) < 1e-9 and [group.size for group in spec.groups] == [8]
    planted = spec.random(torch.Generator().manual_seed(1))
    found = modeconn.align(model, planted.apply(model), method=modeconn.WeightMatching(), example_input=x)
    assert found.permutation == planted.inverse()
    relabelled = modeconn.align(model, planted.apply(model), [(x, torch.zeros(40, dtype=torch.int64))])
    torch.testing.assert_close(relabelled.model_b(x), model(x))
