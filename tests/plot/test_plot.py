from __future__ import annotations

import dataclasses
import types

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from modeconn import Recipe, callbacks, data, fit_curve, models, plot
from modeconn.connection import History
from modeconn.measure.profile import Profile

T = torch.linspace(0, 1, 5, dtype=torch.float64)
BUMP = Profile(T, loss=1 + T * (1 - T), accuracy=0.9 - T / 10, arc_length=T)
FLAT = dataclasses.replace(BUMP, loss=torch.ones_like(T))


@pytest.fixture
def ax():
    return Figure().subplots()


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def learned(loss, loss_by_t):
    return types.SimpleNamespace(history=History(loss, loss_by_t))


@pytest.mark.parametrize(
    ("quantity", "values", "axis"),
    [
        ("loss", BUMP.loss, "loss (mean per example)"),
        ("accuracy", 100 * BUMP.accuracy, "accuracy (%)"),
        ("error", 100 * BUMP.error, "error (%)"),
    ],
)
def test_a_profile_is_drawn_along_t_in_the_units_its_axis_names(ax, quantity, values, axis):
    assert plot.profile(BUMP, quantity=quantity, ax=ax) is ax
    curve, ends = ax.lines
    np.testing.assert_array_equal(curve.get_xdata(), T)
    np.testing.assert_allclose(curve.get_ydata(), values)
    np.testing.assert_allclose(ends.get_xydata(), [(0, values[0]), (1, values[-1])])
    assert ax.get_ylabel() == axis and "t (0: network a, 1: network b)" in ax.get_xlabel()
    assert ax.get_legend() is None


def test_several_profiles_differ_in_colour_and_dashes_and_are_named(ax):
    plot.profile(BUMP, FLAT, labels=["straight", "curve"], ax=ax)
    first, _, second, _ = ax.lines
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert texts(ax.get_legend()) == ["straight", "curve"]


@pytest.mark.parametrize(("quantity", "expected"), [("loss", (3, 2)), ("accuracy", (50, 80)), ("error", (50, 20))])
def test_rings_mark_ends_whose_own_statistics_give_other_values(ax, quantity, expected):
    own = torch.tensor([3.0, 2.0]).double(), torch.tensor([0.5, 0.8]).double()
    plot.profile(dataclasses.replace(BUMP, own_loss=own[0], own_accuracy=own[1]), quantity=quantity, ax=ax)
    np.testing.assert_allclose(ax.lines[2].get_ydata(), expected)
    assert ax.lines[2].get_fillstyle() == "none"


def test_ends_whose_own_statistics_agree_get_no_ring(ax):
    plot.profile(dataclasses.replace(BUMP, own_loss=BUMP.loss[[0, -1]]), ax=ax)
    assert len(ax.lines) == 2


def test_without_an_ax_a_new_figure_is_made():
    with matplotlib.rc_context({"backend": "agg"}):
        from matplotlib import pyplot

        first, second = plot.profile(BUMP), BUMP.plot()
        assert first.figure is not second.figure
        pyplot.close("all")


def test_correlations_are_drawn_before_and_after_for_each_group(ax):
    assert plot.correlation({"conv1": (0.1, 0.7), "fc": (0.2, 0.9)}, ax=ax) is ax
    before, after = ax.containers
    np.testing.assert_allclose(before.lines[0].get_ydata(), [0.1, 0.2])
    np.testing.assert_allclose(after.lines[0].get_ydata(), [0.7, 0.9])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "fc"]
    assert texts(ax.get_legend()) == ["before alignment", "after alignment"]
    assert not before.has_yerr


def test_several_alignments_are_drawn_as_mean_and_range(ax):
    alignments = [types.SimpleNamespace(correlation={"fc": (0.0, after)}) for after in (0.2, 0.3, 0.7)]
    plot.correlation(*alignments, ax=ax)
    after = ax.containers[1]
    assert isinstance(after, ErrorbarContainer) and after.has_yerr
    np.testing.assert_allclose(after.lines[0].get_ydata(), [0.4])
    np.testing.assert_allclose(after.lines[2][0].get_segments()[0][:, 1], [0.2, 0.7])


@pytest.mark.parametrize(("count", "angle"), [(3, 0), (9, 30), (32, 90)])
def test_group_names_turn_as_they_get_more_and_can_be_replaced(ax, count, angle):
    correlation = {f"group{index}": (0.0, 0.5) for index in range(count)}
    plot.correlation(correlation, labels=[f"g{index}" for index in range(count)], ax=ax)
    labels = ax.get_xticklabels()
    assert labels[1].get_text() == "g1" and {label.get_rotation() for label in labels} == {angle}


def test_angles_are_drawn_in_rising_order_beside_those_of_chance(ax):
    angles = {"stream": torch.tensor([3.0, 0.0, 1.0]), "head": torch.tensor([[1.0, 2.0], [0.5, 0.5]])}
    plot.eigen_angles(types.SimpleNamespace(angles=lambda: angles), ax=ax)
    chance, stream, head = ax.lines
    np.testing.assert_allclose(chance.get_ydata(), [0, 180])
    np.testing.assert_allclose(stream.get_ydata(), np.degrees([0.0, 1.0, 3.0]), rtol=1e-6)
    np.testing.assert_allclose(head.get_ydata(), np.degrees([0.5, 0.5, 1.0, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(head.get_xdata(), [12.5, 37.5, 62.5, 87.5])
    assert texts(ax.get_legend()) == ["drawn at random", "stream", "head"]


def test_negative_correlations_stay_in_sight(ax):
    plot.correlation({"fc": (-0.4, 0.5)}, ax=ax)
    assert ax.get_ylim()[0] < -0.4


def test_a_history_is_drawn_by_epoch_with_its_range_over_t(ax):
    fit = learned([2.0, 1.0], [[1.0, None, 3.0], [0.5, 1.5, None]])
    assert plot.history(fit, ax=ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [(1, 2), (2, 1)])
    outline = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in outline} >= {(1, 1), (1, 3), (2, 0.5), (2, 1.5)}
    assert texts(ax.get_legend()) == ["mean over t", "range over t"]


def measured(*values):
    return types.SimpleNamespace(history=History([1.0] * len(values), [[1.0]] * len(values), values=list(values)))


VALIDATED = measured(
    {"validation loss, t=0": 2.0, "validation accuracy, t=0": 0.5, "validation accuracy, t=0.5": 0.25},
    {},
    {"validation accuracy, t=0.5": 0.75, "sharpness": 3.0},
)


@pytest.mark.parametrize("quantity", ["accuracy", "validation accuracy"])
def test_what_was_measured_is_drawn_over_epochs_with_a_line_for_each_position(ax, quantity):
    plot.history(VALIDATED, quantity=quantity, ax=ax)
    at_0, at_half = ax.lines
    np.testing.assert_array_equal(at_0.get_xydata(), [(1, 50)])
    np.testing.assert_array_equal(at_half.get_xydata(), [(1, 25), (3, 75)])
    assert texts(ax.get_legend()) == ["t=0", "t=0.5"]
    assert ax.get_ylabel() == "validation accuracy (%)" and ax.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("quantity", "axis", "legend", "scale"),
    [
        ("validation accuracy, t=0.5", "validation accuracy, t=0.5 (%)", "t=0.5", "linear"),
        ("validation loss", "validation loss, t=0 (mean per example)", "t=0", "log"),
        ("sharpness", "sharpness", "sharpness", "linear"),
    ],
)
def test_one_value_by_epoch_is_named_on_the_axis(ax, quantity, axis, legend, scale):
    plot.history(VALIDATED, quantity=quantity, ax=ax)
    assert (ax.get_ylabel(), texts(ax.get_legend()), ax.get_yscale()) == (axis, [legend], scale)


def test_several_fits_have_a_colour_each_and_positions_their_dashes(ax):
    plot.history(VALIDATED, VALIDATED, labels=["one", "two"], quantity="accuracy", ax=ax)
    assert texts(ax.get_legend()) == ["one, t=0", "one, t=0.5", "two, t=0", "two, t=0.5"]
    colours, dashes = ([get(line) for line in ax.lines] for get in (Line2D.get_color, Line2D.get_linestyle))
    assert colours[0] == colours[1] != colours[2] and dashes[:2] == dashes[2:] and dashes[0] != dashes[1]


def test_a_validation_is_drawn(ax):
    train, test = data.load("digits")
    a, b = (models.mlp(64, (8,), 10, seed=seed) for seed in range(2))
    validation = callbacks.Validation(test, t=[0.5])
    fit = fit_curve(a, b, train, align=False, recipe=Recipe(epochs=2), callbacks=[validation])
    plot.history(fit, quantity="accuracy", ax=ax)
    expected = [100 * values["validation accuracy, t=0.5"] for values in validation.values]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)


def test_a_descent_without_positions_has_a_loss_and_no_range(ax):
    plot.history(History([2.0, 1.0], []), ax=ax)
    assert len(ax.lines) == 1 and not ax.collections
    with pytest.raises(ValueError, match="this fit has no losses by t: it descended on all positions at once"):
        plot.history_by_t(History([2.0, 1.0], []))


def test_a_spectrum_is_the_transform_written_out(ax):
    plot.spectrum(BUMP, ax=ax)
    count, loss = len(T), BUMP.loss.numpy()
    waves = [np.exp(-2j * np.pi * k * np.arange(count) / count) for k in (1, 2)]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [abs((loss - loss.mean()) @ wave) / count for wave in waves])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.8, 1.6])  # k cycles in five steps of 1/4
    assert ax.get_yscale() == "log" and ax.get_legend() is None


def test_a_wave_has_its_frequency_and_half_its_amplitude(ax):
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    for place, cycles in enumerate((3, 20)):
        frequency = cycles * 63 / 64
        wave = Profile(t, loss=5 + 0.5 * torch.cos(2 * torch.pi * frequency * t), accuracy=None, arc_length=None)
        plot.spectrum(wave, ax=ax)
        highest = ax.lines[place].get_ydata().argmax()
        np.testing.assert_allclose(ax.lines[place].get_xydata()[highest], (frequency, 0.25))
        assert np.sort(ax.lines[place].get_ydata())[-2] < 1e-12


def test_spectra_of_accuracies_are_in_percent_and_named(ax):
    plot.spectrum(BUMP, BUMP, labels=["one", "two"], quantity="accuracy", ax=ax)
    assert "accuracy\n(%)" in ax.get_ylabel() and texts(ax.get_legend()) == ["one", "two"]
    values = 100 * BUMP.accuracy.numpy()
    np.testing.assert_allclose(ax.lines[1].get_ydata(), np.abs(np.fft.rfft(values))[1:] / 5)


def test_a_flat_loss_has_a_spectrum_of_zeros(ax):
    plot.spectrum(FLAT, ax=ax)
    assert not ax.lines[0].get_ydata().any() and ax.get_yscale() == "linear"


def test_two_histories_share_one_entry_for_their_range(ax):
    fit = learned([2.0], [[1.0, 3.0]])
    plot.history(fit, fit.history, labels=["one", "two"], ax=ax)
    assert texts(ax.get_legend()) == ["one", "range over t", "two"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.profile(), "there is no profile to draw"),
        (lambda: plot.profile(BUMP, FLAT, labels=["one"]), r"must name each profile: 2 to draw, got labels=\['one'\]"),
        (lambda: plot.profile(BUMP, labels="a"), "must name each profile: 1 to draw, got labels='a'"),
        (
            lambda: plot.profile(FLAT, dataclasses.replace(BUMP, accuracy=None), quantity="accuracy"),
            "profile 1 has no quantity 'accuracy', only 'loss'",
        ),
        (
            lambda: plot.profile(BUMP, quantity="speed"),
            "profile 0 has no quantity 'speed', only 'loss', 'accuracy', 'error'",
        ),
        (lambda: plot.correlation(), "there is no correlation to draw"),
        (lambda: plot.correlation({}), "there is no correlation to draw"),
        (lambda: plot.correlation({"a": (0, 1)}, {"b": (0, 1)}), "different architectures"),
        (lambda: plot.profile(3), "profile 0 must be what Connection.evaluate returns, got 3"),
        (lambda: plot.profile(Profile), "profile 0 must be what Connection.evaluate returns, got <class"),
        (lambda: plot.profile(BUMP, labels=3), "must name each profile: 1 to draw, got labels=3"),
        (lambda: plot.profile(BUMP, quantity=[]), r"profile 0 has no quantity \[\], only 'loss'"),
        (lambda: plot.profile(BUMP, ax=[]), r"ax must be an Axes of matplotlib, got \[\]"),
        (lambda: plot.robust_profile(BUMP), "profile must be what Connection.robustness returns, got Profile"),
        (lambda: plot.correlation(3), "alignment 0 must be what modeconn.align returns, or its correlation, got 3"),
        (lambda: plot.correlation({"a": 3}), r"must hold \(before, after\) by group, two numbers, got {'a': 3}"),
        (lambda: plot.history(BUMP), "fit 0 must be what modeconn.fit_curve returns, or its history, got Profile"),
        (
            lambda: plot.history(learned([1.0], [[1.0]]), quantity="accuracy"),
            r"fit 0 has no 'accuracy' by epoch: nothing was measured but the training loss.*callbacks.Validation",
        ),
        (
            lambda: plot.history(VALIDATED, quantity="error"),
            "fit 0 has no 'error' by epoch, only 'loss', 'validation loss, t=0', 'validation accuracy, t=0'",
        ),
        (
            lambda: plot.history(VALIDATED, VALIDATED, quantity="accuracy"),
            "labels must name each fit: 2 to draw, got labels=None",
        ),
        (lambda: plot.spectrum(), "there is no profile to draw"),
        (lambda: plot.spectrum(BUMP, quantity="speed"), "profile 0 has no quantity 'speed', only 'loss'"),
        (
            lambda: plot.spectrum(dataclasses.replace(BUMP, t=T**2)),
            r"profile 0 was measured at t=\[0.0, 0.0625, 0.25, 0.5625, 1.0\]. Measure it with num_points=, without t=",
        ),
        (
            lambda: plot.spectrum(Profile(T[:2], loss=T[:2], accuracy=None, arc_length=None)),
            "at three evenly spaced positions or more, but profile 0 was measured at t=",
        ),
        (
            lambda: plot.spectrum(dataclasses.replace(BUMP, loss=T / 0)),
            "the 'loss' of profile 0 is NaN or infinite at some positions, so it has no spectrum",
        ),
        (lambda: plot.eigen_angles(3), "rotation must be a modeconn.Orthogonal, .*, got 3"),
        (lambda: plot.eigen_angles(types.SimpleNamespace(angles=dict)), "no group of this relabelling rotates"),
        (lambda: plot.comparison(3), "compared must be what modeconn.compare returns, got 3"),
        (lambda: plot.correlation({"a": (0, 1)}, labels=[]), r"must name each group: 1 to draw, got labels=\[\]"),
        (lambda: plot.history(types.SimpleNamespace(history=None)), "fit 0 has no history"),
        (lambda: plot.history(History([], [])), "fit 0 has no history"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_and_no_figure_is_opened(draw, message):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    with pytest.raises(ValueError, match=message):
        draw()
    assert pyplot.get_fignums() == before
