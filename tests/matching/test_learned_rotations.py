"""Rotations that are learned: exact at the start, orthogonal, with true gradients, and never worse than the start."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import modeconn
from modeconn import Bezier, Sinkhorn, StraightThrough, WeightMatching
from modeconn.matching.turned import TurnedWeights
from modeconn.network.weights import WeightSpace
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


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_finite_differences(name):
    weights, _, _, space, _ = turned(name)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(space.flatten(turned(name)[2]).shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for z in weights.parameters:
            z.copy_(0.2 * torch.randn(z.shape, generator=generator, dtype=z.dtype))

    def loss() -> float:
        seen = []
        weights.backward(lambda theta: seen.append(float((theta**2 * slope).sum())) or 2 * theta * slope)
        return seen[0]

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
