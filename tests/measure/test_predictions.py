"""Predictions along curves against networks run by hand, through files, under attack; chains through checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeconn
from modeconn import PGD, Connection, Predictions, TrainingData

from ..cases import CASES, batches


def networks(name, count=2):
    (case,) = [one for one in CASES if one.name == name]
    return [case.make(seed, torch.float64) for seed in range(1, count + 1)]


DATA = batches(3, last=5, dtype=torch.float64)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_probabilities_are_those_of_the_networks(name):
    connection = Connection.straight_between(*networks(name), training=TrainingData(batches(dtype=torch.float64)))
    found = connection.predict(DATA, num_points=3)
    assert tuple(found.probabilities.shape) == (3, 29, 3)
    for number, t in enumerate((0.0, 0.5, 1.0)):
        model = connection.model_at(t, recalibrate=connection.training.loader)
        with torch.no_grad():
            expected = F.softmax(torch.cat([model(x) for x, _ in DATA]), dim=1)
        torch.testing.assert_close(found.probabilities[number], expected.float().cpu())
    profile = connection.evaluate(DATA, num_points=3)
    torch.testing.assert_close(found.accuracy, profile.accuracy)
    mean = found.probabilities[:2].double().mean(0).argmax(1)
    assert float(found.ensemble_accuracy[1]) == pytest.approx(float((mean == found.targets).double().mean()))
    assert float(found.ensemble_accuracy[0]) == float(found.accuracy[0])


def test_predictions_under_attack_are_what_robustness_counts():
    connection = Connection.straight_between(*networks("mlp"))
    data = [(x.sigmoid(), y) for x, y in DATA]
    attack = PGD(0.2, 0.1, 3)
    found = connection.predict(data, num_points=2, attack=attack)
    expected = connection.robustness(data, {"pgd": attack}, num_points=2)
    torch.testing.assert_close(found.accuracy, expected.accuracy["pgd"].double())
    assert "PGD" in found.attack and "PGD" in repr(found)


def test_files_keep_predictions(tmp_path):
    found = Connection.straight_between(*networks("mlp")).predict(DATA, num_points=2)
    found.save(tmp_path / "said.npz")
    back = Predictions.load(tmp_path / "said.npz")
    assert torch.equal(back.probabilities, found.probabilities) and torch.equal(back.targets, found.targets)
    assert repr(back) == repr(found)
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no predictions"):
        Predictions.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="probabilities must have the shape"):
        Predictions(found.t, found.probabilities[:1], found.targets)


def test_what_is_no_classifier_is_refused():
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double() for _ in range(2))
    data = [(x, torch.rand(len(x), 3, dtype=torch.float64)) for x, _ in DATA]
    with pytest.raises(ValueError, match="predictions are of classifiers"):
        Connection.straight_between(a, b).predict(data)


def test_examples_that_the_loss_ignores_do_not_count():
    data = [(x, torch.where(torch.arange(len(y), device=y.device) % 2 == 0, -100, y)) for x, y in DATA]
    connection = Connection.straight_between(*networks("mlp"))
    torch.testing.assert_close(
        connection.predict(data, num_points=2).accuracy, connection.evaluate(data, num_points=2).accuracy
    )


def test_targets_that_are_no_classes_are_refused_and_nan_is_no_answer():
    connection = Connection.straight_between(*networks("mlp"))
    with pytest.raises(ValueError, match="targets must be classes from 0 to 2"):
        connection.predict([(x, y + 20) for x, y in DATA])
    with pytest.raises(ValueError, match="attack must be called as attack"):
        connection.predict(DATA, attack=3)
    found = connection.predict(DATA, num_points=2)
    lost = found.probabilities.clone()
    lost[1, 0] = torch.nan
    told = Predictions(found.t, lost, found.targets)
    assert torch.equal(told.accuracy.isnan(), torch.tensor([False, True])) and bool(told.ensemble_accuracy[1].isnan())
    with pytest.raises(ValueError, match="rising positions"):
        Predictions(torch.zeros(2), found.probabilities, found.targets)
    with pytest.raises(ValueError, match="there must be examples"):
        Predictions(found.t, found.probabilities[:, :0], found.targets[:0])


def test_a_chain_that_would_lose_buffers_is_refused():
    several = networks("mlp", 3)
    for number, one in enumerate(several):
        one.register_buffer("scale", torch.tensor(float(number)))
    with pytest.raises(ValueError, match=r"differ in buffers .* 'scale'"):
        Connection.through(several)
    with pytest.raises(ValueError, match="must be a list of networks"):
        Connection.through(several[0])


def test_a_chain_goes_through_all_networks():
    several = networks("mlp", 4)
    before = [copy.deepcopy(one) for one in several]
    chain = Connection.through(several)
    found = chain.evaluate(DATA, t=[0.0, 1 / 6, 1 / 3, 2 / 3, 1.0])
    for place, model in ((0, several[0]), (2, several[1]), (3, several[2]), (4, several[3])):
        with torch.no_grad():
            expected = F.cross_entropy(torch.cat([model(x) for x, _ in DATA]), torch.cat([y for _, y in DATA]))
        assert float(found.loss[place]) == pytest.approx(float(expected), rel=1e-9)
    halfway = modeconn.interpolate(several[0], several[1], 0.5)
    assert float(found.loss[1]) == pytest.approx(
        float(Connection.straight_between(halfway, several[3]).evaluate(DATA, num_points=2).loss[0]), rel=1e-9
    )
    assert all(
        torch.equal(p, q)
        for m, n in zip(several, before, strict=True)
        for p, q in zip(m.parameters(), n.parameters(), strict=True)
    )
    two = Connection.through(several[:2])
    assert torch.equal(two.control_points, Connection.straight_between(*several[:2]).control_points)
    with pytest.raises(ValueError, match="two networks or more, got 1"):
        Connection.through(several[:1])


def test_a_chain_saves_and_loads(tmp_path):
    chain = Connection.through(networks("mlp", 3))
    chain.save(tmp_path / "chain.safetensors")
    back = Connection.load(tmp_path / "chain.safetensors", networks("mlp", 1)[0])
    assert torch.equal(back.control_points, chain.control_points)


def shared(rank):
    found = Connection.straight_between(*networks("mlp")).predict(
        modeconn.data.TensorLoader(*(torch.cat(part) for part in zip(*DATA, strict=True)), 12), num_points=5
    )
    return found.probabilities


def test_processes_share_the_positions(pool):
    (alone,) = pool.run(1, shared)
    assert all(torch.equal(found, alone) for found in pool.run(2, shared))
