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
    RotationStep,
    SinkhornStep,
    WeightMatching,
    callbacks,
)
from modeconn.curves.loss import CurveLoss
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.weights import WeightSpace, Workspace
from modeconn.refinement.relabelled import Relabelled
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


STEPS = [ProximalLinear(num_rounds=3, num_tries=8), RotationStep(num_steps=12, num_rounds=3)]


def refined(name, step=STEPS[0], **settings):
    build = NETWORKS[name]
    a, b = (generic(build, seed).float() for seed in (0, 1))
    how = {"align": WeightMatching(), "spec": spec_of(name), "recipe": Recipe(epochs=2), **settings}
    pam = PAM(iterations=2, step=step)
    return b, modeconn.fit_curve(a, b, LOADER, refine=pam, **how)


@pytest.mark.parametrize(
    ("name", "curve", "step"),
    [
        ("layer norm", Line(), STEPS[0]),
        ("grouped queries", Bezier(2), STEPS[0]),
        ("layer norm", Bezier(2), STEPS[1]),
        ("grouped queries", Line(), STEPS[1]),
    ],
    ids=str,
)
def test_the_loss_falls_with_each_turn_and_the_function_stays(name, curve, step):
    b, connection = refined(name, step, curve=curve)
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


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_an_interrupted_run_ends_with_the_same_bits(step, tmp_path):
    _, whole = refined("layer norm", step)
    with pytest.raises(KeyboardInterrupt):
        refined("layer norm", step, checkpoint=tmp_path / "kept", callbacks=[Stop()])
    _, resumed = refined("layer norm", step, checkpoint=tmp_path / "kept")
    assert torch.equal(resumed.control_points, whole.control_points)
    assert resumed.permutation == whole.permutation


@pytest.mark.parametrize("step", [SinkhornStep(), RelaxedStep()], ids=lambda step: type(step).__name__)
def test_steps_that_move_whole_units_are_refused(step):
    a, b = (LanguageModel(nn.LayerNorm) for _ in range(2))
    with pytest.raises(ValueError, match=f"{type(step).__name__} permutes units, and align= found groups that rotate"):
        modeconn.fit_curve(a, b, LOADER, refine=PAM(iterations=1, step=step), spec=spec_of("layer norm"))


def test_a_step_that_turns_and_bends_lowers_the_loss_by_both():
    """From where b is, with a bend that is kept only together with its rotation: the loss is that of what came out."""
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    space, spec = WeightSpace(a), spec_of("layer norm")
    places = [(t, batch) for t in (0.3, 0.5, 0.7) for batch in LOADER]
    loss = CurveLoss(Workspace(a), Bezier(2), space.flatten(a), supervised(cross_entropy), places)
    start = spec.random(torch.Generator().manual_seed(2))
    theta_b = space.flatten(start.apply(b))
    moving = Relabelled(space, loss, theta_b, torch.zeros(1, space.num_parameters), start)
    before = moving.value
    RotationStep(num_steps=30, num_rounds=5, curve_learning_rate=1e-2)(moving)
    assert moving.value < before and moving.num_accepted and moving.num_tried == 5
    assert moving.bend.abs().max() > 0
    again = space.flatten(moving.permutation.apply(b))
    assert torch.allclose(again, moving.theta_b, atol=1e-5)
    assert loss.value(moving.theta_b, moving.bend) == pytest.approx(moving.value)
    held = Relabelled(space, loss, space.flatten(start.apply(b)), torch.zeros(1, space.num_parameters), start)
    RotationStep(num_steps=30, num_rounds=5, curve_learning_rate=1e-12)(held)
    assert moving.value < held.value  # the bend has its part in it


def test_a_bend_that_raises_the_loss_is_not_kept():
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    space, identity = WeightSpace(a), spec_of("layer norm").identity()
    loss = CurveLoss(Workspace(a), Bezier(2), space.flatten(a), supervised(cross_entropy), [(0.5, LOADER[0])])
    moving = Relabelled(space, loss, space.flatten(b), torch.zeros(1, space.num_parameters), identity)
    before = moving.value
    assert not moving.replace(identity, torch.full((1, space.num_parameters), 10.0))
    assert moving.value == before == loss.value(moving.theta_b, moving.bend) and not moving.bend.any()


def test_a_step_that_only_turns_is_refused_where_nothing_turns():
    a, b = (LanguageModel(nn.LayerNorm) for _ in range(2))
    with pytest.raises(ValueError, match=r"RotationStep turns groups that rotate .* symmetries='orthogonal'"):
        modeconn.fit_curve(
            a, b, LOADER, refine=PAM(iterations=1, step=RotationStep()), spec=modeconn.discover(a, tokens())
        )


def test_frozen_parameters_stay_on_the_line():
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    for model in (a, b):
        model.head.requires_grad_(False)
    space, identity = WeightSpace(a), spec_of("layer norm").identity()
    places = [(t, batch) for t in (0.3, 0.7) for batch in LOADER]
    loss = CurveLoss(Workspace(a), Bezier(2), space.flatten(a), supervised(cross_entropy), places)
    moving = Relabelled(space, loss, space.flatten(b), torch.zeros(1, space.num_parameters), identity)
    RotationStep(num_steps=20, num_rounds=2, curve_learning_rate=1e-2)(moving)
    assert moving.bend.any() and not moving.bend[:, ~space.trainable].any()
