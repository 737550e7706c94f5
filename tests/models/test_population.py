from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modeconn import data, models
from modeconn.data import TensorLoader
from modeconn.models import population, train, train_population
from modeconn.network.recipe import Recipe, constant, one_cycle
from tests.cases import Residual, Tied, frozen, mlp, same_bits

ADAM = Recipe(3, partial(torch.optim.Adam, lr=1e-2), one_cycle, weight_decay=1e-3)
MOMENTUM = Recipe(3, partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), constant, weight_decay=1e-3)
SEEDS = (7, 3, 11)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3))


def double_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def transformer() -> nn.Module:
    # Without biases: that of keys has a gradient of nothing but rounding, which Adam makes steps of.
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, bias=False)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


def networks(make, dtype=torch.float64) -> list[nn.Module]:
    made = []
    for seed in range(len(SEEDS)):
        torch.manual_seed(seed)
        made.append(make().to(dtype))
    return made


def noise(inputs: Tensor) -> Tensor:
    return inputs + 0.1 * torch.randn_like(inputs)


def loader(*shape: int, dtype=torch.float64, **settings) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(22, *shape, generator=generator, dtype=dtype)
    return TensorLoader(inputs, torch.arange(22) % 3, batch_size=8, shuffle=True, **settings)


def largest_difference(ours: list[nn.Module], theirs: list[nn.Module]) -> float:
    return max(
        (x.double() - y.double()).abs().max().item()
        for one, other in zip(ours, theirs, strict=True)
        for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


# -- a population is what its networks would be, trained one after another


@pytest.mark.parametrize("recipe", [ADAM, MOMENTUM, Recipe(3)], ids=["adam", "momentum", "default"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp, (8,)),
        (frozen, (8,)),
        (Tied, (8,)),
        (double_batch_norm, (8,)),
        (conv_net, (1, 4, 4)),
        (Residual, (1, 4, 4)),
        (transformer, (3, 4)),
    ],
    ids=["mlp", "frozen", "tied", "batch norm", "convolutions", "residual", "transformer"],
)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_every_network_ends_where_it_would_end_alone(make, shape, recipe):
    start, read = networks(make), loader(*shape, augment=(noise,))
    together = train_population(start, read, recipe=recipe, seeds=SEEDS)
    alone = [train(model, read, recipe=recipe, seed=seed) for model, seed in zip(start, SEEDS, strict=True)]
    assert largest_difference(together, alone) <= 1e-10
    assert largest_difference(together, start) > 1e-3


def test_so_it_does_in_single_precision_on_the_digits():
    read, _ = data.load("digits")
    start = [models.mlp(64, (32, 32), 10, mean=read.mean(), std=read.std() + 0.1, seed=seed) for seed in range(4)]
    recipe = Recipe(2, partial(torch.optim.SGD, lr=0.05), one_cycle)
    together = train_population(start, read, recipe=recipe, seeds=range(4, 8))
    alone = [train(model, read, recipe=recipe, seed=seed) for seed, model in enumerate(start, 4)]
    assert largest_difference(together, alone) <= 1e-5


def test_a_data_loader_keeps_its_order_too():
    inputs, targets = loader(8).inputs, loader(8).targets
    read = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)
    start = networks(mlp)
    alone = [train(model, read, recipe=ADAM, seed=seed) for model, seed in zip(start, SEEDS, strict=True)]
    assert largest_difference(train_population(start, read, recipe=ADAM, seeds=SEEDS), alone) <= 1e-10


def test_how_far_is_read_ahead_changes_no_bit(monkeypatch):
    start, read = networks(mlp), loader(8, augment=(noise,))
    expected = train_population(start, read, recipe=ADAM, seeds=SEEDS)
    for limit in (1, 2 * 3 * 8 * (8 + 1) * 8):  # one batch at a time, two
        monkeypatch.setattr(population, "_READ_AHEAD_BYTES", limit)
        found = train_population(start, read, recipe=ADAM, seeds=SEEDS)
        assert all(same_bits(x, y) for x, y in zip(found, expected, strict=True))


def test_seeds_count_from_0_and_make_the_order_alone():
    start, read = [networks(mlp)[0]] * 3, loader(8)
    found = train_population(start, read, recipe=ADAM)
    again = train_population(start, read, recipe=ADAM, seeds=(0, 1, 1))
    assert same_bits(found[0], again[0]) and same_bits(again[1], again[2])
    assert largest_difference(found[:1], found[1:2]) > 1e-6


def test_dropout_is_drawn_for_each_network():
    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))

    start = [networks(net)[0]] * 2
    first, second = train_population(start, loader(8), recipe=ADAM, seeds=(1, 1))
    assert largest_difference([first], [second]) > 1e-3


def test_bfloat16_and_float64_agree_roughly():
    start, read = networks(mlp, torch.float32), loader(8, dtype=torch.float32)
    recipe = Recipe(2, partial(torch.optim.SGD, lr=0.05), constant)
    halved = Recipe(2, partial(torch.optim.SGD, lr=0.05), constant, autocast=torch.bfloat16)
    found, expected = (train_population(start, read, recipe=one, seeds=SEEDS) for one in (halved, recipe))
    assert 0 < largest_difference(found, expected) < 1e-2


def test_networks_modes_and_random_state_are_left_as_they_were():
    start = networks(double_batch_norm)
    before, state = [{k: v.clone() for k, v in model.state_dict().items()} for model in start], torch.get_rng_state()
    trained = train_population(start, loader(8), recipe=ADAM)
    assert torch.equal(state, torch.get_rng_state())
    for model, saved in zip(start, before, strict=True):
        assert model.training and all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert not any(module.training for model in trained for module in model.modules())
    assert all(type(model) is nn.Sequential and model[1].weight.is_leaf for model in trained)


# -- what cannot be done is said before anything is


def wider() -> nn.Module:
    return mlp(9)


def bent() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(("other", "message"), [(wider, r"parameter '1.weight'"), (bent, "its modules")])
def test_networks_of_two_architectures_are_an_error(other, message):
    pair = [mlp().double(), other().double()]
    with pytest.raises(ValueError, match=rf"models\[1\] differs from models\[0\] in {message}"):
        train_population(pair, loader(8), recipe=ADAM)


def test_networks_frozen_in_different_places_are_an_error():
    pair = networks(mlp)
    pair[1][1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"models\[1\] differs .* frozen against"):
        train_population(pair, loader(8), recipe=ADAM)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="models is empty"):
        train_population([], loader(8))
    with pytest.raises(ValueError, match="no parameter to train"):
        train_population([mlp().double().requires_grad_(False)], loader(8))


def test_every_network_needs_a_seed():
    with pytest.raises(ValueError, match="one for each of the 3 networks, got 2"):
        train_population(networks(mlp), loader(8), seeds=(1, 2))


def decay_matrices_only(parameters, weight_decay):
    parameters = list(parameters)
    matrices, others = ([p for p in parameters if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, decay_matrices_only], ids=["adafactor", "by shape"])
def test_an_optimizer_that_mixes_networks_is_an_error(optimizer):
    with pytest.raises(ValueError, match="does not act on every weight by itself"):
        train_population(networks(mlp), loader(8), recipe=Recipe(1, optimizer))


def test_an_optimizer_that_needs_a_closure_is_an_error():
    recipe = Recipe(1, lambda weights, **_: torch.optim.LBFGS(weights))
    with pytest.raises(ValueError, match=r"makes no step along gradients alone \(.*closure"):
        train_population(networks(mlp), loader(8), recipe=recipe)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x.view(len(x), 2, 4))[0][:, -1])


def cumulative() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3))


@pytest.mark.parametrize(("make", "layer"), [(Sequence, r"'memory' \(GRU\)"), (cumulative, r"'1' \(BatchNorm1d\)")])
def test_a_layer_that_vmap_does_not_know_is_named(make, layer):
    with pytest.raises(ValueError, match=rf"{layer} cannot be run for many networks at once .* one by one"):
        train_population(networks(make), loader(8), recipe=ADAM)


def test_one_loss_scale_for_all_networks_is_an_error():
    with pytest.raises(ValueError, match="float16"):
        train_population(networks(mlp), loader(8), recipe=Recipe(1, autocast=torch.float16))


def test_a_target_that_is_no_class_is_an_error():
    read = loader(8, num_classes=9)
    read.targets[5] = 8
    with pytest.raises(ValueError, match=r"0\.\.2, the model's 3 classes, got a target of 8"):
        train_population(networks(mlp), read, recipe=ADAM)


def test_targets_are_classes_or_probabilities_of_classes_for_the_default_loss():
    read = [(x, torch.rand(len(x), 3, dtype=x.dtype).softmax(1)) for x, _ in loader(8)]
    train_population(networks(mlp), read, recipe=ADAM)
    with pytest.raises(ValueError, match=r"targets of loader are real numbers, .*Pass loss_fn="):
        train_population(networks(mlp), [(x, 2 * y) for x, y in read], recipe=ADAM)


def test_a_loss_that_is_not_finite_names_its_network():
    start = networks(mlp)
    start[1][1].weight.data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"models\[1\] became nan in epoch 0, step 0"):
        train_population(start, loader(8), recipe=ADAM)


def test_batches_that_cannot_be_stacked_are_an_error():
    with pytest.raises(ValueError, match="pairs of dense tensors, which can be stacked, got tuple of"):
        train_population(networks(mlp), [({"x": torch.rand(4, 8)}, torch.arange(4) % 3)], recipe=ADAM)
