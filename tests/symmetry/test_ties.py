"""Positions of the largest entries, where entries may be equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn import discover
from tests.symmetry.cases import Lambda
from tests.symmetry.oracle import largest_change


def two_layers(act: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(5, 8), "square": nn.Linear(8, 8), "into": nn.Linear(5, 8), "last": nn.Linear(8, 3)}
    model = Lambda(act, **layers)
    model.register_parameter("grid", nn.Parameter(torch.randn(4, 5)))
    model.register_parameter("table", nn.Parameter(torch.randn(32, 3)))
    return model


def marked(h: Tensor) -> Tensor:
    """Keep the six largest entries, by an indicator of their positions."""
    return h * torch.zeros_like(h).scatter(1, h.topk(6, -1).indices, 1.0)


def kept(h: Tensor, base: float = 0.0) -> Tensor:
    """Write the six largest entries to their positions."""
    found = h.topk(6, -1)
    return torch.full_like(h, base).scatter(1, found.indices, found.values)


def rectified_after(h: Tensor) -> Tensor:
    found = h.topk(6, -1)
    return torch.zeros_like(h).scatter(1, found.indices, found.values.relu())


def added(h: Tensor) -> Tensor:
    found = h.topk(6, -1)
    return h.scatter_add(1, found.indices, found.values)


def smallest_of(h: Tensor, other: Tensor) -> Tensor:
    return other.gather(1, h.argmin(1, keepdim=True))


FOUND = {
    "marked": (lambda m, x: m.last(marked(m.first(x))), 8),
    "marked after gelu": (lambda m, x: m.last(marked(F.gelu(m.first(x)))), 8),
    "marked after softmax": (lambda m, x: m.last(marked(m.first(x).softmax(-1))), 8),
    "zeros are marked": (lambda m, x: m.last(torch.cos(marked(m.first(x).relu() - 1))), 0),
    "zeros are kept": (lambda m, x: m.last(zero_kept(m.first(x).relu())), 8),
    "sixes are kept": (lambda m, x: m.last(zero_kept(F.relu6(m.first(x)))), 0),
    "zeros are written over ones": (lambda m, x: m.last(kept(m.first(x).relu(), 1.0)), 0),
    "zeros after": (lambda m, x: m.last(rectified_after(m.first(x))), 8),
    "zeros are added": (lambda m, x: m.last(added(m.first(x).relu())), 8),
    "the smallest itself": (lambda m, x: m.last(m.first(x)) * smallest_of(h := m.first(x).relu(), h), 8),
    "another's smallest": (lambda m, x: m.last(m.first(x)) * smallest_of(m.first(x).relu(), m.first(x)), 0),
    "another's smallest, of different": (
        lambda m, x: m.last(m.first(x)) * smallest_of(m.first(x), m.first(x).cos()),
        8,
    ),
}


def in_place(h: Tensor) -> Tensor:
    h.relu_()
    return h


def written_later(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)
    h[:, :4].relu_()
    return m.last(torch.cos(marked(h) - 1))


def looked_up(m: nn.Module, h: Tensor, keep: bool = False) -> Tensor:
    found = h.topk(6, -1)
    rows = F.embedding(found.indices, m.first.weight)
    weighted = rows * found.values.unsqueeze(-1)
    return m.last(h) + weighted.sum((1, 2)).unsqueeze(1) + (rows.sum((1, 2)).unsqueeze(1) if keep else 0)


FOUND |= {
    "zeros in place are marked": (lambda m, x: m.last(torch.cos(marked(in_place(m.first(x))) - 1)), 0),
    "some zeros in place": (written_later, 0),
    "zeros in place are kept": (lambda m, x: m.last(zero_kept(F.relu(m.first(x), inplace=True))), 8),
    "rows of different": (lambda m, x: looked_up(m, m.first(x), keep=True), 8),
    "rows of zeros, weighted": (lambda m, x: looked_up(m, m.first(x).relu()), 8),
    "rows of zeros": (lambda m, x: looked_up(m, m.first(x).relu(), keep=True), 0),
    "counted": (lambda m, x: m.last(F.one_hot(m.first(x).argmax(-1), 8).to(x)), 8),
    "a router without bias": (lambda m, x: m.last(marked(F.linear(m.first(x).relu(), m.square.weight)).cos()), 8),
    "a router of a stream": (
        lambda m, x: m.last(marked(F.linear(x @ m.into.weight.T + m.first(x).relu(), m.square.weight)).cos()),
        16,
    ),
    "the largest of all, by two axes": (
        lambda m, x: m.last(h := m.first(m.grid)).mean(0) * x.mean() + F.embedding(h.argmax(), m.table),
        4 + 5 + 8,  # rows and columns of the grid, and the units
    ),
    "repeated": (lambda m, x: m.last(marked(m.first(x)[:, :1].expand(-1, 8)).cos()), 0),
    "bags": (
        lambda m, x: (
            m.last(h := m.first(x).relu())
            + F.embedding_bag(h.topk(6)[1], m.last.weight.T.contiguous(), per_sample_weights=h.topk(6)[0], mode="sum")
        ),
        0,
    ),
}


def zero_kept(h: Tensor) -> Tensor:
    found = h.topk(6, -1)
    return torch.zeros_like(h).scatter(1, found.indices, found.values)


def test_ties_of_a_deep_network_are_found_in_one_pass() -> None:
    def deep(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)
        for _ in range(150):
            h = h + F.linear(h.relu(), m.square.weight)
        return m.last(marked(h).cos())

    model, x = two_layers(deep), torch.randn(6, 5)
    assert [group.shape for group in discover(model, x).groups] == [(8,)]


@pytest.mark.parametrize(("act", "units"), FOUND.values(), ids=FOUND.keys())
def test_found_positions_move_with_the_units_unless_equal_entries_are_told_apart(act, units: int) -> None:
    model, x = two_layers(act), torch.randn(6, 5)
    spec = discover(model, x)
    assert sum(group.shape[-1] for group in spec.groups) == units
    assert spec.verify(model, x) < 1e-12
    assert largest_change(spec, model, x) < 1e-12
