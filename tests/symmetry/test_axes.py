"""Laws of the axis algebra."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeconn.symmetry.axes import UNIT, Axis, Space, co_occurrences, expand


def axes(space: Space) -> st.SearchStrategy[Axis]:
    """Random axes of 24 positions: products and concatenations of free and fixed atoms."""
    products = st.permutations([2, 3, 4]).map(
        lambda sizes: space.product([space.free(sizes[0]), space.fixed(sizes[1], "test"), space.free(sizes[2])])
    )
    cuts = st.lists(st.integers(1, 23), max_size=3, unique=True).map(lambda cuts: [0, *sorted(cuts), 24])
    concatenations = cuts.map(lambda c: space.concatenate(space.free(stop - start) for start, stop in pairwise(c)))
    return st.one_of(products, concatenations, st.builds(lambda: space.free(24)))


def movement(space: Space, axis: Axis) -> list[int | str]:
    """Read a product as its free atoms and the sizes of what is fixed between them."""
    read: list[int | str] = []
    for atom in space.normal(axis)[0]:
        if space.is_free_atom(atom):
            read.append(f"atom {atom}")
        elif read and isinstance(read[-1], int):
            read[-1] *= space.atom_size(atom)
        else:
            read.append(space.atom_size(atom))
    return read


@given(st.data())
def test_unified_axes_read_the_same_unless_both_are_fixed(data: st.DataObject) -> None:
    space = Space()
    x, y = data.draw(axes(space)), data.draw(axes(space))
    space.unify(x, y)
    x, y = space.normal(x), space.normal(y)
    differing = [(s, t) for s, t in zip(x, y, strict=False) if s != t]
    assert space.size(x) == space.size(y) == 24
    assert all(space.is_fixed((s,)) and space.is_fixed((t,)) for s, t in differing)


@given(st.data(), st.sampled_from([[24], [2, 12], [4, 6], [6, 4], [2, 3, 4], [3, 8], [24, 1], [1, 24]]))
def test_splitting_and_multiplying_gives_the_axis_back(data: st.DataObject, sizes: list[int]) -> None:
    space = Space()
    axis = data.draw(axes(space))
    parts = space.split(axis, sizes)
    assert [space.size(part) for part in parts] == sizes
    if len(space.normal(axis)) == 1:
        assert movement(space, space.product(parts)) == movement(space, axis)


@given(st.data(), st.lists(st.integers(1, 23), max_size=3, unique=True))
def test_cutting_and_concatenating_gives_the_axis_back(data: st.DataObject, cuts: list[int]) -> None:
    space = Space()
    bounds = [0, *sorted(cuts), 24]
    axis = data.draw(axes(space))
    sizes = [stop - start for start, stop in pairwise(bounds)]
    pieces = space.cut(axis, sizes)
    assert [space.size(piece) for piece in pieces] == sizes
    if not any(space.is_fixed((segment,)) for segment in space.normal(axis)):
        assert space.concatenate(pieces) == space.normal(axis)


def test_a_view_that_does_not_fit_fixes_the_axis() -> None:
    space = Space()
    axis = space.product([space.free(6), space.free(4)])
    space.unify(axis, space.product([space.free(4), space.free(6)]))
    first, second = space.normal(axis), space.normal(space.split(axis, [8, 3])[0])
    assert space.is_fixed(first)
    assert space.is_fixed(second)


def test_axes_of_different_size_cannot_be_unified() -> None:
    space = Space()
    with pytest.raises(ValueError, match="axes of 2 and 3 positions cannot be one"):
        space.unify(space.free(2), space.free(3))


def test_fixing_one_of_two_unified_axes_fixes_the_other() -> None:
    space = Space()
    x, y = space.free(6), space.product([space.free(2), space.free(3)])
    space.unify(x, y)
    space.fix(y, "why not")
    assert space.why_fixed(x) == "why not"


def test_a_family_may_differ_by_member_only_where_every_tensor_says_which() -> None:
    for weight_says_which in (True, False):
        space = Space()
        over, family = space.fixed(3, "stacked"), space.free(5)
        members = [space.member(family, over, i) for i in range(3)]
        weight = (space.product([over, family]),) if weight_says_which else (family,)
        space.settle([(over, family), weight, *((m,) for m in members)])
        assert (len({space.normal(m) for m in members}) == 3) == weight_says_which


def test_a_split_of_a_family_reaches_its_members() -> None:
    space = Space()
    over, family = space.fixed(2, "stacked"), space.free(6)
    member = space.member(family, over, 1)
    space.split(family, [2, 3])
    tensors = [(space.product([over, family]),)]
    space.settle(tensors)
    (segment,) = space.normal(member)
    assert [space.atom_size(atom) for atom in segment] == [2, 3]


def test_an_atom_is_determined_by_its_own_product_and_by_whole_axes_elsewhere() -> None:
    heads, units, rows, a, b = 0, 1, 2, 3, 4
    tensor = (((heads, units),), ((rows,),), ((a,), (b,)))
    found = dict(co_occurrences(tensor))
    assert found == {
        heads: {units, rows},
        units: {heads, rows},
        rows: {heads, units},
        a: {heads, units, rows},
        b: {heads, units, rows},
    }
    assert dict(co_occurrences((((rows,),), ((rows,),), ((a,),))))[a] == set()
    assert dict(co_occurrences((((rows,),), ((units, rows),))))[units] == set()  # which of the rows?
    twice = ((heads, units),)
    assert all(determined == {heads} for atom, determined in co_occurrences((twice, twice)) if atom == units)


def test_expanding_a_tensor_names_the_member_at_each_index() -> None:
    over, family, first, second = 0, 1, 2, 3
    families = {family: (over, [((first,),), ((second,),)])}
    parts = list(expand((((over, family),),), families))
    assert [part[0][0][-1] for part in parts] == [first, second]
    assert [part[0][0][0].index for part in parts] == [0, 1]


def test_an_axis_of_one_position_has_no_atom() -> None:
    space = Space()
    assert space.free(1) == space.fixed(1, "test") == UNIT
    assert space.num_atoms == 0
