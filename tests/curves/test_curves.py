from __future__ import annotations

import pytest
import torch

from modeconn.curves import Bezier, Line, PolyChain
from tests.reference import de_casteljau, sampled_length, walk_chain

CURVES = [Line(), Bezier(1), Bezier(2), Bezier(5), PolyChain(1), PolyChain(2), PolyChain(4)]
POSITIONS = [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 1.0]
parametrize_curves = pytest.mark.parametrize("curve", CURVES, ids=str)


def control_points(curve, num_parameters=50, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(curve.num_control_points, num_parameters, generator=generator, dtype=dtype)


@parametrize_curves
def test_basis_weights_sum_to_one_and_derivatives_to_zero(curve):
    t = torch.linspace(0, 1, 101)
    assert curve.basis(t).shape == (101, curve.num_control_points)
    torch.testing.assert_close(curve.basis(t).sum(-1), torch.ones(101, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(curve.derivative(t).sum(-1), torch.zeros(101, dtype=torch.float64), rtol=0, atol=1e-12)


@parametrize_curves
def test_the_derivative_is_the_slope_of_the_basis(curve):
    t = torch.linspace(0.013, 0.987, 40, dtype=torch.float64)  # off the corners of a chain
    slope = (curve.basis(t + 1e-6) - curve.basis(t - 1e-6)) / 2e-6
    torch.testing.assert_close(curve.derivative(t), slope, rtol=0, atol=1e-7)


@parametrize_curves
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_ends_of_a_curve_are_its_outer_control_points_bit_for_bit(curve, dtype):
    points = control_points(curve, dtype=dtype)
    points[1:-1] = torch.inf  # an end must not even touch the others: 0 * inf would be NaN
    assert torch.equal(curve.point(points, 0), points[0])
    assert torch.equal(curve.point(points, 1.0), points[-1])


@parametrize_curves
def test_a_new_curve_is_the_straight_line_and_begins_and_ends_at_the_networks(curve):
    theta_a, theta_b = control_points(Line())
    points = curve.initial_control_points(theta_a, theta_b)
    assert torch.equal(points[0], theta_a) and torch.equal(points[-1], theta_b)
    for t in POSITIONS:
        torch.testing.assert_close(curve.point(points, t), (1 - t) * theta_a + t * theta_b)


@parametrize_curves
def test_weights_both_ends_share_keep_their_bits_on_a_new_curve(curve):
    theta = torch.randn(100, generator=torch.Generator().manual_seed(0))
    points = curve.initial_control_points(theta, theta.clone())
    assert all(torch.equal(point, theta) for point in points)
    assert all(torch.equal(curve.point(points, t), theta) for t in POSITIONS)


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("t", POSITIONS)
def test_a_bezier_curve_is_repeated_interpolation(degree, t):
    points = control_points(Bezier(degree))
    torch.testing.assert_close(Bezier(degree).point(points, t), de_casteljau(points, t))


@pytest.mark.parametrize("num_segments", [1, 2, 5])
@pytest.mark.parametrize("t", POSITIONS)
def test_a_chain_walks_its_segments(num_segments, t):
    points = control_points(PolyChain(num_segments))
    torch.testing.assert_close(PolyChain(num_segments).point(points, t), walk_chain(points, t))


@parametrize_curves
@pytest.mark.parametrize("t", [0.5, 1.0])  # the chords then meet at the corners
def test_arc_length_is_the_sum_of_many_short_chords(curve, t):
    points = control_points(curve)
    assert float(curve.arc_length(points, t)) == pytest.approx(sampled_length(curve, points, t), rel=1e-6)


@parametrize_curves
def test_arc_length_starts_at_zero_grows_and_ends_at_the_length(curve):
    points = control_points(curve)
    lengths = curve.arc_length(points, torch.linspace(0, 1, 33))
    assert lengths[0] == 0 and (lengths.diff() > 0).all()
    assert float(lengths[-1]) == pytest.approx(curve.length(points), rel=1e-10)


def test_the_length_of_a_straight_line_is_the_distance_of_its_ends():
    points = control_points(Line(), num_parameters=3_000_000, dtype=torch.float32)  # several chunks
    exact = (points[1].double() - points[0].double()).norm()
    assert Line().length(points) == pytest.approx(float(exact), rel=1e-6)


def test_the_length_between_equal_ends_is_zero():
    theta = torch.ones(7)
    assert Bezier(3).length(Bezier(3).initial_control_points(theta, theta)) == 0


def test_only_inner_control_points_are_trained_unless_the_ends_are_free():
    rows = list(range(4))
    assert rows[Bezier(3).trained] == [1, 2] and Bezier(3).num_trained == 2
    assert rows[PolyChain(3, free_ends=True).trained] == rows
    assert rows[Bezier(3, free_ends="a").trained] == [0, 1, 2] and rows[Bezier(3, free_ends="b").trained] == [1, 2, 3]
    assert Bezier(1, free_ends="b").num_trained == 1
    assert Line().num_trained == 0 and Bezier(1).num_trained == 0


@pytest.mark.parametrize(("t", "shown"), [(1.2, r"1\.2"), (-1e-9, r"-1e-09"), (float("nan"), "nan")])
def test_a_position_outside_the_curve_is_an_error(t, shown):
    with pytest.raises(ValueError, match=rf"t must lie in \[0, 1\], got t={shown}\."):
        Bezier(2).basis(t)
    with pytest.raises(ValueError, match=rf"got t={shown}\."):
        Line().point(control_points(Line()), t)


def test_a_degree_below_one_is_an_error():
    with pytest.raises(ValueError, match=r"degree must be at least 1, got degree=0\."):
        Bezier(0)
    with pytest.raises(ValueError, match=r"num_segments must be at least 1, got num_segments=0\."):
        PolyChain(0)
