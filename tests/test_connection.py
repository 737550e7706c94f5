from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn

from modeconn import models
from modeconn.connection import Connection
from modeconn.curves import Bezier, Line, PolyChain
from modeconn.curves.path import Path
from modeconn.learning.history import History
from modeconn.network.batch_norm import calibration_batches, recalibrate
from modeconn.network.loss import TrainingData, cross_entropy
from modeconn.network.weights import WeightSpace, named_buffers
from modeconn.tools.rng import rng_state
from tests.cases import CASE, CASES, batches, clone, same_bits

parametrize_cases = pytest.mark.parametrize("case", CASES, ids=str)


def connect(name="residual", curve=None, *, dtype=torch.float32, **kwargs) -> tuple[Connection, nn.Module, nn.Module]:
    """A curve that really bends, between two networks."""
    a, b = CASE[name].make(0, dtype), CASE[name].make(1, dtype)
    curve = curve or Bezier(2)
    space = WeightSpace(a)
    points = curve.initial_control_points(space.flatten(a), space.flatten(b))
    points[1:-1] += 0.05 * torch.randn(points[1:-1].shape, generator=torch.Generator().manual_seed(2)).to(points)
    kwargs.setdefault("training", TrainingData(batches(seed=5, dtype=dtype)))
    path = Path(a, curve, points, (named_buffers(a), named_buffers(b)), training=kwargs.pop("training", None))
    return Connection(path, **kwargs), a, b


@parametrize_cases
@pytest.mark.parametrize("curve", [Line(), Bezier(3), PolyChain(2)], ids=str)
def test_the_ends_are_the_networks_bit_for_bit(case, curve):
    connection, a, b = connect(case.name, curve)
    inputs = batches()[0][0]
    for t, end in ((0, a), (1.0, b)):
        model = connection.model_at(t)
        assert same_bits(model, end)
        assert torch.equal(model(inputs), end(inputs))
        assert torch.equal(connection.weights_at(t), connection.space.flatten(end))


@parametrize_cases
def test_between_the_ends_weights_follow_the_curve_and_batch_norm_the_training_data(case):
    connection, a, _ = connect(case.name, dtype=torch.float64)
    expected = clone(a)
    connection.space.load(connection.curve.basis(0.3) @ connection.control_points, expected)
    recalibrate(expected, connection.training.loader)
    torch.testing.assert_close(dict(connection.model_at(0.3).state_dict()), dict(expected.state_dict()))


def test_a_profile_is_what_each_network_scores_by_itself():
    connection, *_ = connect(dtype=torch.float64)
    test = batches(3, 10, last=3, seed=7, dtype=torch.float64)
    profile = connection.evaluate(test, num_points=4)
    inputs, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    for i, t in enumerate(profile.t.tolist()):
        outputs = connection.model_at(t, recalibrate=connection.training.loader)(inputs)
        torch.testing.assert_close(profile.loss[i], cross_entropy(outputs, targets))
        torch.testing.assert_close(profile.accuracy[i], (outputs.argmax(1) == targets).double().mean())
    assert profile.num_examples == 23 and profile.seconds > 0
    torch.testing.assert_close(profile.arc_length[-1].item(), connection.length())


def test_the_ends_with_their_own_statistics_are_separate_fields():
    connection, a, b = connect(dtype=torch.float64)
    test = batches(dtype=torch.float64)
    profile = connection.evaluate(test, num_points=3)
    inputs, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    expected = torch.stack([cross_entropy(model(inputs), targets) for model in (a, b)])
    torch.testing.assert_close(profile.own_loss, expected)
    assert not torch.allclose(profile.own_loss, profile.loss[[0, -1]])


def test_without_batch_norm_ends_have_one_value():
    profile = connect("mlp")[0].evaluate(batches(), num_points=3)
    assert torch.equal(profile.own_loss, profile.loss[[0, -1]])


def test_free_ends_have_no_statistics_of_their_own():
    connection, *_ = connect(curve=Bezier(2, free_ends=True))
    profile = connection.evaluate(batches(), num_points=3)
    assert torch.equal(profile.own_loss, profile.loss[[0, -1]])
    expected = connection.model_at(0, recalibrate=connection.training.loader)
    assert same_bits(connection.model_at(0), expected)


def test_the_number_of_examples_for_batch_norm_can_be_chosen():
    connection, *_ = connect()
    data = connection.training.loader
    few, everything = (connection.model_at(0.5, recalibration_examples=limit) for limit in (20, None))
    assert not torch.equal(few.bn1.running_mean, everything.bn1.running_mean)
    recalibrate(few, calibration_batches(data, connection.device, limit=None))
    assert same_bits(few, everything)


def test_batch_norm_between_the_ends_needs_training_data():
    connection, *_ = connect(training=TrainingData())
    message = r"batch norm needs statistics of training data.*Pass recalibrate="
    with pytest.raises(ValueError, match=message):
        connection.model_at(0.5)
    with pytest.raises(ValueError, match=message):
        connection.evaluate(batches())
    connection.model_at(1)
    connection.evaluate(batches(), num_points=2, recalibrate=batches(seed=5))
    connect("mlp", training=TrainingData())[0].model_at(0.5)


def test_the_evaluated_data_never_calibrates():
    connection, *_ = connect()
    shifted = [(inputs + 100, targets) for inputs, targets in batches()]
    means = connection.model_at(0.5).bn1.running_mean
    connection.evaluate(shifted, num_points=3)
    assert torch.equal(connection.model_at(0.5).bn1.running_mean, means)


def test_evaluation_leaves_the_connection_and_random_state_as_they_were():
    connection, *_ = connect("batch_norm")
    points, state = connection.control_points.clone(), rng_state(connection.device)
    first, again = connection.evaluate(batches(), num_points=5), connection.evaluate(batches(), num_points=5)
    assert torch.equal(first.loss, again.loss)  # no dropout, no leftovers
    assert torch.equal(connection.control_points, points)
    assert torch.equal(rng_state(connection.device)["torch"], state["torch"])


def test_models_are_new_in_eval_mode_and_keep_frozen_parameters_frozen():
    connection, a, _ = connect("frozen")
    model = connection.model_at(0)
    assert not model.training and not model[1].weight.requires_grad
    model[1].weight.data.zero_()
    assert same_bits(connection.model_at(0), a)


def test_the_straight_connection_has_the_same_ends():
    connection, a, b = connect()
    straight = connection.straight()
    assert same_bits(straight.model_at(0), a) and same_bits(straight.model_at(1), b)
    assert straight.length() < connection.length()
    torch.testing.assert_close(straight.weights_at(0.5), connection.control_points[[0, -1]].mean(0))
    straight.model_at(0.5)  # it remembers the training data


def test_a_fit_with_its_own_forward_is_evaluated_with_it():
    def forward(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"])

    as_dicts = [{"x": inputs, "y": targets} for inputs, targets in batches(seed=5)]
    plain = connect()[0].evaluate(batches(seed=5), num_points=3)
    own = connect(training=TrainingData(as_dicts, forward=forward))[0].evaluate(as_dicts, num_points=3)
    assert own.accuracy is None and torch.equal(own.loss, plain.loss)


@pytest.mark.parametrize("curve", [Line(), Bezier(3), PolyChain(2, free_ends=True)], ids=str)
@pytest.mark.parametrize("name", ["residual", "channels_last", "tied", "mlp"])
def test_a_saved_connection_loads_with_the_same_bits(tmp_path, name, curve):
    history = History([1.0, 0.5], [[None] * 10, [0.5] * 10], 3.0)
    connection, *_ = connect(name, curve, history=history)
    connection.save(tmp_path / "c.safetensors")
    loaded = Connection.load(tmp_path / "c.safetensors", template=CASE[name].make(9))
    assert loaded.curve == curve and loaded.history == history
    data = batches(seed=5)
    for t in (0, 0.3, 1):
        assert same_bits(loaded.model_at(t, recalibrate=data), connection.model_at(t, recalibrate=data))
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_file_does_not_depend_on_the_memory_format(tmp_path):
    connection, a, _ = connect("channels_last")
    connection.save(tmp_path / "c.safetensors")
    loaded = Connection.load(tmp_path / "c.safetensors", template=CASE["residual"].make(9))
    assert same_bits(loaded.model_at(0), a) and loaded.model_at(0).conv.weight.is_contiguous()


def test_zoo_models_are_rebuilt_from_the_file(tmp_path):
    a, b = (models.mlp(4, (5,), 3, seed=seed).double() for seed in (0, 1))
    Connection.straight_between(a, b).save(tmp_path / "c.safetensors")
    loaded = Connection.load(tmp_path / "c.safetensors")
    assert same_bits(loaded.model_at(1), b) and loaded.control_points.dtype == torch.float64


def test_a_connection_loads_where_it_is_told_to(tmp_path):
    connection, a, _ = connect("residual")
    connection.save(tmp_path / "c")
    loaded = Connection.load(tmp_path / "c", a, device="meta")
    tensors = (loaded.control_points, *loaded.buffers[0].values(), *loaded.buffers[1].values())
    assert {tensor.device.type for tensor in (*tensors, *loaded.model_at(0).parameters())} == {"meta"}
    assert {parameter.device.type for parameter in a.parameters()} == {"cpu"}
    assert same_bits(Connection.load(tmp_path / "c", a, device=torch.device("cpu")).model_at(0), a)


def test_other_models_need_a_template_of_the_same_architecture(tmp_path):
    path = tmp_path / "c.safetensors"
    connect("mlp")[0].save(path)
    with pytest.raises(ValueError, match=r"c\.safetensors' connects networks .* Pass template="):
        Connection.load(path)
    with pytest.raises(ValueError, match=r"'1\.weight' is \(8, 8\) in the file, \(16, 8\) in it"):
        Connection.load(path, template=CASE["dropout"].make(0))
    with pytest.raises(ValueError, match=r"'4\.weight' is missing in the file"):
        Connection.load(path, template=nn.Sequential(*CASE["mlp"].make(0), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"holds torch\.float32 weights, template has torch\.float64"):
        Connection.load(path, template=CASE["mlp"].make(0, torch.float64))


def test_a_template_that_lacks_a_buffer_is_an_error(tmp_path):
    connect("residual")[0].save(tmp_path / "c.safetensors")
    template = CASE["residual"].make(0)
    del template.bn1.running_mean
    template.bn1.running_mean = None
    with pytest.raises(ValueError, match=r"'bn1\.running_mean' is \(4,\) in the file, missing in it"):
        Connection.load(tmp_path / "c.safetensors", template=template)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (iter(batches()), "can be read only once"),
        ([torch.ones(3, 1, 2, 4)], r"must yield \(inputs, targets\) pairs"),
    ],
)
def test_unusable_data_is_an_error(loader, message):
    with pytest.raises(ValueError, match=message):
        connect()[0].evaluate(loader)


def test_positions_points_and_shapes_are_checked():
    connection, a, _ = connect()
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got t=1\.5\."):
        connection.model_at(1.5)
    with pytest.raises(ValueError, match=r"num_points must be at least 2, .* got num_points=1"):
        connection.evaluate(batches(), num_points=1)
    with pytest.raises(ValueError, match=r"control_points must have shape \(2, \d+\), got \(3, \d+\)"):
        Path(a, Line(), connection.control_points, connection.buffers)
    with pytest.raises(ValueError, match=r"endpoints differ at '1\.weight'"):
        Connection.straight_between(CASE["mlp"].make(0), CASE["dropout"].make(0))


def test_buffers_that_nothing_re_estimates_are_warned_of():
    a, b = CASE["residual"].make(0), CASE["residual"].make(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Connection.straight_between(a, b)  # batch-norm statistics differ, and may
    a.register_buffer("scale", torch.ones(2))
    b.register_buffer("scale", torch.zeros(2))
    with pytest.warns(UserWarning, match=r"buffers differ .* estimates anew.* for 'scale': the mean of the networks'"):
        Connection.straight_between(a, b)


def test_a_connection_prints_what_it_is():
    text = repr(connect(history=History([1.0, 0.5]))[0])
    assert text.startswith("Connection(Bezier(degree=2, free_ends=False), 215 weights, length ")
    assert text.endswith(", b as it was, 2 epochs, training loss 0.5)")
