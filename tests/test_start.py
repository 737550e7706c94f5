"""What a curve's inner control points are at first."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import modeconn
from modeconn import PAM, Bezier, Connection, Line, PolyChain, Recipe, callbacks, fit_curve, models
from modeconn.network.recipe import constant
from modeconn.network.weights import WeightSpace
from tests.cases import CASE, CASES, batches, same_bits
from tests.matching.test_rotations import generic
from tests.refinement.test_turning import LOADER
from tests.symmetry.rotating import LanguageModel

SHORT = Recipe(epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), schedule=constant)
STILL = Recipe(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0), weight_decay=0.0)  # leaves points where they begin
CURVES = [Bezier(2), Bezier(3), PolyChain(3)]


def networks(name="mlp", count=2, dtype=torch.float32):
    return [CASE[name].make(seed, dtype) for seed in range(count)]


def same_weights(left, right):
    space = WeightSpace(left)
    return torch.equal(space.flatten(left), space.flatten(right))


def inner(connection):
    """The inner control points, as networks."""
    for point in connection.control_points[1:-1]:
        model = connection.model_at(0)
        connection.space.load(point, model)
        yield model


class Interrupt(callbacks.Callback):
    def after_epoch(self, event):
        raise KeyboardInterrupt


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_points_of_the_straight_line_are_where_a_curve_begins_without_a_start(curve, case):
    a, b = case.make(0, torch.float32), case.make(1, torch.float32)
    settings = {"align": False, "curve": curve, "seed": 3}
    line = fit_curve(a, b, batches(), recipe=STILL, **settings)
    plain, told = (fit_curve(a, b, batches(), recipe=SHORT, start=s, **settings) for s in (None, list(inner(line))))
    assert torch.equal(plain.control_points, told.control_points)
    assert torch.equal(
        plain.control_points, fit_curve(a, b, batches(), recipe=SHORT, start=line, **settings).control_points
    )


@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_inner_control_points_begin_with_the_networks_that_are_given(curve):
    a, b, *given = networks(count=2 + curve.num_control_points - 2)
    begun = fit_curve(a, b, batches(), align=False, curve=curve, start=given, recipe=STILL)
    assert all(map(same_weights, inner(begun), given))
    assert same_bits(begun.model_at(0), a) and same_bits(begun.model_at(1), b)


def test_one_network_may_stand_for_a_list_of_one():
    a, b, given = networks(count=3)
    (found,) = inner(fit_curve(a, b, batches(), align=False, start=given, recipe=STILL))
    assert same_weights(found, given)


def test_a_fit_goes_on_where_another_ended_also_after_saving_it(tmp_path):
    a, b = networks("batch_norm")
    first = fit_curve(a, b, batches(), recipe=SHORT)
    first.save(tmp_path / "c")
    for start in (first, Connection.load(tmp_path / "c", a)):
        begun = fit_curve(a, b, batches(), align=start.permutation, start=start, recipe=STILL)
        assert torch.equal(begun.control_points, first.control_points)


def test_a_start_may_have_another_memory_format_or_dtype():
    a, b, given = (
        network.to(memory_format=torch.contiguous_format) for network in networks("channels_last", 3, torch.float64)
    )
    start = fit_curve(a, b, batches(dtype=torch.float64), align=False, start=given, recipe=STILL)
    a, b, given = (network.float().to(memory_format=torch.channels_last) for network in (a, b, given))
    assert start.space.layout != WeightSpace(a).layout
    (found,) = inner(fit_curve(a, b, batches(), align=False, start=start, recipe=STILL))
    assert same_weights(found, given)


def test_frozen_parameters_stay_on_the_straight_line_whatever_the_start_says():
    a, b, given = networks("frozen", count=3)
    begun = fit_curve(a, b, batches(), align=False, start=given, recipe=STILL)
    frozen = ~begun.space.trainable
    middle, line = begun.control_points[1], begun.control_points[[0, 2]].mean(0)
    torch.testing.assert_close(middle[frozen], line[frozen])
    assert frozen.any() and torch.equal(middle[~frozen], begun.space.flatten(given)[~frozen])


@pytest.mark.parametrize("align", [False, True])
def test_pam_keeps_the_bend_of_the_start_beside_the_line_while_it_relabels(align):
    a, b, given = networks(count=3)
    told = fit_curve(a, b, batches(), align=align, refine=PAM(iterations=1), start=given, recipe=STILL)
    begun = fit_curve(a, b, batches(), align=align, start=given, recipe=STILL)
    bends = [one.control_points[1] - one.control_points[[0, 2]].mean(0) for one in (told, begun)]
    torch.testing.assert_close(*bends)
    assert torch.equal(begun.control_points[1], begun.space.flatten(given))
    assert not torch.equal(told.control_points[2], begun.control_points[2])  # a relabelling was found


def test_a_run_goes_on_from_its_checkpoint_with_its_start_and_with_no_other(tmp_path):
    a, b, given, other = networks(count=4)
    run = partial(fit_curve, a, b, batches(), align=False, recipe=SHORT, checkpoint=tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        run(start=given, callbacks=[Interrupt()])
    for start in (other, None):
        with pytest.raises(ValueError, match="is of another run: start is"):
            run(start=start)
    expected = fit_curve(a, b, batches(), align=False, recipe=SHORT, start=given)
    assert torch.equal(run(start=given).control_points, expected.control_points)


def test_where_gains_are_folded_and_weights_untied_the_start_is_the_same_function():
    build = lambda: LanguageModel(nn.LayerNorm, tied=True)  # noqa: E731
    a, b, given = (generic(build, seed).float() for seed in range(3))
    settings = {"recipe": STILL, "symmetries": "orthogonal", "untie": True, "align": modeconn.WeightMatching()}
    begun = fit_curve(a, b, LOADER, start=given, **settings)
    (found,) = inner(begun)
    assert WeightSpace(found).shapes != WeightSpace(given).shapes
    torch.testing.assert_close(found(LOADER[0][0]), given(LOADER[0][0]), rtol=1e-4, atol=1e-4)
    again = fit_curve(a, b, LOADER, start=found, **settings)
    torch.testing.assert_close(again.control_points, begun.control_points)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": models.mlp(4, (5,), 3)}, r"differ: parameter .* not in start network 1"),
        ({"curve": Bezier(3)}, r"Bezier\(degree=3, .*\) has 2 inner control points, and start= has 1\. Pass a network"),
        ({"curve": Line()}, r"Line\(\) has 0 inner control points, and start= has 1"),
        ({"start": []}, r"has 1 inner control point, and start= has 0"),
        ({"start": 3}, r"start must be a Connection, or a torch\.nn\.Module"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_read(settings, message):
    a, b, given = networks(count=3)

    class Unread:
        def __iter__(self):
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        fit_curve(a, b, Unread(), **{"start": given, **settings})


def test_a_connection_of_another_architecture_is_no_start():
    a, b = networks()
    other = Connection.straight_between(models.mlp(4, (5,), 3), models.mlp(4, (5,), 3))
    with pytest.raises(ValueError, match=r"start= is a connection between networks of another architecture"):
        fit_curve(a, b, batches(), start=other)


def test_without_data_there_is_nothing_to_start():
    a, b, given = networks(count=3)
    with pytest.raises(ValueError, match=r"start= is where a curve is learned from, and without loader="):
        fit_curve(a, b, start=given, example_input=batches()[0][0])
