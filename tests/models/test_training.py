from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeconn
from modeconn import data, models
from modeconn.data import TensorLoader
from modeconn.models.training import DIGITS_RECIPE, train, train_snapshots
from modeconn.network.recipe import Recipe, constant

from ..cases import CASES, batches, same_bits

SGD = partial(torch.optim.SGD, lr=0.1)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def small_loader(**settings) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(22, 4, generator=generator, dtype=torch.float64)
    return TensorLoader(inputs, torch.randint(0, 3, (22,), generator=generator), batch_size=8, **settings)


def small_model(seed: int = 0) -> nn.Module:
    return models.mlp(4, (5,), 3, seed=seed).double()


def accuracy(model: nn.Module, loader: TensorLoader) -> float:
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / loader.num_examples


@pytest.mark.parametrize("recipe", [DIGITS_RECIPE, Recipe()], ids=["digits", "default"])
def test_a_perceptron_learns_the_digits(recipe):
    train, test = data.load("digits")
    model = models.mlp(64, (128, 128), 10, mean=train.mean(), std=train.std() + 0.1, seed=1)
    trained = models.train(model, train, recipe=recipe, seed=1)
    assert accuracy(trained, test) >= 0.96


def test_steps_are_those_of_a_plain_loop():
    loader, model = small_loader(), small_model()
    recipe = Recipe(epochs=3, optimizer=SGD, schedule=lambda epoch, epochs: 1 - epoch / epochs, weight_decay=0.01)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=0.01)
    for epoch in range(3):
        for step, (inputs, targets) in enumerate(loader):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - (epoch + step / 3) / 3)
            optimizer.zero_grad()
            F.cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
    torch.testing.assert_close(weights(models.train(model, loader, recipe=recipe)), weights(expected))


def test_a_loader_without_length_is_counted():
    class Unsized:
        def __iter__(self):
            return iter(small_loader())

    recipe = Recipe(epochs=2, optimizer=SGD, schedule=lambda epoch, epochs: 1 - epoch / epochs)
    with_length = models.train(small_model(), small_loader(), recipe=recipe)
    assert torch.equal(weights(models.train(small_model(), Unsized(), recipe=recipe)), weights(with_length))


def test_the_model_its_mode_and_the_random_state_stay_as_they_were():
    model = models.build("tinyten", num_classes=3, image_size=9, seed=2).train()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    loader = TensorLoader(torch.rand(6, 3, 9, 9), torch.tensor([0, 1, 2, 0, 1, 2]), shuffle=True)
    torch.set_rng_state(before)
    trained = models.train(model, loader, recipe=Recipe(epochs=1))

    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in trained.modules())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *trained.parameters()])
    assert not torch.equal(trained.features[1].running_mean, model.features[1].running_mean)
    assert models.describe(trained) == models.describe(model)


def test_the_seed_alone_decides_order_and_dropout():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, 3)).double()
    recipe = Recipe(epochs=2)
    results = []
    for seed, outside in ((1, 5), (1, 6), (2, 5)):
        with torch.random.fork_rng():
            torch.manual_seed(outside)
            results.append(weights(models.train(model, small_loader(shuffle=True), recipe=recipe, seed=seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_frozen_parameters_stay():
    model = small_model()
    model.layers[0].requires_grad_(False)
    trained = models.train(model, small_loader(), recipe=Recipe(epochs=2))
    assert torch.equal(trained.layers[0].weight, model.layers[0].weight)
    assert not torch.equal(trained.layers[2].weight, model.layers[2].weight)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="model has no parameter to train"):
        models.train(small_model().requires_grad_(False), small_loader())


def test_auxiliary_heads_are_trained():
    model = models.googlenet(2, image_size=8)
    loader = [(model.example_input(), torch.tensor([0, 1]))]
    trained = models.train(model, loader, recipe=Recipe(epochs=1, optimizer=SGD, weight_decay=0.0))
    for before, after in ((model.auxiliary1, trained.auxiliary1), (model.auxiliary2, trained.auxiliary2)):
        assert not torch.equal(before[-1].bias, after[-1].bias)


def test_forward_replaces_the_reading_of_batches():
    loader = [{"x": inputs, "y": targets} for inputs, targets in small_loader()]

    def forward(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    recipe = Recipe(epochs=2)
    expected = models.train(small_model(), small_loader(), recipe=recipe)
    assert torch.equal(weights(models.train(small_model(), loader, recipe=recipe, forward=forward)), weights(expected))


def test_loss_fn_is_what_is_minimised():
    targets = torch.full((8, 3), 0.25, dtype=torch.float64)
    loader = [(inputs[:8], targets) for inputs, _ in small_loader().with_(batch_size=11)]
    recipe = Recipe(epochs=200, schedule=constant, weight_decay=0.0, optimizer=partial(torch.optim.Adam, lr=0.02))
    trained = models.train(small_model(), loader, recipe=recipe, loss_fn=F.mse_loss)
    assert F.mse_loss(trained(loader[0][0]), targets) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_precision_of_the_forward_pass_alone(dtype):
    seen = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs.float(), targets)

    loader = small_loader()
    loader = loader.with_(inputs=loader.inputs.float())
    model = models.mlp(4, (5,), 3)
    full = models.train(model, loader, recipe=Recipe(epochs=5))
    trained = models.train(model, loader, recipe=Recipe(epochs=5, autocast=dtype), loss_fn=loss_fn)
    assert set(seen) == {dtype} and weights(trained).dtype == torch.float32
    torch.testing.assert_close(weights(trained), weights(full), rtol=0, atol=0.05)  # bfloat16 keeps 8 bits
    assert not torch.equal(weights(trained), weights(full))


def test_gradients_too_small_for_float16_are_scaled():
    loader = small_loader()
    loader = loader.with_(inputs=loader.inputs.float())
    model = models.mlp(4, (5,), 3)
    recipe = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=1e7), weight_decay=0.0)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1e-8 * F.cross_entropy(outputs.float(), targets)

    full = models.train(model, loader, recipe=recipe, loss_fn=loss_fn)
    half = models.train(model, loader, recipe=replace(recipe, autocast=torch.float16), loss_fn=loss_fn)
    assert (weights(full) - weights(model)).abs().max() > 0.01
    torch.testing.assert_close(weights(half), weights(full), rtol=0, atol=1e-3)


def test_compile_runs_the_compiled_model(monkeypatch):
    compiled = []

    def spy(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", spy)
    trained = models.train(small_model(), small_loader(), recipe=Recipe(epochs=1, compile=True))
    assert compiled == [trained]


def test_a_loss_that_is_not_finite_names_epoch_and_step():
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(targets)
        return F.cross_entropy(outputs, targets) * (float("nan") if len(calls) == 5 else 1.0)

    with pytest.raises(FloatingPointError, match=r"loss became nan in epoch 1, step 1\. Lower the learning"):
        models.train(small_model(), small_loader(), recipe=Recipe(epochs=9), loss_fn=loss_fn)
    assert len(calls) == 6  # not an epoch longer


@pytest.mark.parametrize(("target", "position"), [(3, 0), (-1, 21)])  # in the first batch, in the last
def test_targets_outside_the_classes_are_named(target, position):
    loader = small_loader()
    batches = [(inputs, targets.clone()) for inputs, targets in loader]
    batches[position // 8][1][position % 8] = target
    with pytest.raises(ValueError, match=rf"must lie in 0\.\.2, the model's 3 classes, got a target of {target}"):
        models.train(small_model(), batches)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (iter([]), "loader can be read only once"),
        (torch.zeros(3, 4), r"loader must yield \(inputs, targets\) batches, got one tensor"),
        ([torch.zeros(3, 4)], r"loader must yield \(inputs, targets\) pairs, but its first batch is one Tensor"),
    ],
)
def test_a_loader_that_cannot_be_trained_on_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        models.train(small_model(), loader)


def test_progress_is_logged_not_printed(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="modeconn.models.training"):
        models.train(small_model(), small_loader(), recipe=Recipe(epochs=2))
    assert [record.message.partition(": training loss")[0] for record in caplog.records] == [
        "epoch 1 of 2",
        "epoch 2 of 2",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_is_shown_on_request(capsys):
    models.train(small_model(), small_loader(), recipe=Recipe(epochs=2), progress=True)
    assert "2/2" in capsys.readouterr().err


def test_snapshots_are_runs_that_go_on_from_each_other(tmp_path):
    recipe = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1), schedule=modeconn.triangular)
    model, loader = CASES[0].make(1), batches()
    found = train_snapshots(model, loader, cycles=3, recipe=recipe, seed=5, checkpoint=tmp_path / "run")
    expected = model
    for number, network in enumerate(found):
        expected = train(expected, loader, recipe=recipe, seed=5 + number)
        assert same_bits(network, expected) and not network.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.1", "run.2", "run.3"]
    again = train_snapshots(model, loader, cycles=3, recipe=recipe, seed=5, checkpoint=tmp_path / "run")
    assert all(same_bits(one, other) for one, other in zip(again, found, strict=True))
    chain = modeconn.Connection.through(found)
    accuracies = chain.predict(loader, num_points=3).ensemble_accuracy
    together = modeconn.Ensemble(found)
    right = torch.cat([together(x).argmax(1) == y for x, y in loader])
    assert float(accuracies[-1]) == pytest.approx(float(right.double().mean()))
    with pytest.raises(ValueError, match="cycles must be at least 1, got cycles=0"):
        train_snapshots(model, loader, cycles=0, recipe=recipe)
