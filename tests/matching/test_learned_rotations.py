"""Rotations that are learned: exact at the start, orthogonal, with true gradients, and never worse than the start."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import modeconn
from modeconn import Bezier, Sinkhorn, StraightThrough, WeightMatching, callbacks
from modeconn.matching.turned import TurnedWeights
from modeconn.network.weights import WeightSpace
from modeconn.symmetry.invertible import duals_of
from tests.matching.test_rotations import generic
from tests.symmetry.rotating import LanguageModel, RMSNorm, tokens

NETWORKS = {
    "layer norm": lambda: LanguageModel(nn.LayerNorm),
    "grouped queries": lambda: LanguageModel(RMSNorm, width=16, heads=4, shared=2, size=4, gated=True),
}
LOADER = [(tokens(), tokens())] * 2


@cache
def spec_of(name):
    return modeconn.discover(generic(NETWORKS[name], 0), tokens(), symmetries="orthogonal")


def turned(name, seed: int = 0, dtype=torch.float64):
    """The weights of a network at a random start, its spec, and the network."""
    model, spec = generic(NETWORKS[name], seed).to(dtype), spec_of(name)
    model = spec.prepared(model)
    space = WeightSpace(model)
    start = spec.random(torch.Generator().manual_seed(seed))
    return TurnedWeights(spec, space, space.flatten(model), start), spec, model, space, start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_taken_at_the_start_to_the_bit(name, dtype):
    weights, _, model, space, start = turned(name, dtype=dtype)
    seen = []
    weights.backward(lambda theta: seen.append(theta.clone()) or torch.ones_like(theta))
    assert torch.equal(seen[0], space.flatten(start.apply(model)))


@pytest.mark.parametrize("drawn", [lambda name: turned(name)[0], lambda name: mapped(name)[0]], ids=["turns", "maps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_finite_differences(name, drawn):
    weights, generator, seen = drawn(name), torch.Generator().manual_seed(1), []
    weights.backward(lambda theta: seen.append(theta.clone()) or torch.zeros_like(theta))
    slope = torch.randn(seen[0].shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for z in weights.parameters:
            z.copy_(0.2 * torch.randn(z.shape, generator=generator, dtype=z.dtype))

    def loss() -> float:
        values = []
        weights.backward(lambda theta: values.append(float((theta**2 * slope).sum())) or 2 * theta * slope)
        return values[0]

    for z in weights.parameters:
        z.grad = None
    loss()
    gradients = [z.grad.clone() for z in weights.parameters]
    for z, gradient in zip(weights.parameters, gradients, strict=True):
        direction = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                z.add_(step * direction)
            values.append(loss())
            with torch.no_grad():
                z.sub_(step * direction)
        expected = (values[0] - values[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_relabelling_is_orthogonal_and_gives_the_weights_of_the_step(name):
    weights, spec, model, space, _ = turned(name)
    with torch.no_grad():
        for z in weights.parameters:
            z.copy_(torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2)))
    seen = []
    weights.backward(lambda theta: seen.append(theta.clone()) or theta)
    found = weights.relabelling()
    assert torch.allclose(space.flatten(found.apply(model)), seen[0], atol=1e-12)
    assert torch.allclose(found.apply(model)(tokens()), model(tokens()), atol=1e-9)
    for group in spec.groups:
        if group.rotates:
            g = found.elements[group.name]
            assert float((g @ g.mT - torch.eye(group.size, dtype=g.dtype)).abs().max()) < 1e-12


def test_a_small_turn_is_found_by_distance_alone():
    model = generic(NETWORKS["grouped queries"], 0)
    spec = spec_of("grouped queries")
    model = spec.prepared(model)
    space = WeightSpace(model)
    weights = TurnedWeights(spec, space, space.flatten(model), spec.identity())
    with torch.no_grad():
        for z in weights.parameters:
            z.copy_(0.05 * torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2)))
    other = weights.relabelling().apply(model)
    method = Sinkhorn(objective="weights", num_steps=300, rotation_learning_rate=1e-2)
    found = modeconn.align(model, other, method=method, spec=spec)
    assert found.history[-1] < 1e-4 * found.history[0]


@pytest.mark.parametrize("objective", ["midpoint", "middle", "line", Bezier(2)], ids=str)
@pytest.mark.parametrize("kind", [Sinkhorn, StraightThrough])
def test_learning_lowers_the_loss_and_keeps_what_permutes(kind, objective):
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    spec = spec_of("layer norm")
    start = modeconn.align(a, b, method=WeightMatching(), spec=spec)
    method = kind(start=start, objective=objective, num_steps=20, num_rounds=4)
    found = modeconn.align(a, b, LOADER, method=method, spec=spec)
    assert found.history[-1] < found.history[0]
    assert list(found.history) == sorted(found.history, reverse=True) or isinstance(objective, Bezier)
    for group in spec.groups:
        if not group.rotates:
            assert torch.equal(found.permutation.elements[group.name], start.permutation.elements[group.name])
    assert torch.allclose(found.model_b(tokens()), b(tokens()), atol=1e-4)


def test_a_curve_begins_at_rotations_that_were_learned():
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    method = Sinkhorn(start=WeightMatching(), num_steps=3)
    curve = modeconn.fit_curve(a, b, LOADER, align=method, spec=spec_of("layer norm"))
    assert torch.allclose(curve.model_at(1.0)(tokens()), b(tokens()), atol=1e-4)


# -- invertible maps inside of heads


def mapped(name, seed: int = 0):
    """As `turned`, with maps inside of heads that are somewhere."""
    model, spec = generic(NETWORKS[name], seed), spec_of(name)
    model, duals = spec.prepared(model), duals_of(spec, model, tokens())
    space = WeightSpace(model)
    start = spec.random(torch.Generator().manual_seed(seed))
    return TurnedWeights(spec, space, space.flatten(model), start, duals), model, space, start


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_begin_at_the_start_and_are_those_of_the_relabelling_they_stand_for(name):
    weights, model, space, start = mapped(name)
    seen = []
    weights.backward(lambda theta: seen.append(theta.clone()) or torch.ones_like(theta))
    torch.testing.assert_close(seen[0], space.flatten(start.apply(model)), atol=1e-13, rtol=1e-13)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for z in weights.parameters:
            z.copy_(0.2 * torch.randn(z.shape, generator=generator, dtype=z.dtype))
    weights.backward(lambda theta: seen.append(theta.clone()) or torch.ones_like(theta))
    moved = weights.relabelling().apply(model)
    torch.testing.assert_close(seen[1], space.flatten(moved))
    torch.testing.assert_close(moved(tokens()), model(tokens()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [Sinkhorn, StraightThrough], ids=lambda kind: kind.__name__)
def test_learned_maps_leave_the_function_and_are_never_worse_than_the_start(kind, tmp_path):
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    settings = {"num_steps": 20, "num_rounds": 2, "num_examples": 4, "objective": "middle", "invertible": True}
    method = kind(start=WeightMatching(), **settings)
    aligned = modeconn.align(a, b, LOADER, method=method, spec=spec_of("layer norm"))
    assert isinstance(aligned.permutation, modeconn.Invertible) and aligned.history[-1] < aligned.history[0]
    torch.testing.assert_close(aligned.model_b(tokens()), b(tokens()), atol=1e-4, rtol=1e-4)
    again = modeconn.align(a, b, LOADER, method=method, spec=spec_of("layer norm"))
    assert again.permutation == aligned.permutation
    connection = modeconn.fit_curve(a, b, LOADER, align=aligned, recipe=modeconn.Recipe(epochs=1))
    connection.save(tmp_path / "c")
    assert modeconn.Connection.load(tmp_path / "c", a).permutation == aligned.permutation


def test_maps_are_refused_where_nothing_rotates_and_for_distances_and_warned_of_where_there_are_none():
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2))
    loader = [(torch.rand(5, 4), torch.arange(5) % 3)]
    with pytest.raises(ValueError, match="invertible=True maps units inside of heads, but the spec has no group"):
        modeconn.align(a, b, loader, method=Sinkhorn(num_steps=1, invertible=True))
    with pytest.raises(ValueError, match="invertible=True is learned through the loss"):
        Sinkhorn(objective="weights", invertible=True)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3)) for _ in range(2))
    with pytest.warns(UserWarning, match="invertible=True has no effect"):
        modeconn.align(a, b, loader, method=Sinkhorn(num_steps=1, invertible=True), symmetries="orthogonal")


class Stop(callbacks.Callback):
    """Ends a run after its first epoch."""

    def after_epoch(self, event) -> None:
        """Do what a user's Ctrl-C does."""
        raise KeyboardInterrupt


@pytest.mark.parametrize("invertible", [False, True])
def test_a_fit_that_was_stopped_goes_on_with_the_learned_relabelling_to_the_bit(invertible, tmp_path):
    a, b = (generic(NETWORKS["layer norm"], seed).float() for seed in (0, 1))
    method = Sinkhorn(start=WeightMatching(), num_steps=5, num_rounds=1, num_examples=4, invertible=invertible)
    how = {"align": method, "spec": spec_of("layer norm"), "recipe": modeconn.Recipe(epochs=2)}
    whole = modeconn.fit_curve(a, b, LOADER, **how)
    with pytest.raises(KeyboardInterrupt):
        modeconn.fit_curve(a, b, LOADER, checkpoint=tmp_path / "kept", callbacks=[Stop()], **how)
    resumed = modeconn.fit_curve(a, b, LOADER, checkpoint=tmp_path / "kept", **how)
    assert torch.equal(resumed.control_points, whole.control_points) and resumed.permutation == whole.permutation
