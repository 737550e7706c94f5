"""One network is measured as the networks along a curve are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modeconn
from modeconn import AdversarialExamples, Connection, Profile, metrics
from tests.cases import CASE, CASES, DEVICE, batches, same_bits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_network_is_measured_as_the_end_of_a_connection_as_it_came(case):
    model, data = case.make(1).to(DEVICE).eval(), batches()
    line = Connection.straight_between(model, model)
    how = {"metrics": {"top 2": metrics.top_k(2)}}
    expected, found = line.evaluate(data, num_points=2, recalibrate=data, **how), modeconn.evaluate(model, data, **how)
    assert found.t.tolist() == [0] and found.num_examples == expected.num_examples and found.own == {}
    for name, value in found.values.items():
        torch.testing.assert_close(value, expected.own[name][:1], rtol=1e-6, atol=1e-7)
    assert str(Profile.from_json(found.to_json())) == str(found)


def test_a_plain_loop_measures_the_same():
    model, data = CASE["mlp"].make(1).to(DEVICE).eval(), batches()
    outputs = torch.cat([model(x) for x, _ in data])
    targets = torch.cat([y for _, y in data])
    found = modeconn.evaluate(model, data)
    torch.testing.assert_close(found.loss[0].float(), nn.functional.cross_entropy(outputs, targets).detach().cpu())
    assert found.accuracy[0] == (outputs.argmax(1) == targets).double().mean()


def test_batch_norm_keeps_its_statistics_unless_it_is_to_be_recalibrated():
    model, data = CASE["batch_norm"].make(1).to(DEVICE).eval(), batches()
    before = CASE["batch_norm"].make(1).to(DEVICE).eval()
    own, anew = modeconn.evaluate(model, data), modeconn.evaluate(model, data, recalibrate=data)
    line = Connection.straight_between(model, model).evaluate(data, num_points=2, recalibrate=data)
    torch.testing.assert_close(anew.loss, line.loss[:1], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(own.loss, anew.loss)
    assert own.statistics == "those that the network came with"
    assert "recalibrated on" in anew.statistics and modeconn.evaluate(CASE["mlp"].make(1).eval(), data).statistics == ""
    few = modeconn.evaluate(model, data, recalibrate=data, recalibration_examples=4)
    assert "on 4 training examples" in few.statistics
    attacked = modeconn.evaluate(
        model, data, recalibrate=AdversarialExamples(data, modeconn.PGD(0.1, 0.1, 1, clip=None))
    )
    assert "own adversarial examples" in attacked.statistics
    assert same_bits(model, before)


def test_the_random_state_is_left_as_it_was_and_random_networks_are_measured_alike():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) + torch.rand_like(x.flatten(1)))

    torch.manual_seed(0)
    model, data = Noisy(8, 3).to(DEVICE).eval(), batches()
    before = torch.get_rng_state()
    first, second = (modeconn.evaluate(model, data).loss for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


def test_a_loss_and_a_forward_of_ones_own_are_used():
    model, data = CASE["mlp"].make(1).to(DEVICE).eval(), batches()

    def squares(outputs, targets):
        return (outputs**2).mean()

    def forward(network, batch):
        outputs = network(batch[0])
        return squares(outputs, batch[1]), outputs, batch[1]

    by_loss = modeconn.evaluate(model, data, loss_fn=squares)
    by_forward = modeconn.evaluate(model, data, forward=forward, metrics={"top": metrics.top_k(1)})
    torch.testing.assert_close(by_loss.loss, by_forward.loss)
    assert by_forward.metrics["top"] == by_loss.accuracy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": CASE["mlp"].make(1).train()}, "the model is in train mode"),
        ({"loader": []}, "loader is empty"),
        ({"loader": iter([])}, "loader can be read only once"),
        ({"recalibration_examples": 0}, "recalibration_examples must be at least 1, or None"),
        (
            {"metrics": {"far": metrics.disagreement("a")}},
            "metric 'far' compares with end 'a' of a curve, and one network has none. Leave it out, or measure a conn",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        modeconn.evaluate(**{"model": CASE["mlp"].make(1).eval(), "loader": batches(), **change})
