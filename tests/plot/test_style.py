"""What all figures have in common: seen on white and on dark, nothing hidden, spreads and intervals as they are."""

from __future__ import annotations

import dataclasses
import pickle
import types

import matplotlib.style
import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.collections import Collection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from modeconn import Bezier, Plane, plot
from modeconn.connection import History
from modeconn.measure.profile import Profile
from modeconn.measure.robust_profile import RobustProfile
from modeconn.plot import style

T = torch.linspace(0, 1, 5, dtype=torch.float64)
BUMP = Profile(T, loss=1 + T * (1 - T), accuracy=0.9 - T / 10, arc_length=T, num_examples=100)
CORRECT = torch.arange(20) % 3 > 0
ROBUST = RobustProfile(
    T,
    {row: CORRECT.repeat(5, 1) for row in ("clean", "pgd")},
    {row: torch.rand(5, 20) for row in ("clean", "pgd")},
    {"pgd": {}},
    "digest",
)
TURNS = [{"loss_before": 2.0, "loss_after": 1.0}, {"loss_before": 1.0, "loss_after": 0.9}]
MEASURED = [
    {"validation accuracy, t=0": 0.5, "validation accuracy, t=0.5": 0.25},
    {"validation accuracy, t=0.5": 0.75},
]
HISTORY = History([2.0, 1.0], [[1.0, None, 3.0], [0.5, 1.5, None]], turns=TURNS, values=MEASURED)
COMPARED = types.SimpleNamespace(
    values={
        "one": {"line": [0.1, 0.2], "seconds": [1.0, 2.0]},
        "other": {"line": [0.3, 0.4], "seconds": [10.0, 300.0]},
    },
    columns=("line", "seconds"),
)
PERM = types.SimpleNamespace(perms={"fc": torch.tensor([1, 0, 2, 4, 5, 3]), "heads": torch.tensor([[1, 0], [0, 1]])})
AXIS = torch.arange(3, dtype=torch.float64)
MAP = Plane(AXIS, AXIS, {"loss": torch.rand(3, 3, dtype=torch.float64) + 0.1}, networks={"a": AXIS[:2]}, limit=0.5)
FIGURES = {
    "profile": lambda ax: plot.profile(BUMP, BUMP, labels=["a", "b"], quantity="accuracy", ax=ax),
    "spread": lambda ax: plot.profile([BUMP, dataclasses.replace(BUMP, loss=BUMP.loss + 1)], labels=["a"], ax=ax),
    "robust": lambda ax: plot.robust_profile(ROBUST, ROBUST, labels=["a", "b"], ax=ax),
    "correlation": lambda ax: plot.correlation({"fc": (0.1, 0.5), "conv": (-0.2, 0.9)}, ax=ax),
    "angles": lambda ax: plot.eigen_angles(types.SimpleNamespace(angles=lambda: {"s": torch.rand(4)}), ax=ax),
    "cycles": lambda ax: plot.cycles(PERM, ax=ax),
    "history": lambda ax: plot.history(HISTORY, ax=ax),
    "measured": lambda ax: plot.history(HISTORY, HISTORY, labels=["a", "b"], quantity="accuracy", ax=ax),
    "spectrum": lambda ax: plot.spectrum(BUMP, BUMP, labels=["a", "b"], ax=ax),
    "turns": lambda ax: plot.turns(HISTORY, ax=ax),
    "comparison": lambda ax: plot.comparison(COMPARED, ax=ax),
    "seconds": lambda ax: plot.comparison(COMPARED, column="seconds", ax=ax),
}
UNITS = torch.eye(4)
MAPS = {
    "units": lambda ax: plot.unit_correlation(UNITS, ax=ax),
    "plane": lambda ax: plot.plane(MAP, ax=ax),
    "mean plane": lambda ax: plot.mean_plane(MAP, MAP, ax=ax),
    "by t": lambda ax: plot.history_by_t(HISTORY, ax=ax),
}


def luminance(colour):
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [*style.COLOURS, style.NEUTRAL])
def test_colours_are_seen_on_white_and_on_black(colour):
    assert contrast(colour, "white") > 2 and contrast(colour, "black") > 2.5


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("theme", ["default", "dark_background"])
def test_figures_are_seen_on_light_and_dark(name, theme):
    with matplotlib.style.context(theme):
        figure = Figure(layout="constrained")
        ax = FIGURES[name](figure.subplots())
        figure.draw_without_rendering()
        drawn = [to_rgba(line.get_color()) for line in ax.lines]
        for found in ax.collections:
            assert isinstance(found, Collection)
            drawn += [tuple(c) for c in (*found.get_facecolor(), *found.get_edgecolor())]
        drawn += [patch.get_facecolor() for patch in ax.patches]
        drawn += [to_rgba(text.get_color()) for text in ax.get_legend().get_texts()] if ax.get_legend() else []
        assert drawn and all(contrast(c, ax.get_facecolor()) > 2 for c in drawn)
        assert name in ("comparison", "seconds") or ax.get_legend() is not None


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("comparison", "seconds")])
def test_legends_hide_no_data(name):
    figure = Figure(layout="constrained")
    ax = FIGURES[name](figure.subplots())
    figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("comparison", "seconds")])
@pytest.mark.parametrize("is_first", [True, False])
def test_titles_stand_above_legends(name, is_first):
    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax in (part.subplots() for part in figure.subfigures(1, 2)):
        if is_first:
            ax.set_title("Before")
        FIGURES[name](FIGURES[name](ax))  # also where two are drawn in one place
        if not is_first:
            ax.set_title("Afterwards")
    figure.draw_without_rendering()
    title, legend = ax.title.get_window_extent(), ax.get_legend().get_window_extent()
    assert legend.y1 <= title.y0 < legend.y1 + 20 and title.y1 <= figure.bbox.y1
    ax.get_legend().remove()
    figure.draw_without_rendering()
    assert ax.bbox.y1 <= ax.title.get_window_extent().y0 < ax.bbox.y1 + 20


def test_figures_can_be_pickled():
    figure = Figure(layout="constrained")
    FIGURES["profile"](figure.subplots())
    copy = pickle.loads(pickle.dumps(figure))
    copy.draw_without_rendering()
    assert copy.axes[0].get_legend().get_window_extent().y0 >= copy.axes[0].bbox.y1 - 1


@pytest.mark.parametrize("name", MAPS)
def test_maps_name_their_colours(name):
    figure = Figure(layout="constrained")
    MAPS[name](figure.subplots())
    text = figure.axes[1].get_ylabel() + figure.axes[1].get_xlabel()
    assert len(figure.axes) == 2 and ("correlation" if name == "units" else "mean per example") in text


def test_equal_lines_are_all_seen():
    ax = plot.profile(BUMP, BUMP, BUMP, labels=list("abc"), ax=Figure().subplots())
    widths = [line.get_linewidth() for line in ax.lines if line.get_label() in "abc"]
    assert widths == sorted(set(widths), reverse=True)


def test_lists_are_drawn_as_mean_and_standard_deviation():
    losses = [BUMP.loss, BUMP.loss + 1, BUMP.loss + 5]
    group = [dataclasses.replace(BUMP, loss=loss) for loss in losses]
    ax = plot.profile(group, BUMP, labels=["seeds", "one"], ax=Figure().subplots())
    mean, spread = torch.stack(losses).mean(0), torch.stack(losses).std(0)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), mean)
    points = {tuple(np.round(p, 6)) for p in ax.collections[0].get_paths()[0].vertices}
    assert points >= {(round(float(t), 6), round(float(m + s), 6)) for t, m, s in zip(T, mean, spread, strict=True)}
    ax = plot.profile(group, labels=["seeds"], spread="sem", ax=Figure().subplots())
    points = {tuple(np.round(p, 6)) for p in ax.collections[0].get_paths()[0].vertices}
    error = scipy.stats.sem(torch.stack(losses))
    assert points >= {(round(float(t), 6), round(float(m - e), 6)) for t, m, e in zip(T, mean, error, strict=True)}
    with pytest.raises(ValueError, match="spread must be one of 'std', 'sem', got spread='range'"):
        plot.profile(group, spread="range")
    short = Profile(T[:3], loss=BUMP.loss[:3], accuracy=None, arc_length=None)
    with pytest.raises(ValueError, match="different positions"):
        plot.profile([BUMP, short], ax=Figure().subplots())
    with pytest.raises(ValueError, match="empty list"):
        plot.profile([], ax=Figure().subplots())


def test_accuracies_have_the_interval_of_their_examples():
    from scipy.stats import binomtest

    ax = plot.profile(BUMP, quantity="accuracy", ax=Figure().subplots())
    points = ax.collections[0].get_paths()[0].vertices[:, 1] / 100
    expected = binomtest(90, 100).proportion_ci(0.95, method="wilson")
    assert points.max() == pytest.approx(expected.high, abs=1e-4)
    expected = binomtest(80, 100).proportion_ci(0.95, method="wilson")
    assert points.min() == pytest.approx(expected.low, abs=1e-4)


def test_several_connections_under_attack_share_a_figure():
    ax = plot.robust_profile(ROBUST, ROBUST, labels=["line", "curve"], ax=Figure().subplots())
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["line, clean", "line, pgd", "curve, clean", "curve, pgd"]
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines if line.get_label() in names}
    assert len(looks) == 4
    with pytest.raises(ValueError, match="labels must name each profile: 2 to draw"):
        plot.robust_profile(ROBUST, ROBUST)


def test_metrics_of_other_units_share_no_figure():
    class Other(Profile):
        def quantity(self, name):
            return types.SimpleNamespace(unit="bits")

    with pytest.raises(ValueError, match="one figure has one unit"):
        plot.profile(BUMP, Other(T, loss=T, accuracy=None, arc_length=None), ax=Figure().subplots())


def test_cycles_are_those_of_a_permutation():
    ax = plot.cycles(PERM, ax=Figure().subplots())
    heights = [[patch.get_height() for patch in bars] for bars in ax.containers]
    np.testing.assert_allclose(heights[0], [100 / 6, 50])  # units that stay
    np.testing.assert_allclose(heights[1], [200 / 6, 50])  # in cycles of two
    np.testing.assert_allclose(heights[2], [50, 0])
    np.testing.assert_allclose(np.sum(heights, 0), [100, 100])
    with pytest.raises(ValueError, match="permutes no units"):
        plot.cycles(types.SimpleNamespace(perms={}))


def test_units_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match="one square matrix"):
        plot.unit_correlation(torch.rand(3, 4))


def test_losses_have_a_logarithmic_axis_unless_one_is_not_positive():
    assert plot.history(HISTORY, ax=Figure().subplots()).get_yscale() == "log"
    assert plot.history(History([0.0], [[0.0, 1.0]]), ax=Figure().subplots()).get_yscale() == "linear"
    assert plot.turns(HISTORY, ax=Figure().subplots()).get_yscale() == "log"
    with pytest.raises(ValueError, match="has no turns"):
        plot.turns(History([1.0], [[1.0]]))


def test_bars_begin_at_zero_and_seconds_have_none():
    ax = plot.comparison(COMPARED, ax=Figure().subplots())
    assert [patch.get_height() for patch in ax.patches] == pytest.approx([0.15, 0.35]) and ax.get_ylim()[0] <= 0
    ax = plot.comparison(COMPARED, column="seconds", ax=Figure().subplots())
    assert ax.get_yscale() == "log" and not ax.patches


def test_rows_of_a_comparison_can_be_chosen_and_ordered():
    ax = plot.comparison(COMPARED, rows=["other", "one"], ax=Figure().subplots())
    assert [patch.get_height() for patch in ax.patches] == pytest.approx([0.35, 0.15])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["other", "one"]
    (alone,) = plot.comparison(COMPARED, rows=["one"], ax=Figure().subplots()).patches
    assert alone.get_height() == pytest.approx(0.15)
    for rows, said in {("third",): "no row 'third'; there are one, other", (): "rows must be a list of names"}.items():
        with pytest.raises(ValueError, match=said):
            plot.comparison(COMPARED, rows=list(rows))


def test_the_plane_of_a_curve_is_drawn_with_it():
    points = Bezier(2).basis(T).double() @ torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    ax = plot.plane(dataclasses.replace(MAP, curve=points), ax=Figure().subplots())
    np.testing.assert_allclose(ax.lines[-2].get_xydata(), points)
