"""PAM on groups that rotate: the loss falls, the function stays, and what only permutes is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import modeconn
from modeconn import (
    PAM,
    Bezier,
    Line,
    Orthogonal,
    ProximalLinear,
    Recipe,
    RelaxedStep,
    SinkhornStep,
    WeightMatching,
    callbacks,
)
from tests.matching.test_rotations import generic
from tests.symmetry.rotating import LanguageModel, RMSNorm, tokens

NETWORKS = {
    "layer norm": lambda: LanguageModel(nn.LayerNorm),
    "grouped queries": lambda: LanguageModel(RMSNorm, width=16, heads=4, shared=2, size=4, gated=True),
}
LOADER = [(tokens(), (tokens() + shift) % 5) for shift in range(3)]


class Stop(callbacks.Callback):
    """Ends a run after its first epoch."""

    def after_epoch(self, event) -> None:
        """Do what a user's Ctrl-C does."""
        raise KeyboardInterrupt


@cache
def spec_of(name):
    return modeconn.discover(generic(NETWORKS[name], 0).float(), tokens(), symmetries="orthogonal")


def refined(name, **settings):
    build = NETWORKS[name]
    a, b = (generic(build, seed).float() for seed in (0, 1))
    how = {"align": WeightMatching(), "spec": spec_of(name), "recipe": Recipe(epochs=2), **settings}
    pam = PAM(iterations=2, step=ProximalLinear(num_rounds=3, num_tries=8))
    return b, modeconn.fit_curve(a, b, LOADER, refine=pam, **how)


@pytest.mark.parametrize("curve", [Line(), Bezier(2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_falls_with_each_turn_and_the_function_stays(name, curve):
    b, connection = refined(name, curve=curve)
    turns = connection.history.turns
    assert all(turn["loss_after"] <= turn["loss_before"] for turn in turns)
    assert turns[0]["loss_after"] < turns[0]["loss_before"] and turns[0]["num_accepted"]
    assert isinstance(connection.permutation, Orthogonal)
    start = modeconn.align(generic(NETWORKS[name], 0).float(), b, method=WeightMatching(), spec=spec_of(name))
    assert connection.permutation != start.permutation
    assert torch.allclose(connection.model_at(1.0)(tokens()), b(tokens()), atol=1e-4)
    again = connection.permutation.apply(b)
    assert all(
        torch.allclose(p, q, atol=1e-5)
        for p, q in zip(again.parameters(), connection.model_at(1.0).parameters(), strict=True)
    )


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    _, whole = refined("layer norm")
    with pytest.raises(KeyboardInterrupt):
        refined("layer norm", checkpoint=tmp_path / "kept", callbacks=[Stop()])
    _, resumed = refined("layer norm", checkpoint=tmp_path / "kept")
    assert torch.equal(resumed.control_points, whole.control_points)
    assert resumed.permutation == whole.permutation


@pytest.mark.parametrize("step", [SinkhornStep(), RelaxedStep()], ids=lambda step: type(step).__name__)
def test_steps_that_move_whole_units_are_refused(step):
    a, b = (LanguageModel(nn.LayerNorm) for _ in range(2))
    with pytest.raises(ValueError, match=f"{type(step).__name__} permutes units, and align= found groups that rotate"):
        modeconn.fit_curve(a, b, LOADER, refine=PAM(iterations=1, step=step), spec=spec_of("layer norm"))
