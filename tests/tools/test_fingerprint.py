"""What tells settings apart, so that no measurement is taken for another's."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import modeconn
from modeconn import PGD, Bezier, DeepAlign, Permutation, PolyChain, Recipe, Sinkhorn, WeightMatching, models
from modeconn.tools.fingerprint import digest, identify


def scaled(factor):
    return lambda x: factor * x


class Opaque:
    def __init__(self, value):
        self.value = value


class Slim:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Named:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return "Named()"


class Loop:
    def __init__(self, value):
        self.value, self.me = value, self


@dataclass(frozen=True)
class Setting:
    value: object


def by_default(x, factor=2):
    return factor * x


PERMS = ([1, 0, 2, 3, 4], [0, 1, 2, 4, 3])


class Layer(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean, self.linear = mean, nn.Linear(2, 2)
        self.linear.weight = nn.Parameter(torch.ones(2, 2))
        self.linear.bias = nn.Parameter(torch.zeros(2))


HOLDERS = [Opaque, Slim, Named, Loop, Setting, lambda v: [v], lambda v: {"a": v}, lambda v: functools.partial(max, v)]
VALUES = [1, 2, 1.0, "1", None, (1, 2), (2, 1), torch.zeros(2), torch.zeros(3), torch.ones(2), torch.zeros(2).double()]


@pytest.mark.parametrize("holder", [lambda v: v, *HOLDERS])
def test_different_values_are_told_apart_whatever_holds_them(holder):
    assert len({identify(holder(value)) for value in VALUES}) == len(VALUES)
    assert [identify(holder(value)) for value in VALUES] == [identify(holder(value)) for value in VALUES]


@pytest.mark.parametrize(
    "pair",
    [
        (scaled(1), scaled(2)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: [y + 1 for y in x], lambda x: [y + 2 for y in x]),
        (lambda x, k=1: x, lambda x, k=2: x),
        (torch.nn.functional.relu, torch.nn.functional.gelu),
        (Opaque(1).__init__, Opaque(2).__init__),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (Layer(0.0), Layer(0.5)),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Sigmoid())),
        (Bezier(2), Bezier(3)),
        (Bezier(2), PolyChain(2)),
        (Recipe(epochs=1), Recipe(epochs=2)),
        (PGD(0.1, 0.1, 1), PGD(0.1, 0.1, 1, loss_fn=lambda z, y: -nn.functional.cross_entropy(z, y))),
        (Sinkhorn(start=WeightMatching(seed=1)), Sinkhorn(start=WeightMatching(seed=2))),
        (DeepAlign(seed=1), DeepAlign(seed=2)),
    ],
    ids=[f"pair {number}" for number in range(15)],
)
def test_what_acts_differently_is_told_apart(pair):
    assert identify(pair[0]) != identify(pair[1])


def test_permutations_and_aligners_are_told_apart_by_what_they_hold():
    networks = [models.mlp(4, (5,), 3, seed=seed) for seed in range(4)]
    spec = modeconn.discover(networks[0])
    p, q = (Permutation(spec, {group.name: torch.tensor(perm) for group in spec.groups}) for perm in PERMS)
    assert identify(WeightMatching(start=p)) != identify(WeightMatching(start=q))
    assert identify(p) == identify(modeconn.discover(networks[1]).identity() @ p)
    settings = DeepAlign(features=8, depth=1, num_steps=0, connectivity=0.0)
    fitted = [settings.fit(part, example_input=torch.rand(2, 4)) for part in (networks[:2], networks[2:])]
    assert identify(fitted[0]) != identify(fitted[1])


def test_what_a_function_writes_to_is_no_part_of_it():
    def counting(seen, factor):
        return lambda x: seen.append(x) or factor * x

    function = counting([], 1)
    before = identify(function)
    function(1)
    assert identify(function) == before != identify(counting([], 2))


def test_whatever_an_object_holds_is_named_in_little_time():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    wide: list = [torch]
    for _ in range(60):
        wide = [wide, wide]  # 2^60 ways to the inside

    def function(x):
        return later(x)

    held = [torch, logging.getLogger("test"), deep, wide, function, threading.Lock(), torch.Generator()]
    assert all(len(identify(Opaque(value))) < 3000 for value in held)
    later = Opaque
    assert later is Opaque and identify(torch) != identify(nn)


def test_networks_of_any_kind_have_a_digest():
    layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(200)])
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert len({digest(network) for network in (layers, torch.fx.symbolic_trace(layers), normed) * 2}) == 3


def test_the_digest_of_a_network_knows_its_layers_and_names():
    assert digest(Layer(0.0)) == digest(Layer(0.0)) != digest(Layer(0.5))
    first, second = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    second.load_state_dict(first.state_dict())
    assert digest(first) != digest(second)
    assert digest(first) == digest(first.train()) == digest(first.eval())


def test_another_process_says_the_same():
    code = (
        "import torch; from modeconn import *; from modeconn import models\n"
        "from modeconn.tools.fingerprint import identify\n"
        "print(identify([PGD(0.1, 0.1, 1, loss_fn=lambda z, y: z.sum()), {'a', 'b', 'c'}, Recipe(), object(), "
        "models.mlp(4, (3,), 2, seed=1), torch.nn.functional.max_pool2d, Sinkhorn(start=WeightMatching())]))"
    )
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(said) == 1
