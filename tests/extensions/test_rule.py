"""A rule for an operator of a user's own, and specs that remember what they were found with."""

from __future__ import annotations

import re

import pytest
import torch
from torch import library, nn

import modeconn
from modeconn.symmetry import pointwise

# -- what the user writes


@library.custom_op("modeconn_test::squash", mutates_args=())
def squash(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x / (1 + scale * x.abs())


@squash.register_fake
def _(x: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


def backward(ctx, gradient):
    return gradient / (1 + ctx.scale * ctx.saved_tensors[0].abs()) ** 2, None


squash.register_autograd(backward, setup_context=setup_context)

OPERATOR = torch.ops.modeconn_test.squash.default


def squash_rule(walk, x, scale):
    """Every entry of the output is made of the entry of the input at the same place, so their axes are the same."""
    return pointwise(walk, x)


RULES = {**modeconn.RULES, OPERATOR: squash_rule}


class Squashed(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.third = nn.Linear(64, 12), nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(squash(self.first(x), 0.5))))


# -- what it can do

X = torch.rand(3, 64)


@pytest.mark.parametrize("model", [Squashed(0)])
def test_without_it_an_operator_costs_freedom_and_with_it_nothing(model):
    with pytest.warns(modeconn.UnknownOperatorWarning, match=r"squash"):
        assert modeconn.discover(model, X).num_units == 8
    assert modeconn.discover(model, X, rules=RULES).num_units == 12 + 8


@pytest.mark.parametrize(
    ("rules", "freeze", "num_units"),
    [(RULES, (), 20), (RULES, ("first.weight",), 8), (RULES, ("third.*",), 12)],
)
def test_a_spec_keeps_through_files_what_it_was_found_with(digits_line, tmp_path, rules, freeze, num_units):
    a, b, loader = Squashed(1).eval(), Squashed(2).eval(), digits_line[2]
    spec = modeconn.discover(a, X, rules=rules, freeze=freeze)
    assert spec.num_units == num_units and spec.verify(a, X) < 1e-9
    spec.save(tmp_path / "spec")
    loaded = modeconn.PermutationSpec.load(tmp_path / "spec", rules=rules)
    assert loaded == spec and loaded.freeze == freeze and loaded.verify(a, X) < 1e-9
    for method in (modeconn.ActivationMatching(), modeconn.WeightMatching()):
        ours, theirs = (modeconn.align(a, b, loader, spec=one, method=method).permutation for one in (spec, loaded))
        assert ours.perms.keys() == theirs.perms.keys()
        assert all(torch.equal(ours.perms[name], theirs.perms[name]) for name in ours.perms)
    fitted = modeconn.fit_curve(a, b, loader, align=True, spec=loaded, recipe=modeconn.Recipe(epochs=1))
    fitted.save(tmp_path / "c")
    assert modeconn.Connection.load(tmp_path / "c", a).permutation.spec == spec


def test_a_frozen_spec_needs_no_rules(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = modeconn.discover(model, X[:, :4], freeze=["2.*"])
    spec.save(tmp_path / "spec")
    loaded = modeconn.PermutationSpec.load(tmp_path / "spec")
    assert loaded == spec and loaded.num_units == 0 and loaded.verify(model, X[:, :4]) == 0
    assert loaded != modeconn.discover(model, X[:, :4])


def test_rules_that_are_missing_or_others_are_named(tmp_path):
    modeconn.discover(Squashed(0), X, rules=RULES).save(tmp_path / "spec")
    place = r"modeconn_test.squash.default \(tests.extensions.test_rule:squash_rule\)"
    with pytest.raises(ValueError, match=rf"found with another rule for {place}.*load\(path, rules=\)"):
        modeconn.PermutationSpec.load(tmp_path / "spec").verify(Squashed(0), X)
    with pytest.raises(ValueError, match=f"found with another rule for {place}"):
        modeconn.PermutationSpec.load(tmp_path / "spec", rules=modeconn.RULES)
    odd = min(modeconn.RULES, key=str)
    without = {op: rule for op, rule in RULES.items() if op is not odd}
    with pytest.raises(ValueError, match=rf"with another rule for {re.escape(str(odd))} \(modeconn's own rule\)"):
        modeconn.PermutationSpec.load(tmp_path / "spec", rules=without)
