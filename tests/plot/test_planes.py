"""Means and spreads of planes against the plane of the mean, made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from modeconn import Plane, plot

X, Y = torch.linspace(-1, 3, 5, dtype=torch.float64), torch.linspace(0, 2, 4, dtype=torch.float64)


def plane(seed, **changes):
    generator = torch.Generator().manual_seed(seed)
    loss, accuracy = (torch.rand(4, 5, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2))
    networks = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.tensor([2.0, seed / 5], dtype=torch.float64)}
    curve = torch.stack([torch.linspace(0, 2, 7), torch.full((7,), seed / 5)], 1).double()
    how = {"networks": networks, "curve": curve, "limit": 0.7 + seed / 10, **changes}
    return Plane(X, Y, {"loss": loss, "accuracy": accuracy / 2}, **how)


PLANES = [plane(seed) for seed in range(3)]


def contours(ax):
    return [path.vertices for path in ax.collections[0].get_paths()]


def assert_same_map(one, other):
    for left, right in zip(contours(one), contours(other), strict=True):
        np.testing.assert_allclose(left, right)
    np.testing.assert_allclose(one.collections[0].levels, other.collections[0].levels)


def by_hand(name, statistic):
    stacked = torch.stack([one.values[name] for one in PLANES])
    values = {"mean": stacked.mean(0), "std": stacked.std(0), "sem": stacked.std(0) / 3**0.5}[statistic]
    return dataclasses.replace(PLANES[0], values={name: values}, limit=0.9)


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize("statistic", ["mean", "std", "sem"])
def test_a_statistic_of_planes_is_drawn_as_the_plane_of_that_statistic(name, statistic):
    ax = plot.mean_plane(*PLANES, quantity=name, statistic=statistic, ax=Figure().subplots())
    assert_same_map(ax, plot.plane(by_hand(name, statistic), quantity=name, ax=Figure().subplots()))
    told = {"mean": "mean", "std": "standard deviation", "sem": "standard error"}[statistic]
    unit = {"loss": "mean per example", "accuracy": "%"}[name]
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() + bar.get_xlabel() == f"{told} of the {name}\n({unit}; over 3 planes)"


def test_the_mean_of_one_plane_is_that_plane():
    assert_same_map(plot.mean_plane(PLANES[1], ax=Figure().subplots()), plot.plane(PLANES[1], ax=Figure().subplots()))


def test_all_curves_and_networks_lie_over_the_mean_and_each_name_stands_once():
    ax = plot.mean_plane(*PLANES, ax=Figure().subplots())
    lines = [line.get_xydata() for line in ax.lines]
    for one in PLANES:
        assert sum(len(line) == 7 and np.array_equal(line, one.curve) for line in lines) == 2  # black upon white
    (marks,) = [line for line in lines if len(line) == 3 and line[0, 0] == 2]
    np.testing.assert_allclose(marks, [(2, 0), (2, 0.2), (2, 0.4)])
    assert [text.get_text() for text in ax.texts] == ["a", "b"]


def test_points_of_refinement_are_left_out_of_a_mean():
    more = {"between": torch.rand(4, 2, dtype=torch.float64), "between_values": {"loss": torch.rand(4).double()}}
    refined = [dataclasses.replace(one, **more) for one in PLANES]
    assert_same_map(plot.mean_plane(*refined, ax=Figure().subplots()), plot.mean_plane(*PLANES, ax=Figure().subplots()))


def test_losses_that_are_not_finite_are_drawn_as_the_highest():
    lost = plane(4)
    lost.values["loss"][0, 0], lost.values["loss"][1, 1] = torch.inf, torch.nan
    for statistic in ("mean", "std"):
        drawn = plot.mean_plane(*PLANES, lost, statistic=statistic, ax=Figure().subplots()).collections[0]
        assert drawn.extend == "max" and np.isfinite(drawn.levels).all()


@pytest.mark.parametrize(
    ("planes", "settings", "message"),
    [
        ([], {}, "there is no plane to draw"),
        ([PLANES[0], 3], {}, "plane 1 must be what modeconn.plane returns, got 3"),
        (PLANES, {"quantity": "speed"}, "plane 0 has no quantity 'speed', only 'loss', 'accuracy'"),
        (PLANES, {"statistic": "median"}, "statistic must be one of 'mean', 'std', 'sem', got statistic='median'"),
        (PLANES[:1], {"statistic": "std"}, "the standard deviation over planes needs two planes or more, got 1"),
        (
            [PLANES[0], dataclasses.replace(PLANES[1], x=X + 1.5)],
            {},
            r"plane 1 has another grid than plane 0\. .* extent=\(-1, 4\.5, 0, 2\), num_points=\(5, 4\)\)\.",
        ),
    ],
)
def test_planes_without_a_mean_are_refused(planes, settings, message):
    with pytest.raises(ValueError, match=message):
        plot.mean_plane(*planes, **settings)
