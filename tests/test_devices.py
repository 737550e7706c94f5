"""Verbs on the device of ``pytest --device`` against the CPU, for every tiny network; on the CPU, identities."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import modeconn
from modeconn import PGD, Bezier, Recipe, WeightMatching
from tests.cases import CASES, DEVICE, batches

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.05), schedule=modeconn.constant)
DETERMINISTIC = [case for case in CASES if case.name not in ("dropout", "batch_norm")]  # generators differ by device


def pair(case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    return tuple(case.make(seed, torch.float64).to(device) for seed in (0, 1))


def data(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in batches(dtype=torch.float64)]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("data_device", [CPU, DEVICE], ids=["data on the CPU", "data on the device"])
def test_a_fit_and_what_is_measured_of_it_agree_with_the_cpu(case, data_device):
    found = []
    for device, where in ((CPU, CPU), (DEVICE, data_device)):
        a, b = pair(case, device)
        connection = modeconn.fit_curve(a, b, data(where), align=WeightMatching(), curve=Bezier(2), recipe=RECIPE)
        assert connection.control_points.device.type == device.type
        profile = connection.evaluate(data(where), num_points=5)
        assert profile.loss.device == CPU
        found.append((connection.permutation, connection.control_points.cpu(), profile.loss, profile.accuracy))
    (permutation, *expected), (other, *tensors) = found
    assert other == permutation
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_activations_are_matched_alike(case):
    found = [modeconn.align(*pair(case, device), data(device)).permutation for device in (CPU, DEVICE)]
    assert found[0] == found[1]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_attacks_are_those_of_the_cpu(case):
    attack, results = PGD(0.1, 0.03, 3, random_start=False, clip=None), []
    for device in (CPU, DEVICE):
        model, (x, y) = case.make(0, torch.float64).to(device), data(device)[0]
        results.append(attack(model, x, y).cpu())
    torch.testing.assert_close(*results)


def test_a_loader_on_another_device_just_works_and_networks_on_two_are_an_error():
    a, b = pair(CASES[0], DEVICE)
    assert modeconn.Connection.straight_between(a, b).evaluate(data(CPU), num_points=3).loss.isfinite().all()
    elsewhere = copy.deepcopy(b).to("meta")
    with pytest.raises(ValueError, match=r"endpoints differ at .*Bring both to one dtype and device first"):
        modeconn.interpolate(a, elsewhere)
