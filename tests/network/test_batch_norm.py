from __future__ import annotations

import concurrent.futures
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn
from modeconn.data import Flip, TensorLoader
from modeconn.network.batch_norm import calibration_batches, norm_layers, recalibrate
from modeconn.network.batches import endless_batches
from tests.cases import CASE, DEVICE, batches, clone, same_bits
from tests.reference import pooled_statistics

CPU = torch.device("cpu")


def statistics(model):
    return {name: (layer.running_mean, layer.running_var) for name, layer in norm_layers(model).items()}


@pytest.mark.parametrize("name", ["batch_norm", "residual", "channels_last"])
def test_statistics_are_those_of_everything_that_reaches_a_layer(name):
    model = CASE[name].make(0, torch.float64)
    data = batches(4, 12, last=5, dtype=torch.float64)
    expected = pooled_statistics(model, data)
    recalibrate(model, data)
    torch.testing.assert_close(statistics(model), expected)


def test_the_spread_between_batches_counts():
    model = nn.Sequential(nn.BatchNorm1d(1))
    recalibrate(model, [(torch.tensor([[0.0], [1.0]]), None), (torch.tensor([[10.0], [11.0]]), None)])
    assert model[0].running_mean.item() == 5.5
    assert model[0].running_var.item() == pytest.approx(torch.tensor([0.0, 1, 10, 11]).var().item())


def test_a_layer_used_twice_pools_both_uses():
    norm = nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(norm, nn.Linear(2, 2), norm)
    data = [(torch.randn(9, 2), None)]
    expected = pooled_statistics(model, data)
    recalibrate(model, data)
    torch.testing.assert_close(statistics(model)["0"], expected["0"])


def test_one_batch_gives_what_pytorch_gives_with_momentum_one():
    model, twin = CASE["residual"].make(0), CASE["residual"].make(0)
    data = batches(1)
    recalibrate(model, data)
    for layer in norm_layers(twin).values():
        layer.momentum = 1.0
    twin.train()(data[0][0])
    torch.testing.assert_close(statistics(model), statistics(twin))


class Called(nn.Module):
    """A net of one norm layer, called in one of the ways that people call it."""

    def __init__(self, how, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.how = nn.Linear(3, 4), norm or nn.BatchNorm1d(4), how

    def forward(self, x):
        return self.how(self.norm, self.first(x))


class Own(nn.BatchNorm1d):
    """Moves its statistics by a share of its own, whatever its momentum is."""

    def forward(self, x):
        if self.training:
            mean, variance = x.mean(0), x.var(0)
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_var.mul_(0.9).add_(0.1 * variance)
        else:
            mean, variance = self.running_mean, self.running_var
        return (x - mean) / (variance + self.eps).sqrt()


class Inner(nn.BatchNorm1d):
    """Has a forward of its own, which calls the usual one."""

    def forward(self, x):
        return super().forward(x) + 1


WAYS = {
    "as a module": (lambda norm, x: norm(x), None),
    "by keyword": (lambda norm, x: norm(input=x), None),
    "its forward": (lambda norm, x: norm.forward(x), None),
    "a function": (lambda norm, x: F.batch_norm(x, norm.running_mean, norm.running_var), None),
    "an operator": (
        lambda norm, x: torch.batch_norm(x, None, None, norm.running_mean, norm.running_var, False, 0.1, 1e-5, False),
        None,
    ),
    "own": (lambda norm, x: norm(x), Own(4)),
    "inner": (lambda norm, x: norm(x), Inner(4)),
    "no momentum": (lambda norm, x: norm(x), nn.BatchNorm1d(4, momentum=None)),
    "synchronised": (lambda norm, x: norm(x), nn.SyncBatchNorm(4)),
    "frozen": (lambda norm, x: norm.eval()(x), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.filterwarnings("ignore:.*computes in a way of its own")
def test_a_norm_layer_is_reached_however_it_is_called(name):
    how, norm = WAYS[name]
    model = Called(how, norm).eval()
    data = [(torch.randn(size, 3) + 1, None) for size in (9, 8, 2)]
    hidden = model.first(torch.cat([x for x, _ in data])).detach()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    recalibrate(model, data)
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(model.norm.running_var, hidden.var(0))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module.training for module in model.modules())


def test_a_layer_that_computes_in_its_own_way_is_told_of():
    with pytest.warns(UserWarning, match=r"the norm layer 'norm' \(Own\) computes in a way of its own"):
        recalibrate(Called(*WAYS["own"]).eval(), [(torch.randn(9, 3), None)])


UNSEEN = {
    "detached": lambda norm, x: F.batch_norm(x, norm.running_mean.detach(), norm.running_var.detach()),
    "a part": lambda norm, x: F.batch_norm(x, norm.running_mean[:4], norm.running_var[:4]),
    "by hand": lambda norm, x: (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt(),
    "native": lambda norm, x: torch.native_batch_norm(
        x, None, None, norm.running_mean, norm.running_var, False, 0.1, 1e-5
    )[0],
}


@pytest.mark.parametrize("name", UNSEEN)
def test_statistics_that_are_used_unseen_are_told_of(name):
    model = Called(UNSEEN[name]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="norm layers 'norm' are used in a way in which they cannot be estimated"):
        recalibrate(model, [(torch.randn(9, 3), None)])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_layer_called_in_another_thread_is_reached():
    def elsewhere(norm, x):
        with concurrent.futures.ThreadPoolExecutor(1) as pool, torch.no_grad():
            return pool.submit(norm, x).result()

    model = Called(elsewhere).eval()
    x = torch.randn(9, 3)
    with pytest.warns(UserWarning, match="computes in a way of its own"):
        recalibrate(model, [(x, None)])
    torch.testing.assert_close(model.norm.running_mean, model.first(x).mean(0).detach())


def test_a_compiled_model_is_reached():
    model = Called(*WAYS["as a module"]).eval()
    twin, data = clone(model), [(torch.randn(9, 3), None)]
    recalibrate(twin, data)
    compiled = torch.compile(model, backend="eager")
    compiled(data[0][0])
    recalibrate(compiled, data)
    torch.testing.assert_close(statistics(model), statistics(twin))


def test_data_that_is_not_finite_is_refused():
    with pytest.raises(
        FloatingPointError, match=r"running statistics became NaN or infinite. Look for NaN in the data"
    ):
        recalibrate(Called(*WAYS["as a module"]).eval(), [(torch.full((9, 3), torch.nan), None)])


def test_only_the_statistics_change():
    model = CASE["batch_norm"].make(0).train()
    model[4].eval()
    before, flags = clone(model), [module.training for module in model.modules()]
    buffer, momentum = model[2].running_mean, model[2].momentum
    recalibrate(model, batches())
    assert [module.training for module in model.modules()] == flags
    assert model[2].running_mean is buffer and model[2].momentum == momentum
    assert model[2].num_batches_tracked == before[2].num_batches_tracked
    assert not torch.equal(buffer, before[2].running_mean)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    assert not model[2]._forward_pre_hooks


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was():
    model = CASE["batch_norm"].make(0).train()
    before = clone(model)
    with pytest.raises(ValueError, match=r"does not run on the inputs of a batch.*mat1 and mat2"):
        recalibrate(model, [*batches(1), (torch.ones(4, 3, device=DEVICE), None)])
    assert same_bits(model, before) and model[2].training and not model[2]._forward_pre_hooks


def test_dropout_is_off():
    model = CASE["batch_norm"].make(0)
    model.insert(2, nn.Dropout(0.9))
    twin = clone(model)
    recalibrate(model, batches())
    recalibrate(twin, batches())
    torch.testing.assert_close(statistics(model), statistics(twin), rtol=0, atol=0)
    torch.testing.assert_close(statistics(model), pooled_statistics(model, batches()))


def test_a_model_without_running_statistics_is_not_even_run():
    data = [("no tensor", None)]  # a forward pass would fail
    recalibrate(CASE["mlp"].make(0), data)
    recalibrate(nn.BatchNorm1d(3, track_running_stats=False), data)


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    model = CASE["residual"].make(0)
    model.auxiliary = nn.BatchNorm2d(4)
    recalibrate(model, batches())
    assert torch.equal(model.auxiliary.running_var, torch.ones(4))


def test_batches_of_another_kind_come_with_their_own_forward():
    model, twin = CASE["residual"].make(0), CASE["residual"].make(0)
    data = batches()
    recalibrate(model, data)
    recalibrate(twin, [{"image": inputs} for inputs, _ in data], forward=lambda model, batch: model(batch["image"]))
    assert same_bits(model, twin)


def sizes(data):
    return [len(inputs) for inputs, _ in data]


def test_calibration_reads_the_first_examples_and_cuts_the_last_batch():
    data = batches(5, 12)
    taken = calibration_batches(data, DEVICE, limit=30)
    assert sizes(taken) == [12, 12, 6]
    assert torch.equal(taken[2][0], data[2][0][:6]) and torch.equal(taken[2][1], data[2][1][:6])


def test_calibration_joins_a_rest_of_one_and_reads_everything_on_request():
    assert sizes(calibration_batches(batches(3, 12), CPU, limit=25)) == [12, 13]
    assert sizes(calibration_batches(batches(3, 12, last=1), CPU, limit=None)) == [12, 13]
    assert sizes(calibration_batches(batches(3, 12, last=2), CPU, limit=None)) == [12, 12, 2]


@pytest.mark.parametrize("lengths", [[1] * 7, [1, 5], [5, 1, 1], [4, 1, 3, 1], [1], [1, 1, 4, 4, 1]], ids=str)
def test_no_example_is_lost_where_batches_are_of_one(lengths):
    values, labels = torch.arange(2.0 * sum(lengths)).view(-1, 2), torch.arange(sum(lengths))
    data = [{"x": x, "rest": (y, None)} for x, y in zip(values.split(lengths), labels.split(lengths), strict=True)]
    taken = calibration_batches(data, CPU)
    assert torch.equal(torch.cat([batch["x"] for batch in taken]), values)
    assert torch.equal(torch.cat([batch["rest"][0] for batch in taken]), labels)
    assert all(len(batch["x"]) > 1 for batch in taken) or lengths == [1]


def test_statistics_do_not_depend_on_how_examples_are_batched():
    norm, inputs = nn.BatchNorm2d(3).double(), torch.randn(9, 3, 4, 4, dtype=torch.float64)
    found = []
    for size in (9, 4, 1):
        recalibrate(norm, calibration_batches([(x, None) for x in inputs.split(size)], CPU))
        found.append((norm.running_mean.clone(), norm.running_var.clone()))
    torch.testing.assert_close(found[1:], [found[0]] * 2)


def test_single_examples_of_other_shapes_stay_alone():
    images = [torch.rand(1, 3, size, size) for size in (4, 6, 6, 8)]
    assert [len(x) for x in calibration_batches(images, CPU)] == [1, 2, 1]


def test_calibration_data_is_fixed_by_its_seed_and_leaves_the_callers_randomness():
    loader = DataLoader(TensorDataset(torch.arange(40.0)[:, None], torch.zeros(40)), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    first, again, other = (calibration_batches(loader, CPU, limit=16, seed=seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_built_in_data_is_a_random_subset_augmented_as_in_training():
    inputs = torch.arange(40.0).reshape(40, 1, 1, 1).expand(40, 1, 2, 2) + torch.tensor([0.0, 0.5])
    loader = TensorLoader(inputs, torch.zeros(40, dtype=torch.int64), batch_size=8, augment=(Flip(),))
    taken, again = (torch.cat([x for x, _ in calibration_batches(loader, CPU, limit=16)]) for _ in range(2))
    assert torch.equal(taken, again)
    index = taken[:, 0, 0, 0].long()
    assert index.tolist() != list(range(16)) and len(index.unique()) == 16
    flipped = (taken != inputs[index]).flatten(1).any(1)
    assert torch.equal(taken, torch.where(flipped[:, None, None, None], inputs[index].flip(-1), inputs[index]))
    assert 0 < int(flipped.sum()) < 16


@pytest.mark.parametrize("repair", [False, True])
def test_batches_of_inputs_alone_are_read_as_those_with_targets(repair):
    class Tokens(nn.Module):
        """Tokens of five values; one alone would do as well as several examples of several tokens."""

        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.norm = nn.Identity() if repair else nn.BatchNorm1d(8)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.inner(x).flatten(0, -2))))

    inputs = torch.randn(6, 4, 5) * torch.linspace(0.1, 3, 6)[:, None, None]
    a, b = Tokens(), Tokens()
    pairs, alone, ones = (
        [wrap(x) for x in inputs.split(3)] for wrap in (lambda x: (x, None), lambda x: x, lambda x: [x])
    )
    expected, *found = (modeconn.repair(modeconn.interpolate(a, b, 0.0), [a, b], data) for data in (pairs, alone, ones))
    assert all(same_bits(one, expected) for one in found)


@pytest.mark.parametrize("sizes", [[3, 3], [3, 1], [1, 1, 1], [1, 4]], ids=str)
def test_an_endless_stream_reads_no_further_than_it_has_to_and_loses_nothing(sizes):
    read = []

    class Counting(list):
        def __iter__(self):
            for batch in super().__iter__():
                read.extend(batch.tolist())
                yield batch

    stream, seen = endless_batches(Counting(torch.arange(sum(sizes)).split(sizes)), CPU), []
    for batch in islice(stream, 6):
        assert len(batch) > 1
        seen.extend(batch.tolist())
        assert seen == read
