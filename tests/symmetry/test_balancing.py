"""Balanced networks: the same function, the least sum of squares, and one network for all scales of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import modeconn
from modeconn import WeightMatching, balance
from modeconn.symmetry import balancing


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


class Two(nn.Module):
    """A hidden layer with a head, and something else that reads its units."""

    def __init__(self, also: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.side = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.also = also
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x).relu()
        return self.also(self, self.head(h), self.side(h))


X = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
READERS = {
    "in train mode alone": lambda m, y, z: (y, z) if m.training else y,
    "as complex numbers": lambda m, y, z: (y, torch.complex(z, z)),
    "as the largest": lambda m, y, z: (y, z.argmax(1)),
    "beside it": lambda m, y, z: (y, z),
}


@pytest.mark.parametrize("also", READERS.values(), ids=READERS)
def test_all_that_reads_a_unit_counts_whatever_the_mode_and_the_type(also):
    model = Two(also)
    even = balance(model, X)
    for mode in (True, False):
        ours, theirs = (pytree.tree_leaves(net.train(mode)(X)) for net in (even, model))
        assert all(torch.allclose(x, y) for x, y in zip(ours, theirs, strict=True))


def test_bounds_that_only_the_own_weights_or_large_scales_meet_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU6(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[2].weight *= 2000
    torch.testing.assert_close(balance(model, X)(X), model(X))
    normed = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, eps=1e-7, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3)
    )
    torch.testing.assert_close(balance(normed.double(), X)(X), normed(X))


def test_many_examples_hide_no_unit():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(24, 24), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(24, 3)).double()
    x = torch.randn(20_000, 24, dtype=torch.float64)
    spec = modeconn.discover(model, x)
    assert balancing._scaled_groups(spec, model, x).keys() == {group.name for group in spec.groups}


def test_a_spec_of_untied_layers_and_one_of_another_model():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    tied[2].weight = tied[0].weight
    even = balance(tied, X, spec=modeconn.discover(tied, X, untie=True))
    torch.testing.assert_close(even(X), tied(X))
    assert even[2].weight is not even[0].weight
    smooth = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).double()
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="this spec is of another model"):
        balance(smooth, X, spec=modeconn.discover(plain, X))


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_paths_that_values_choose_are_refused():
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            return self.head(3 * h if float(h.sum()) > 40 else h)

    with pytest.raises(ValueError, match=r"torch\.export cannot follow Chosen, so it cannot be balanced"):
        balance(Chosen().double(), X)


def test_inputs_by_name_and_a_single_number():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron(nn.ReLU()).double()
            self.turn = nn.Parameter(torch.tensor([0.5 + 1j], dtype=torch.complex128))

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image) * self.turn.abs()

    model = Named()
    even = balance(model, {"image": X})
    torch.testing.assert_close(even(X), model(X))
    assert torch.equal(even.turn, model.turn) and not torch.equal(even.net[0].weight, model.net[0].weight)
    one = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    assert not torch.equal(balance(one, X[:1])[0].weight, one[0].weight)
