"""Pieces of views: the same pieces when they are cut before the view, and views that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from modeconn.symmetry.cuts import cut_before_views

aten = torch.ops.aten


def rewritten(function: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, bool]:
    """Return the traced graph of a function after pieces were cut before views, and whether any was."""
    traced = make_fx(function)(x)

    def known(node: Any) -> Tensor | None:
        if node.target is aten.lift_fresh_copy.default:
            node = node.args[0]
        return getattr(traced, node.target) if node.op == "get_attr" else None

    changed = cut_before_views(traced.graph, list(traced.graph.nodes), known, lambda index: None)
    traced.graph.lint()
    traced.recompile()
    return traced, changed


def widths_of_cuts(traced: Any) -> set[int]:
    """Return the sizes of the axes that slices cut which some other node reads."""
    return {n.args[0].meta["val"].shape[n.args[1]] for n in traced.graph.nodes if n.target is aten.slice.Tensor}


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[[Tensor], list[Tensor]], Tensor]:
    """Draw a view of one axis as several, an order of its axes, and pieces along one of them."""
    before, parts = (
        draw(st.lists(st.integers(1, 3), max_size=2)),
        draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)),
    )
    at = draw(st.integers(0, len(before)))
    shape = [*before[:at], *parts, *before[at:]]
    order = draw(st.permutations(range(len(shape))))
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[order[dim]]
    ways = draw(st.lists(st.sampled_from(["slice", "select", "positions", "split", "chunk"]), min_size=1, max_size=3))
    ends = [sorted(draw(st.tuples(st.integers(0, size - 1), st.integers(1, size)))) for _ in ways]
    reorders = draw(st.booleans())

    def function(x: Tensor) -> list[Tensor]:
        view = x.view(shape)
        axis = order[dim]
        if reorders:
            view, axis = view.permute(order), dim
        out: list[Tensor] = []
        for way, (start, stop) in zip(ways, ends, strict=True):
            stop = max(stop, start + 1)
            if way == "slice":
                out.append(view.narrow(axis, start, stop - start))
            elif way == "select":
                out.append(view.select(axis, start - size))
            elif way == "positions":
                given = [slice(None)] * axis + [torch.arange(start, stop).tolist()]
                out.append(view[tuple(given)])
            elif way == "split":
                out += [piece for piece in view.split([start, size - start], axis) if piece.numel()]
            else:
                out += view.chunk(2, axis)
        return out

    x = torch.rand([*before[:at], torch.Size(parts).numel(), *before[at:]])
    return function, x


@settings(max_examples=60, deadline=None)
@given(programs())
def test_pieces_are_the_same(drawn: tuple[Callable[[Tensor], list[Tensor]], Tensor]) -> None:
    function, x = drawn
    traced, _ = rewritten(function, x)
    for piece, twin in zip(traced(x), function(x), strict=True):
        assert torch.equal(piece, twin)


@pytest.mark.parametrize(
    "cut",
    [
        lambda v: [v[:, :2], v[:, 2], v[:, [3]]],
        lambda v: [v.transpose(1, 2)[:, :, :3], v.transpose(1, 2)[:, :, 3]],
        lambda v: list(v.split([1, 3], 1)),
        lambda v: list(v.chunk(2, 1)),
        lambda v: [v[:][:, 1:3]],
    ],
)
def test_pieces_are_cut_from_the_axis_that_is_viewed(cut: Callable[[Tensor], list[Tensor]]) -> None:
    traced, changed = rewritten(lambda x: cut(x.view(2, 4, 5)), torch.rand(2, 20))
    assert changed
    traced.graph.eliminate_dead_code()
    assert widths_of_cuts(traced) - {2} == {20}


@pytest.mark.parametrize(
    "cut",
    [
        lambda v: [v[:, :2], v],  # all of it is read too
        lambda v: [v[:, :2], v[:, :, :2]],  # along two dimensions
        lambda v: [v[:, 0], v[:, 3]],  # one by one
        lambda v: [v[:, :, :2], v[:, :, 2:]],  # the last part of the axis: pieces are of its inside
        lambda v: [v[:, ::2]],
        lambda v: [v[:1], v[1:]],  # an axis that was there before
    ],
)
def test_other_views_stay(cut: Callable[[Tensor], list[Tensor]]) -> None:
    _, changed = rewritten(lambda x: cut(x.view(2, 4, 5)), torch.rand(2, 20))
    assert not changed
