"""Merging: ends are exact, relabelled copies merge into the original, pairs compose, statistics are interpolated."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import modeconn
from modeconn import (
    ActivationMatching,
    Bezier,
    Connection,
    StraightThrough,
    WeightMatching,
    data,
    interpolate,
    merge_many,
    models,
)
from modeconn.curves.path import Path
from modeconn.models.training import DIGITS_RECIPE, train
from modeconn.network.batch_norm import calibration_batches, recalibrate
from modeconn.network.loss import TrainingData
from modeconn.network.repair import measure, mix
from tests.cases import CASE, DEVICE, batches, same_bits
from tests.cli.test_app import run
from tests.symmetry.cases import CASES

SYMMETRY = {case.name: case for case in CASES}


def pair(name: str = "mlp") -> tuple[nn.Module, nn.Module]:
    return tuple(CASE[name].make(seed, torch.float64) for seed in (1, 2))


def loader() -> list:
    return batches(last=5, dtype=torch.float64)


def copies(name: str, count: int = 4) -> tuple[list[nn.Module], modeconn.PermutationSpec]:
    """A network and relabelled copies of it, in float64."""
    torch.manual_seed(0)
    model, inputs = SYMMETRY[name].build().double().eval(), SYMMETRY[name].inputs()
    spec = modeconn.discover(model, inputs.double() if inputs.is_floating_point() else inputs)
    generator = torch.Generator().manual_seed(3)
    return [model, *(spec.random(generator).apply(model) for _ in range(count - 1))], spec


def strangers(name: str, count: int = 3) -> tuple[list[nn.Module], modeconn.PermutationSpec]:
    """Networks of one architecture that have nothing to do with each other."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(SYMMETRY[name].build().double().eval())
    return found, modeconn.discover(found[0], SYMMETRY[name].inputs().double())


class Unnormalised(nn.Module):
    """What a repair rescales: layers grouped, transposed, over one dimension, over tokens, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.line = nn.Conv1d(4, 5, 3)
        self.tokens = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).relu()).relu()
        x = self.line(self.up(x).relu().flatten(2)).relu()
        tokens = self.tokens(x.mT)
        return self.head(tokens.relu().mean(1)) + self.head(tokens.tanh().mean(1))


def unnormalised_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    return Unnormalised().double().to(DEVICE), Unnormalised().double().eval().to(DEVICE)


# ---------------------------------------------------------------- two


@pytest.mark.parametrize("name", list(CASE))
def test_ends_are_exact_and_the_middle_is_the_mean_of_the_weights(name):
    a, b = pair(name)
    assert same_bits(interpolate(a, b, 0.0), a)
    assert same_bits(interpolate(a, b, 1.0), b)
    middle = interpolate(a, b, recalibrate=loader())
    for m, x, y in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(m, (x + y) / 2)


def test_interpolation_recalibrates_as_a_connection_does():
    a, b = pair("residual")
    line = Connection.straight_between(a, b, training=TrainingData(loader()))
    assert same_bits(interpolate(a, b, 0.3, recalibrate=loader()), line.model_at(0.3))
    with pytest.raises(ValueError, match="batch norm needs statistics of training data"):
        interpolate(a, b, 0.3)


def test_interpolation_refuses_other_architectures_nan_and_other_positions():
    a, b = pair()
    with pytest.raises(ValueError, match=r"endpoints differ at '1.weight': \(8, 8\) in a, \(4, 8\) in b"):
        interpolate(a, nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).double())
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        interpolate(a, b, 1.2)
    with torch.no_grad():
        b[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'1.weight' of b holds NaN"):
        interpolate(a, b)


# ---------------------------------------------------------------- many


@pytest.mark.parametrize("start", [None, WeightMatching()], ids=["from where they are", "from the first"])
@pytest.mark.parametrize("name", ["plain", "grouped", "u-net", "attention 3hd", "attention chunk"])
def test_relabelled_copies_of_a_network_merge_into_it(name, start):
    networks, spec = copies(name)
    merged = merge_many(networks, spec=spec, start=start)
    for m, original in zip(merged.model.parameters(), networks[0].parameters(), strict=True):
        torch.testing.assert_close(m, original, rtol=1e-10, atol=1e-12)
    for permutation, network in zip(merged.permutations, networks, strict=True):
        assert same_bits(permutation.apply(network), networks[0])


def test_activations_merge_relabelled_copies_through_means_whose_batch_norm_is_recalibrated():
    model = CASE["residual"].make(1, torch.float64)
    recalibrate(model, loader())
    spec = modeconn.discover(model, loader()[0][0])
    networks = [model, *(spec.random(torch.Generator().manual_seed(s)).apply(model) for s in range(2))]
    merged = merge_many(networks, loader(), method=ActivationMatching(), start=ActivationMatching(), spec=spec)
    assert all(same_bits(p.apply(m), model) for p, m in zip(merged.permutations, networks, strict=True))
    expected = copy.deepcopy(model)
    recalibrate(expected, calibration_batches(loader(), torch.device("cpu")))
    torch.testing.assert_close(merged.model.state_dict(), expected.state_dict())


def test_a_method_sees_means_with_recalibrated_batch_norm():
    class Watching:
        def match(self, spec, model_a, model_b, loader):
            means.append(copy.deepcopy(model_a))
            return WeightMatching().match(spec, model_a, model_b)

    means: list[nn.Module] = []
    merge_many([CASE["residual"].make(seed, torch.float64) for seed in range(3)], loader(), method=Watching())
    for mean in means:
        again = copy.deepcopy(mean)
        recalibrate(again, calibration_batches(loader(), torch.device("cpu")))
        assert same_bits(again, mean)
    assert len(means) >= 6


class Shifted(nn.Module):
    """A layer whose units differ by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 10, bias=False), nn.Linear(10, 3)
        self.register_buffer("shift", torch.linspace(-3, 3, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x) + self.shift))


def test_the_mean_of_the_others_has_their_buffers_under_their_names():
    class Watching:
        def match(self, spec, model_a, model_b, loader):
            if torch.allclose(model_a.inner.weight, model_b.inner.weight):
                shifts.append((model_a.shift.clone(), model_b.shift))
            return WeightMatching().match(spec, model_a, model_b)

    torch.manual_seed(0)
    a, shifts = Shifted(), []
    spec = modeconn.discover(a, torch.rand(2, 6))
    b = spec.random(torch.Generator().manual_seed(9)).apply(a)
    merge_many([a, b, b, b], method=Watching(), spec=spec, seed=3)
    assert shifts and all(torch.equal(*pair) for pair in shifts)


@pytest.mark.parametrize("start", [None, WeightMatching()], ids=["from where they are", "from the first"])
@pytest.mark.parametrize("method", [WeightMatching(), ActivationMatching()], ids=["weights", "activations"])
def test_the_networks_come_closer_with_every_step_and_the_mean_is_theirs(method, start):
    networks, spec = strangers("plain", 4)
    inputs = [(torch.randn(50, 5, dtype=torch.float64), None)]
    merged = merge_many(networks, inputs, method=method, start=start, spec=spec)
    rounds = merged.history[start is not None :]
    assert len(rounds) > 1
    assert all(later < earlier for earlier, later in pairwise(rounds))
    relabelled = [p.apply(m) for p, m in zip(merged.permutations, networks, strict=True)]
    distance = 0.0
    for mean, *theirs in zip(merged.model.parameters(), *(m.parameters() for m in relabelled), strict=True):
        torch.testing.assert_close(mean, torch.stack(theirs).mean(0))
        distance += sum(float((one - mean).detach().square().sum()) for one in theirs)
    assert distance == pytest.approx(merged.history[-1])


def test_no_round_and_no_start_is_the_mean_of_the_networks_as_they_are():
    networks, spec = strangers("plain")
    merged = merge_many(networks, num_rounds=0, spec=spec)
    assert all(permutation == spec.identity() for permutation in merged.permutations)
    naive = torch.stack([m[0].weight for m in networks]).mean(0)
    torch.testing.assert_close(merged.model[0].weight, naive)
    assert len(merged.history) == 1


def test_the_order_is_drawn_from_the_seed_and_the_random_state_stays():
    networks, spec = strangers("plain", 4)
    state = torch.get_rng_state()
    first, again = (merge_many(networks, spec=spec, seed=1) for _ in range(2))
    assert same_bits(first.model, again.model) and first.history == again.history
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "method",
    [ActivationMatching(num_examples=16), StraightThrough(num_steps=2, num_rounds=1)],
    ids=["activations", "straight-through"],
)
def test_a_loader_that_shuffles_leaves_the_mean_and_the_random_state_to_themselves(method):
    networks = [models.mlp(6, (16,), 3, seed=seed) for seed in range(3)]
    inputs = torch.rand(400, 6, generator=torch.Generator().manual_seed(0))
    data, found = DataLoader(TensorDataset(inputs, torch.arange(400) % 3), batch_size=8, shuffle=True), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(merge_many(networks, data, method=method, start=method, num_rounds=2, repair=True))
        assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(*(merged.model for merged in found)) and found[0].history == found[1].history


@pytest.mark.parametrize("rounds", [0, 100], ids=["start", "rounds"])
@pytest.mark.parametrize("name", ["plain", "grouped", "attention 3hd"])
def test_relabellings_of_pairs_compose_exactly_with_the_blocks(name, rounds):
    networks, spec = strangers(name)
    merged = merge_many(networks, spec=spec, start=WeightMatching(), num_rounds=rounds)
    assert merged.permutations[0] == spec.identity()
    assert merged.pairwise(0, 1) @ merged.pairwise(1, 2) @ merged.pairwise(2, 0) == spec.identity()
    alone = [WeightMatching().match(spec, networks[i], networks[j]).permutation for i, j in ((0, 1), (1, 2), (2, 0))]
    assert alone[0] @ alone[1] @ alone[2] != spec.identity()
    relabelled = merged.pairwise(1, 2).apply(networks[2])  # beside network 1, in network 1's own names
    assert same_bits(merged.permutations[1].apply(relabelled), merged.permutations[2].apply(networks[2]))


def test_merging_leaves_the_networks_as_they_were():
    networks = [CASE["residual"].make(seed, torch.float64).train() for seed in (1, 2, 3)]
    before = copy.deepcopy(networks)
    merged = merge_many(networks, loader(), start=ActivationMatching(), repair=True)
    assert all(same_bits(now, then) and now.training for now, then in zip(networks, before, strict=True))
    assert not merged.model.training
    assert repr(merged).startswith("Merge(3 networks, squared distance from their mean ")


def test_merging_refuses_what_does_not_belong_together():
    a, b = (models.mlp(8, (6,), 3, seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match="fewer than two networks, got 1"):
        merge_many([a])
    with pytest.raises(ValueError, match=r"'layers.2.weight': \(3, 6\) in models\[0\], \(4, 6\) in models\[2\]"):
        merge_many([a, b, models.mlp(8, (6,), 4)])
    for name in ("method", "start"):
        with pytest.raises(ValueError, match=f"{name} must be an object with a match"):
            merge_many([a, b], **{name: modeconn.align(a, b).permutation})
    with pytest.raises(ValueError, match="num_rounds must be at least 0"):
        merge_many([a, b], num_rounds=-1)
    with pytest.raises(ValueError, match=r"training data for repair: pass loader="):
        merge_many([a, b], repair=True)
    with pytest.raises(ValueError, match=r"training data for batch norm: pass loader="):
        merge_many(list(pair("residual")))
    with pytest.raises(ValueError, match=r"pass loader=, or use WeightMatching"):
        merge_many([a, b], method=ActivationMatching())
    with torch.no_grad():
        b.layers[0].bias[1] = torch.inf
    with pytest.raises(ValueError, match=r"'layers.0.bias' of models\[1\] holds NaN or infinite"):
        merge_many([a, b])


def test_the_command_merges_files_as_the_function_does(tmp_path):
    networks = [models.mlp(64, (8,), 10, seed=seed) for seed in (1, 2, 3)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for network, path in zip(networks, files, strict=True):
        models.save(network, path)
    out = tmp_path / "merged.safetensors"
    text = run("merge", *files, "--data", "digits", "--start", "activation", "--repair", "--out", out).stdout
    training, _ = data.load("digits")
    expected = merge_many(networks, training, start=ActivationMatching(), repair=True)
    assert same_bits(models.load(out), expected.model)
    assert "Merge(3 networks" in text and "Their mean on the test set: loss" in text
    assert same_bits(models.load(files[0]), networks[0])
    assert "fewer than two networks, got 1" in run("merge", files[0], "--out", tmp_path / "one", code=1).stderr


# ---------------------------------------------------------------- repair


def assert_statistics(model: nn.Module, networks: list[nn.Module], weights: list[float], values: list) -> None:
    """Compare with values kept whole."""

    def whole(model: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {}
        model = copy.deepcopy(model).eval()
        for name, layer in model.named_modules():
            if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                continue
            dim = -1 if isinstance(layer, nn.Linear) else 1
            layer.register_forward_hook(
                lambda _, args, out, name=name, dim=dim: seen.setdefault(name, []).append(
                    out.transpose(0, dim).flatten(1)
                )
            )
        with torch.no_grad():
            for inputs, _ in values:
                model(inputs)
        return {name: torch.cat(rows, 1) for name, rows in seen.items()}

    theirs = [whole(network) for network in networks]
    for name, ours in whole(model).items():
        for statistic in (torch.mean, torch.std):
            target = sum(w * statistic(one[name], 1) for w, one in zip(weights, theirs, strict=True))
            torch.testing.assert_close(statistic(ours, 1), target, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_a_repaired_network_has_the_interpolated_statistics_in_every_layer(t):
    a, b = unnormalised_pair()
    middle = interpolate(a, b, t)
    repaired = modeconn.repair(middle, [a, b], loader(), weights=(1 - t, t))
    with pytest.raises(AssertionError):
        assert_statistics(middle, [a, b], [1 - t, t], loader())
    assert_statistics(repaired, [a, b], [1 - t, t], loader())
    same = interpolate(a, b, t, recalibrate=loader(), repair=True)
    torch.testing.assert_close(same.state_dict(), repaired.state_dict())
    assert a.training and not repaired.training


def test_points_of_a_curve_are_repaired_between_its_ends_and_only_there():
    a, b = unnormalised_pair()
    line = Connection.straight_between(a, b)
    points = torch.cat(
        [line.control_points[:1], line.control_points.mean(0, keepdim=True) + 0.1, line.control_points[1:]]
    )
    curve = Connection(Path(a, Bezier(2), points, line.buffers, training=TrainingData(loader())))
    assert_statistics(curve.model_at(0.25, repair=True), [a, b], [0.75, 0.25], loader())
    assert same_bits(curve.model_at(0, repair=True), a) and same_bits(curve.model_at(1, repair=True), b)
    profile = curve.evaluate(loader(), num_points=5, repair=True)
    repaired = Connection.straight_between(*[curve.model_at(0.25, repair=True)] * 2).evaluate(loader(), num_points=2)
    assert float(profile.loss[1]) == pytest.approx(float(repaired.loss[0]), rel=1e-9)
    plain = curve.evaluate(loader(), num_points=5)
    assert torch.equal(profile.loss[[0, -1]], plain.loss[[0, -1]]) and torch.equal(profile.own_loss, plain.own_loss)
    assert not torch.isclose(profile.loss[1:-1], plain.loss[1:-1]).any()


def test_the_mean_of_many_is_repaired_with_the_mean_of_their_statistics():
    networks, spec = strangers("plain")
    inputs = [(torch.randn(n, 5, dtype=torch.float64), None) for n in (20, 13)]
    merged = merge_many(networks, inputs, spec=spec, repair=True)
    relabelled = [p.apply(m) for p, m in zip(merged.permutations, networks, strict=True)]
    assert_statistics(merged.model, relabelled, [1 / 3] * 3, inputs)


def test_with_batch_norm_repair_is_recalibration():
    a, b = pair("residual")
    plain = interpolate(a, b, 0.4, recalibrate=loader())
    assert same_bits(interpolate(a, b, 0.4, recalibrate=loader(), repair=True), plain)
    assert same_bits(
        modeconn.repair(interpolate(a, b, 0.4, recalibrate=batches(2, dtype=torch.float64)), [a, b], loader()), plain
    )


def test_channels_that_never_change_take_the_mean():
    a, b = pair()
    middle = interpolate(a, b)
    with torch.no_grad():
        middle[1].weight[2] = 0
    repaired = modeconn.repair(middle, [a, b], loader())
    target = mix([measure(m, loader()) for m in (a, b)], (0.5, 0.5))["1"]
    mean, std = measure(repaired, loader())["1"]
    torch.testing.assert_close(mean, target[0])
    assert float(std[2]) < 1e-12 and not repaired[1].weight[2].any()


def test_repair_lowers_the_loss_between_networks_trained_on_digits():
    training, test = data.load("digits")
    networks = [
        train(
            models.mlp(64, (32, 32), 10, mean=training.mean(), std=training.std() + 0.1, seed=seed),
            training,
            recipe=modeconn.Recipe(8, DIGITS_RECIPE.optimizer, DIGITS_RECIPE.schedule, 0.0),
            seed=seed,
        )
        for seed in (1, 2, 3)
    ]
    line = Connection.straight_between(*networks[:2], training=TrainingData(training))
    plain, repaired = (line.evaluate(test, num_points=5, repair=choice) for choice in (False, True))
    assert repaired.barrier < 0.7 * plain.barrier

    def loss(model: nn.Module) -> float:
        return float(Connection.straight_between(model, model).evaluate(test, num_points=2).loss[0])

    merged = merge_many(networks, start=WeightMatching())
    assert loss(merged.model) < 0.3 * loss(merge_many(networks, num_rounds=0).model)


def test_repair_refuses_layers_that_cannot_hold_it():
    def network(change=lambda model: None) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        change(model)
        return model.double()

    def share(model: nn.Module) -> None:
        model[3].weight = nn.Parameter(torch.randn(4, 4))
        model[3].register_module("again", nn.Linear(4, 4))
        model[3].again.weight = model[3].weight

    def no_bias(model: nn.Module) -> None:
        model[3].bias = None

    problems = {
        no_bias: "layer '3' has no bias to hold the shift",
        share: "the weight of layer '3' is shared with another layer",
        lambda model: parametrizations.weight_norm(
            model[3]
        ): "the weight of layer '3' is computed from other parameters",
    }
    for change, message in problems.items():
        with pytest.raises(ValueError, match=message):
            interpolate(network(change), network(change), recalibrate=loader(), repair=True)


def test_repair_warns_of_layers_that_are_never_called():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0].mean(1))

    a, b = Attending(), Attending()
    inputs = [(torch.randn(6, 5, 4), None)]
    with pytest.warns(UserWarning, match="layers 'attention.out_proj' are not repaired: the model never calls them"):
        repaired = modeconn.repair(interpolate(a, b), [a, b], inputs)
    assert torch.equal(repaired.attention.out_proj.weight, interpolate(a, b).attention.out_proj.weight)


def test_repair_refuses_wrong_weights_networks_and_data():
    a, b = pair()
    middle = interpolate(a, b)
    with pytest.raises(ValueError, match="weights must be one for each endpoint, got 3 for 2 endpoints"):
        modeconn.repair(middle, [a, b], loader(), weights=(0.2, 0.3, 0.5))
    with pytest.raises(ValueError, match=r"weights\[0\] must be a number, got weights\[0\]=nan"):
        modeconn.repair(middle, [a, b], loader(), weights=(torch.nan, 0.5))
    for wrong in ((3, 4), (1.5, -0.5)):
        with pytest.raises(ValueError, match="weights must be at least 0 and sum to 1, got weights="):
            modeconn.repair(middle, [a, b], loader(), weights=wrong)
    with pytest.raises(ValueError, match="weights must be one for each endpoint, got 0 for 0 endpoints"):
        modeconn.repair(middle, [], loader())
    with pytest.raises(ValueError, match=r"'4.weight' is in endpoints\[1\] but not in model"):
        modeconn.repair(middle, [a, copy.deepcopy(b).append(nn.Linear(3, 3).double())], loader())
    with pytest.raises(ValueError, match="pre-activations of '1' have no finite mean and variance"):
        modeconn.repair(middle, [a, b], [(torch.full((4, 1, 2, 4), torch.nan, dtype=torch.float64), None)])
    with pytest.raises(ValueError, match=r"repair needs statistics of training data.*Pass recalibrate="):
        interpolate(a, b, repair=True)
