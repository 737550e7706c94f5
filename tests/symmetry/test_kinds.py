"""Laws of the lattice of kinds, and of atoms that carry them, also with kinds that the package does not have yet."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modeconn import PermutationSpec, discover
from modeconn.symmetry.axes import Space
from modeconn.symmetry.kinds import FIXED, KINDS, PERMUTATION, Kind

ORTHOGONAL = Kind("orthogonal", frozenset({PERMUTATION}))
DIAGONAL = Kind("diagonal", frozenset({PERMUTATION}))
LINEAR = Kind("linear", frozenset({ORTHOGONAL, DIAGONAL}))
LATTICE = (FIXED, PERMUTATION, ORTHOGONAL, DIAGONAL, LINEAR)


@pytest.mark.parametrize("kinds", [tuple(KINDS.values()), LATTICE], ids=["ours", "to come"])
def test_meeting_is_that_of_a_lattice(kinds):
    for x, y, z in product(kinds, repeat=3):
        assert x.meet(x) is x and x.meet(y) is y.meet(x) and x.meet(y).meet(z) is x.meet(y.meet(z))
        assert x.meet(FIXED) is FIXED and x.meet(y) in {x, *x.below} & {y, *y.below}
    assert ORTHOGONAL.meet(DIAGONAL) is PERMUTATION


def test_two_kinds_without_a_largest_common_part_are_refused():
    one, two = Kind("one", frozenset({ORTHOGONAL, DIAGONAL})), Kind("two", frozenset({ORTHOGONAL, DIAGONAL}))
    with pytest.raises(ValueError, match="one and two have no largest kind below both"):
        one.meet(two)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(LATTICE)), max_size=6), st.data())
def test_axes_that_act_alike_have_the_meet_of_all_that_lowered_them(lowered, data):
    space = Space(top=LINEAR)
    axes = [space.free(6) for _ in range(4)]
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4))
    steps = [("lower", one) for one in lowered] + [("unify", pair) for pair in pairs]
    classes = [{i} for i in range(4)]
    for what, (first, second) in data.draw(st.permutations(steps)):
        if what == "lower":
            space.lower(axes[first], second, "test")
        else:
            space.unify(axes[first], axes[second])
            both = classes[first] | classes[second]
            for i in both:
                classes[i] = both
    for i, axis in enumerate(axes):
        expected = LINEAR
        for j, kind in lowered:
            expected = expected.meet(kind) if j in classes[i] else expected
        (atom,) = space.normal(axis)[0]
        assert space.atom_kind(atom) is expected
        assert space.is_fixed(axis) == (expected is FIXED)


def test_parts_inherit_what_the_whole_was_lowered_to():
    space = Space(top=LINEAR)
    split, cut, member = (space.free(6) for _ in range(3))
    for axis in (split, cut, member):
        space.lower(axis, ORTHOGONAL, "test")
    parts = [*space.split(split, (2, 3)), *space.cut(cut, (2, 4)), space.member(member, space.free(2), 1)]
    assert [space.atom_kind(part[0][0]) for part in parts] == [ORTHOGONAL] * 5
    space.lower(parts[0], PERMUTATION, "test")
    assert space.atom_kind(parts[0][0][0]) is PERMUTATION and space.atom_kind(parts[1][0][0]) is ORTHOGONAL


def test_lowering_never_raises_and_keeps_the_reason_that_led_there():
    space = Space(top=LINEAR)
    axis = space.free(5)
    space.fix(axis, "first")
    space.lower(axis, ORTHOGONAL, "later")
    space.fix(axis, "last")
    assert space.is_fixed(axis) and space.why_fixed(axis) == "first"


def test_groups_say_their_kind_and_files_keep_it(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    spec = discover(model, torch.zeros(2, 4))
    assert [group.kind for group in spec.groups] == [PERMUTATION]
    assert spec.groups[0].log10_size == pytest.approx(4.6055, abs=1e-4)  # 8! = 40320
    monkeypatch.setitem(KINDS, "orthogonal", ORTHOGONAL)
    (atom,) = spec.structure.kinds
    turned = replace(spec, structure=replace(spec.structure, kinds={atom: ORTHOGONAL}))
    read = PermutationSpec.from_json(turned.to_json())
    assert [group.kind for group in read.groups] == [ORTHOGONAL] and read == turned != spec


def test_copies_of_a_kind_are_the_kind():
    assert copy.deepcopy(FIXED) is FIXED and pickle.loads(pickle.dumps(PERMUTATION)) is PERMUTATION
    spec = PermutationSpec.from_json(discover(nn.Linear(3, 2), torch.zeros(2, 3)).to_json())
    assert pickle.loads(pickle.dumps(spec.identity())) == copy.deepcopy(spec.identity())
