"""Units that are read by the positions that a buffer holds, as pruned networks keep them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modeconn
from modeconn import PermutationSpec, WeightMatching


class Pruned(nn.Module):
    """A perceptron of which a second layer reads a few hidden units by number: of a buffer, or written in the model."""

    def __init__(self, positions: list[int], where: str = "buffer", width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.side = nn.Linear(4, width), nn.Linear(width, 3), nn.Linear(len(positions), 3)
        self.written = positions if where == "written" else None
        if where == "attribute":
            self.picked = torch.tensor(positions)
        elif self.written is None:
            self.register_buffer("picked", torch.tensor(positions), persistent=where == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return self.head(h) + self.side(h[:, self.written or self.picked])


class Cut(nn.Module):
    """Heads cut out of a view by positions: one query of two heads, and one key."""

    def __init__(self, where: str, queries: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(5, 9), nn.Linear(6, 2)
        self.register_buffer("queries", torch.tensor(queries), persistent=where == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).view(-1, 3, 3)
        return self.out((heads[:, self.queries] * heads[:, [2]].sum(-1, keepdim=True)).flatten(1))


X = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
EVEN, ODD = [0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]


def groups(spec: PermutationSpec) -> list[tuple]:
    """Return what moves, and where."""
    return [(group.shape, group.places) for group in spec.groups]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(-12, 11), min_size=1, max_size=8, unique_by=lambda at: at % 12))
def test_positions_of_a_buffer_are_those_written_in_the_model(positions):
    kept, written = Pruned(positions), Pruned(positions, "written")
    spec = modeconn.discover(kept, X)
    assert (
        groups(spec)
        == groups(modeconn.discover(written, X))
        == groups(modeconn.discover(Pruned(positions, "unsaved"), X))
    )
    assert spec.verify(kept, X) < 1e-9
    torch.testing.assert_close(spec.random(torch.Generator().manual_seed(0)).apply(kept)(X), kept(X))
    assert spec.positions == ({"picked": tuple(positions)} if groups(spec) else spec.positions)


def test_a_planted_permutation_is_found():
    model = Pruned(EVEN)
    spec = modeconn.discover(model, X)
    assert [group.shape for group in spec.groups] == [(6,), (6,)]
    planted = spec.random(torch.Generator().manual_seed(1))
    assert modeconn.align(model, planted.apply(model), method=WeightMatching(), spec=spec).permutation == (
        planted.inverse()
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda spec, other: spec.random().apply(other),
        lambda spec, other: spec.verify(other, X),
        lambda spec, other: modeconn.align(other, other, method=WeightMatching(), spec=spec),
        lambda spec, other: PermutationSpec.from_json(spec.to_json()).random().apply(other),
    ],
    ids=["apply", "verify", "align", "apply from a file"],
)
def test_a_network_that_reads_others_is_refused(call):
    for where in ("buffer", "unsaved", "attribute"):
        spec = modeconn.discover(Pruned(EVEN, where), X)
        with pytest.raises(ValueError, match=r"'picked', by which units are read, holds other .* freeze=\['picked'\]"):
            call(spec, Pruned(ODD, where))


def test_units_stay_where_the_buffer_is_frozen_and_both_networks_are_then_of_one_spec():
    spec = modeconn.discover(Pruned(EVEN), X, freeze=["picked"])
    assert not spec.groups and not spec.positions
    aligned = modeconn.align(Pruned(EVEN), Pruned(ODD), method=WeightMatching(), spec=spec)
    torch.testing.assert_close(aligned.model_b(X), Pruned(ODD)(X))


def test_a_file_holds_positions_in_the_newer_format_and_without_them_the_older():
    for model, number in ((Pruned(EVEN), 1), (Pruned(EVEN, "written"), 0)):
        spec = modeconn.discover(model, X)
        assert f'"format": {modeconn.symmetry.spec.FORMAT + number}' in spec.to_json()
        again = PermutationSpec.from_json(spec.to_json())
        assert again == spec and again.positions == spec.positions and again.verify(model, X) < 1e-9


def test_a_cut_by_a_buffer_is_one_by_a_constant_and_is_remembered():
    x = torch.rand(4, 5)
    kept, unsaved = (modeconn.discover(Cut(where), x) for where in ("buffer", ""))
    assert groups(kept) == groups(unsaved) and kept.positions == unsaved.positions == {"queries": (0, 1)}
    assert kept.verify(Cut("buffer"), x) < 1e-9
    with pytest.raises(ValueError, match="'queries', by which units are read"):
        kept.random().apply(Cut("buffer", (1, 0)))


def test_buffers_that_decide_nothing_may_differ():
    """An embedding of positions by number: nothing that moves is told apart by them."""

    class Positions(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.table, self.stem, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("ids", torch.arange(first, first + 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x + self.table(self.ids)).relu())

    x = torch.rand(2, 3, 4)
    spec = modeconn.discover(Positions(0), x)
    assert not spec.positions
    other = Positions(5)
    torch.testing.assert_close(spec.random().apply(other)(x), other(x))


class Sliced(nn.Module):
    """Hidden units from a number on that a buffer holds, which only a recorded run can follow."""

    def __init__(self, first: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.side = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(3, 3)
        self.register_buffer("first", torch.tensor(first))

    def forward(self, x: Tensor) -> Tensor:
        h, first = self.stem(x).relu(), int(self.first)
        return self.head(h) + self.side(h[:, first : first + 3])


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_an_attribute_is_known_by_its_name_in_a_recorded_run_too():
    class Recorded(Pruned):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if float(x.sum()) > -1 else 1)

    spec = modeconn.discover(Recorded(EVEN, "attribute"), X)
    assert spec.one_path and spec.positions == {"picked": tuple(EVEN)}
    with pytest.raises(ValueError, match="'picked', by which units are read"):
        spec.random().apply(Recorded(ODD, "attribute"))


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_a_number_that_a_recorded_run_reads_of_a_buffer_is_remembered():
    spec = modeconn.discover(Sliced(1), X)
    assert spec.positions == {"first": (1,)} and spec.verify(Sliced(1), X) < 1e-9
    with pytest.raises(ValueError, match="'first', by which units are read"):
        modeconn.align(Sliced(1), Sliced(2), method=WeightMatching(), example_input=X)
    assert not modeconn.discover(Sliced(1), X, freeze=["first"]).positions


class Counting(nn.Module):
    """A layer that counts its calls, and reads the number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(self.stem(x).relu() if int(self.calls) else x)


@pytest.mark.filterwarnings("ignore:torch.export cannot follow")
def test_counters_may_differ():
    spec, other = modeconn.discover(Counting(), X), Counting()
    other.calls += 5
    assert [group.shape for group in spec.groups] == [(6,)] and not spec.positions
    torch.testing.assert_close(spec.random().apply(other.eval())(X), other(X))


@pytest.mark.parametrize("where", ["buffer", "unsaved", "attribute"])
def test_a_tensor_that_is_not_saved_counts_too_and_is_frozen_too(where):
    assert modeconn.discover(Pruned(EVEN, where), X).positions == {"picked": tuple(EVEN)}
    assert not modeconn.discover(Pruned(EVEN, where), X, freeze=["picked"]).groups


def test_positions_along_what_stays_may_differ():
    """Tokens in another order: no unit is told apart by it."""

    class Reordered(nn.Module):
        def __init__(self, order: list[int]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("order", torch.tensor(order))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).relu()[:, self.order].cumsum(1))

    x, other = torch.rand(2, 3, 4), Reordered([1, 2, 0])
    spec = modeconn.discover(Reordered([0, 2, 1]), x)
    assert [group.shape for group in spec.groups] == [(6,)] and not spec.positions
    torch.testing.assert_close(spec.random().apply(other)(x), other(x))


def test_a_place_that_a_number_says_is_no_operator_without_a_rule():
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("place", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            return self.head(h) + h[:, self.place][:, None]

    report = modeconn.discover(Chosen(), X).report()
    assert "has no rule" not in repr(report) and "values say" in repr(report)


def test_a_buffer_of_two_names_is_frozen_by_either_and_long_chains_are_followed_once():
    model = Pruned(EVEN)
    model.register_buffer("again", model.picked)
    for name in ("picked", "again"):
        assert not modeconn.discover(model, X, freeze=[name]).groups

    class Chain(Pruned):
        def forward(self, x: Tensor) -> Tensor:
            picked = self.picked
            for _ in range(60):
                picked = torch.maximum(picked, picked - 1)
            return self.side(self.stem(x).relu()[:, picked])

    assert modeconn.discover(Chain(EVEN), X).positions == {"picked": tuple(EVEN)}
