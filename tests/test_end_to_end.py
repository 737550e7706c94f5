"""The verbs one after another, as a user calls them."""

from __future__ import annotations

import pytest
import torch

import modeconn
from modeconn import Recipe
from tests.cases import CASE, batches


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_no_verb_leaves_gradients_switched(name, enabled):
    a, b = CASE[name].make(0), CASE[name].make(1)
    data = batches()
    with torch.set_grad_enabled(enabled):
        aligned = modeconn.align(a, b, data)
        assert torch.is_grad_enabled() == enabled
        modeconn.Connection.straight_between(a, aligned.model_b).evaluate(data, num_points=3, recalibrate=data)
        assert torch.is_grad_enabled() == enabled


def test_a_curve_is_aligned_learned_and_measured_in_one_call():
    a, b = CASE["residual"].make(0), CASE["residual"].make(1)
    data = batches()
    connection = modeconn.fit_curve(a, b, data, align=True, recipe=Recipe(epochs=2))
    assert connection.permutation == modeconn.align(a, b, data).permutation
    assert connection.history.loss[-1] < connection.history.loss[0]
    profile = connection.evaluate(data, num_points=5)
    assert profile.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert profile.num_examples == sum(len(targets) for _, targets in data)
