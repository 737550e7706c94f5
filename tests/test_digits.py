"""The digits experiment: two networks of 98% accuracy from different seeds, as a user would connect them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import modeconn
from modeconn import Bezier, Line, Recipe, data, models
from modeconn.models.training import DIGITS_RECIPE

CURVE_RECIPE = Recipe(
    epochs=30, optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True), weight_decay=0.0
)
NUM_PAIRS = 5


@pytest.fixture(scope="module")
def results() -> list[dict[str, float]]:
    """Barriers of the test loss over 25 points, for pairs of seeds (1, 2), (3, 4), ..."""
    train, test = data.load("digits")
    network = partial(models.mlp, 64, (128, 128), 10, mean=train.mean(), std=train.std() + 0.1)

    def endpoint(seed: int) -> torch.nn.Module:
        return models.train(network(seed=seed), train, recipe=DIGITS_RECIPE, seed=seed)

    found = []
    spec = modeconn.discover(network())
    for pair in range(NUM_PAIRS):
        a, b = endpoint(2 * pair + 1), endpoint(2 * pair + 2)
        aligned = modeconn.align(a, b, train, spec=spec)
        fits = {
            "naive": modeconn.fit_curve(a, b, train, align=False, curve=Line()),
            "aligned": modeconn.fit_curve(a, b, train, align=aligned, curve=Line()),
            "curve": modeconn.fit_curve(a, b, train, align=False, curve=Bezier(2), recipe=CURVE_RECIPE, seed=pair),
            "aligned curve": modeconn.fit_curve(
                a, b, train, align=aligned, curve=Bezier(2), recipe=CURVE_RECIPE, seed=pair
            ),
        }
        profiles = {name: connection.evaluate(test, num_points=25) for name, connection in fits.items()}
        found.append({name: profile.barrier for name, profile in profiles.items()})
        found[-1]["accuracy"] = float(profiles["naive"].accuracy[[0, -1]].min())
    return found


def mean(results: list[dict[str, float]], name: str) -> float:
    return sum(result[name] for result in results) / len(results)


def test_endpoints_are_good_and_far_apart(results: list[dict[str, float]]) -> None:
    assert min(result["accuracy"] for result in results) > 0.95
    assert min(result["naive"] for result in results) > 0.2


def test_alignment_removes_92_percent_of_the_straight_barrier(results: list[dict[str, float]]) -> None:
    """One layer left out would leave 13-20% of it."""
    assert mean(results, "aligned") <= 0.08 * mean(results, "naive")


def test_an_aligned_curve_keeps_at_most_4_percent_of_it(results: list[dict[str, float]]) -> None:
    assert mean(results, "aligned curve") <= 0.04 * mean(results, "naive")


def test_every_aligned_curve_has_at_most_half_the_barrier_of_the_unaligned_one(results: list[dict[str, float]]) -> None:
    for result in results:
        assert result["aligned curve"] <= 0.5 * result["curve"]
