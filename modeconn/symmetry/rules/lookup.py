"""Reading and writing by number: embeddings, gather, scatter, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, PERMUTATION
from modeconn.symmetry.rules.elementwise import broadcast, total
from modeconn.symmetry.rules.grouping import sorted_numbers
from modeconn.symmetry.rules.operators import leaves, table
from modeconn.symmetry.rules.shapes import cat, piece, stepped
from modeconn.symmetry.rules.ties import is_safe_to_read, is_safe_to_write
from modeconn.symmetry.walk import Traced, Walk, traced_in


@leaves(LINEAR)
def embedding(walk: Walk, weight: Traced, indices: Traced, *settings: Any) -> list[Axis]:
    """Rows of a table by number."""
    _by_number(
        walk, weight.axes[0], indices, "looked up by number", is_safe_to_read(indices.node, weight.node, walk.node)
    )
    walk.lower(weight.axes[0], PERMUTATION, "looked up by number")
    walk.show(weight.axes[1:])
    return [*indices.axes, *weight.axes[1:]]


def embedding_bag(
    walk: Walk,
    weight: Traced,
    indices: Traced,
    offsets: Traced,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Traced | None = None,
    *settings: Any,
) -> list[list[Axis]]:
    """Rows of a table by number, summed over bags, averaged or compared; for maxima, their rows are returned too."""
    for tensor in traced_in([indices, offsets, per_sample_weights]):
        for axis in tensor.axes:
            walk.fix(axis, "counted off into bags")
    units = embedding(walk, weight, indices)[-1]
    axes = [[walk.fixed(n, "counted off into bags") for n in shape] for shape in walk.shapes]
    return [[bags[0], units] if len(bags) == 2 else bags for bags in axes]


@leaves(LINEAR)
def index_select(walk: Walk, input: Traced, dim: int, index: Traced) -> list[Axis]:
    """Positions of one axis by number."""
    parts = _in_parts(walk, input, dim, index)
    if parts is not None:
        return parts
    _by_number(walk, input.axes[dim], index, "looked up by number", is_safe_to_read(index.node, input.node, walk.node))
    walk.lower(input.axes[dim], PERMUTATION, "looked up by number")
    walk.show(input.without(dim))
    return input.replace({dim: index.axes[0] if index.axes else UNIT})


def _in_parts(walk: Walk, input: Traced, dim: int, index: Traced) -> list[Axis] | None:
    """Return what positions choose that are written in the model, if slices in a row would choose the same.

    These are one slice with a step, or a few ranges; a range of one unit leaves that one in place.
    """
    chosen = walk.values(index) if len(index.axes) == 1 else None
    if chosen is None or not chosen.numel():
        return None
    size = walk.size(input.axes[dim])
    positions = [position % size for position in chosen.tolist()]
    step = size // len(positions)
    if step > 1 and size % step == 0 and positions == list(range(positions[0] % step, size, step)):
        walk.rely_on(index, input.axes[dim])
        return stepped(walk, input, dim, positions[0], step)
    begins = [0, *(at for at in range(1, len(positions)) if positions[at] != positions[at - 1] + 1)]
    if len(begins) > _RANGES:
        return None
    walk.rely_on(index, input.axes[dim])
    ranges = [(positions[begin], positions[end - 1] + 1) for begin, end in pairwise([*begins, len(positions)])]
    return cat(walk, [Traced(tuple(piece(walk, input, dim, start, stop))) for start, stop in ranges], dim)


_RANGES = 8
"""How many ranges of an axis are told apart where positions choose; more of them leave its units in place."""


def gather(walk: Walk, input: Traced, dim: int, index: Traced, **kwargs: Any) -> list[Axis] | None:
    """Positions of one axis by a number for each entry."""
    if not input.axes or len(index.axes) != len(input.axes):
        return None
    dim %= len(input.axes)
    _by_number(walk, input.axes[dim], index, "looked up by number", is_safe_to_read(index.node, input.node))
    walk.show(input.without(dim))
    for d, (x, i) in enumerate(zip(input.axes, index.axes, strict=True)):
        if d == dim:
            continue
        if walk.size(x) == walk.size(i):
            walk.unify(x, i)
        else:
            walk.fix(x, "looked up by number")
            walk.fix(i, "looked up by number")
    return list(index.axes)


def _by_number(walk: Walk, axis: Axis, index: Traced, why: str, is_safe: bool) -> None:
    """Learn that an axis is read or written by number; positions that were found along one like it move with it.

    They do so if it does not matter which of equal entries was found.
    """
    if is_safe and index.points_into is not None and walk.size(index.points_into) == walk.size(axis):
        walk.unify(axis, index.points_into)
        return
    walk.fix(axis, why)
    if index.points_into is not None:
        walk.fix(index.points_into, why)


@leaves(LINEAR)
def index(walk: Walk, input: Traced, indices: Sequence[Traced | None]) -> list[Axis] | None:
    """Advanced indexing by integers, or by one mask."""
    if any(i is not None and walk.dtype(i) in (torch.bool, torch.uint8) for i in indices):
        return _masked(walk, input, indices)
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) == 1:
        parts = _in_parts(walk, input, used[0], indices[used[0]])
        if parts is not None:
            return parts
    rest = input.without(*used)
    if not _tell_rows(walk, input, used, indices):
        walk.show(rest)
    for dim in used:
        is_safe = len(used) == 1 and is_safe_to_read(indices[dim].node, input.node, walk.node)
        _by_number(walk, input.axes[dim], indices[dim], "looked up by number", is_safe)
    looked_up = [i for i in indices if i is not None]
    for axis in (*(input.axes[dim] for dim in used), *(axis for i in looked_up for axis in i.axes)):
        walk.lower(axis, PERMUTATION, "looked up by number")
    picked = broadcast(walk, looked_up, max(len(i.axes) for i in looked_up))
    together = used[-1] - used[0] + 1 == len(used)
    at = used[0] if together else 0
    return [*rest[:at], *picked, *rest[at:]]


def _tell_rows(walk: Walk, input: Traced, used: Sequence[int], indices: Sequence[Traced | None]) -> bool:
    """Record of which group each row is, if it is looked up by sorted numbers: the bias of the expert that has it."""
    given = indices[used[0]] if len(used) == 1 else None
    numbers = None if given is None else sorted_numbers(given.node)
    if given is None or numbers is None or walk.size(given.axes[0]) == walk.size(input.axes[used[0]]):
        return False
    walk.tell(given.axes[0], input.axes[used[0]], numbers)
    return True


def _masked(walk: Walk, input: Traced, indices: Sequence[Traced | None]) -> list[Axis] | None:
    """What a mask chooses comes along one new axis, as many as its values say."""
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if len(given) != 1:
        return None
    ((at, mask),) = given
    masked = range(at, at + len(mask.axes))
    for axis in (*mask.axes, *(input.axes[dim] for dim in masked)):
        walk.fix(axis, "chosen by a mask")
    rest = input.without(*masked)
    walk.show(rest)
    return [*rest[:at], walk.fixed(walk.shape[at], "chosen by a mask"), *rest[at:]]


def chosen(walk: Walk, *tensors: Any, **settings: Any) -> list[list[Axis]]:
    """Positions or values of some entries, in their order, as many as values say."""
    for tensor in traced_in((tensors, settings)):
        for axis in tensor.axes:
            walk.fix(axis, "chosen by values")
    return [[walk.fixed(size, "chosen by values") for size in shape] for shape in walk.shapes]


def one_hot(walk: Walk, input: Traced, num_classes: int = -1) -> list[Axis]:
    """Numbers as indicators of a new axis; found positions, of the axis along which they were found."""
    counted = walk.free(walk.shape[-1])
    is_told = num_classes == walk.shape[-1]  # else by the largest of the numbers
    _by_number(walk, counted, input, "counted by number", is_told and is_safe_to_read(input.node, None))
    return [*input.axes, counted]


def histogram(walk: Walk, input: Traced, *settings: Any) -> list[Axis]:
    """How often each value occurs, wherever it does, or how much it weighs."""
    for weights in traced_in(settings)[:1]:
        for x, y in zip(input.axes, weights.axes, strict=True):
            walk.unify(x, y)
    for axis in input.axes:
        walk.contract(input, axis)
    return [walk.fixed(walk.shape[0], "counted by number")]


def searchsorted(walk: Walk, sequence: Traced, input: Any, *, sorter: Any = None, **settings: Any) -> list[Axis] | None:
    """The place of each entry in a sorted sequence, one for all or one for each index of the other axes."""
    if sorter is not None:
        return None
    axes = list(input.axes) if isinstance(input, Traced) else []
    walk.fix(sequence.axes[-1], "ordered")
    if len(sequence.axes) > 1:
        for x, y in zip(sequence.axes[:-1], axes[:-1], strict=True):
            walk.unify(x, y)
    walk.show([*axes, sequence.axes[-1]])
    return axes


def bucketize(walk: Walk, input: Any, boundaries: Traced, **settings: Any) -> list[Axis] | None:
    """``searchsorted`` with the entries first."""
    return searchsorted(walk, boundaries, input)


def scatter_reduce(
    walk: Walk, input: Traced, dim: int, index: Traced, src: Any = None, reduce: str = "sum", **more: Any
) -> list[Axis] | None:
    """Entries to positions of one axis by a number for each, where they meet in any order: a sum, an extreme."""
    return _scattered(walk, input, dim, index, src, adds=reduce == "sum")


def _scattered(walk: Walk, input: Traced, dim: int, index: Traced, src: Any, adds: bool) -> list[Axis] | None:
    if not input.axes or len(index.axes) != len(input.axes):
        return None
    dim %= len(input.axes)
    is_safe = is_safe_to_write(index.node, input.node, getattr(src, "node", None), adds)
    _by_number(walk, input.axes[dim], index, "written to by number", is_safe)
    walk.show(input.without(dim))
    written = [index, src] if isinstance(src, Traced) else [index]
    for d, axis in enumerate(input.axes):
        axes = [t.axes[d] for t in written] + ([axis] if d != dim else [])
        for x, y in pairwise(axes):
            if walk.size(x) == walk.size(y):
                walk.unify(x, y)
            else:  # the part of the axis from its beginning
                walk.fix(x, "written to by number")
                walk.fix(y, "written to by number")
    return list(input.axes)


def scatter(walk: Walk, input: Traced, dim: int, index: Traced, *values: Any, **more: Any) -> list[Axis] | None:
    """Entries to positions of one axis by a number for each: the last one stays."""
    if index.axes:
        walk.fix(index.axes[dim], "written in order")
    return _scattered(walk, input, dim, index, values[0] if values else more.get("value"), adds=False)


@leaves(LINEAR)
def index_put(
    walk: Walk,
    input: Traced,
    indices: Sequence[Traced | None],
    values: Traced,
    accumulate: bool = False,
    unsafe: bool = False,
) -> list[Axis] | None:
    """What advanced indexing reads is written: summed in any order, or the last one stays."""
    given = [i for i in indices if i is not None]
    if any(walk.dtype(i) in (torch.bool, torch.uint8, None) for i in given):
        return _put_where(walk, input, indices, values) if len(given) == 1 else None
    for axis in () if accumulate else (axis for i in given for axis in i.axes):
        walk.fix(axis, "written in order")
    place = index(walk, input, indices) or []
    total(walk, [Traced(tuple(place)), values], len(place))
    return list(input.axes)


def _put_where(walk: Walk, input: Traced, indices: Sequence[Traced | None], values: Traced) -> list[Axis] | None:
    """One value for all places of a mask, or values that are counted off along it."""
    mask = next(i for i in indices if i is not None)
    behind = len(input.axes) - indices.index(mask) - len(mask.axes)
    first = max(len(values.axes) - behind, 0)
    before, after = values.axes[:first], values.axes[first:]
    if walk.dtype(mask) is None:
        return None
    if before[-1:] not in ((), (UNIT,)):
        at = indices.index(mask)
        for axis in (*mask.axes, *input.axes[at : at + len(mask.axes)], before[-1]):
            walk.fix(axis, "written in order")
        place = (*input.axes[:at], before[-1], *input.axes[at + len(mask.axes) :])
        total(walk, [Traced(place), values], len(place))
        return list(input.axes)
    for axis in mask.axes:
        walk.lower(axis, PERMUTATION, "chosen by a mask")
    where = Traced((*mask.axes, *[UNIT] * behind))
    what = Traced((*before[:-1], *[UNIT] * len(mask.axes), *after))
    broadcast(walk, [input, where], len(input.axes))
    return total(walk, [input, what], len(input.axes))


@leaves(LINEAR)
def index_add(walk: Walk, input: Traced, dim: int, index: Traced, source: Traced, **scale: Any) -> list[Axis] | None:
    """Slices along one axis added to its positions by number."""
    return _put_slices(walk, input, dim, index, source, accumulate=True)


def index_reduce(
    walk: Walk, input: Traced, dim: int, index: Traced, source: Traced, reduce: str, **settings: Any
) -> list[Axis] | None:
    """Slices along one axis multiplied, averaged or compared with its positions by number."""
    return _put_slices(walk, input, dim, index, source, accumulate=True)


def renormed(walk: Walk, weight: Traced, indices: Traced, max_norm: float, norm_type: float) -> list[Axis]:
    """Rows of a table by number, shortened to a largest norm."""
    walk.fix(weight.axes[0], "looked up by number")
    walk.contract(weight, weight.axes[1])
    return list(weight.axes)


def index_copy(walk: Walk, input: Traced, dim: int, index: Traced, source: Traced) -> list[Axis] | None:
    """Slices along one axis written to its positions by number."""
    return _put_slices(walk, input, dim, index, source, accumulate=False)


def _put_slices(
    walk: Walk, input: Traced, dim: int, index: Traced, source: Traced, accumulate: bool
) -> list[Axis] | None:
    if not input.axes or not index.axes:
        return None
    return index_put(walk, input, [None] * (dim % len(input.axes)) + [index], source, accumulate)


def index_fill(walk: Walk, input: Traced, dim: int, index: Traced, value: Any) -> list[Axis]:
    """One value at positions of one axis."""
    if input.axes:
        walk.fix(input.axes[dim], "written to by number")
    return list(input.axes)


def masked_scatter(walk: Walk, input: Traced, mask: Traced, source: Traced) -> list[Axis]:
    """Entries of a source, in order, to the places of a mask; whole rows where the mask repeats itself along them."""
    strides = mask.node.meta["val"].stride() if mask.node is not None else [1] * len(mask.axes)
    rows = 0
    for x, y, m, stride in zip(*(reversed(t.axes) for t in (input, source, mask)), reversed(strides), strict=False):
        if walk.size(x) != walk.size(y) or (m != UNIT and stride != 0):
            break
        walk.unify(x, y)
        rows += 1
    for tensor in (input, source, mask):
        for axis in tensor.axes[: len(tensor.axes) - rows]:
            walk.fix(axis, "written in order")
    walk.show(input.axes[len(input.axes) - rows :])
    return list(input.axes)


_READERS = {
    embedding: "indices",
    embedding_bag: "indices",
    index_select: "index",
    gather: "index",
    index: "indices",
    one_hot: "self",
}
for _rule, _name in {**_READERS, scatter: "index", scatter_reduce: "index"}.items():
    _rule.reads_positions = _name  # type: ignore[attr-defined]  # the rule itself says what becomes of what they count

RULES = table(
    {
        embedding: "embedding",
        embedding_bag: "embedding_bag _embedding_bag",
        index_select: "index_select",
        gather: "gather",
        index: "index _unsafe_index",
        chosen: "nonzero nonzero_numpy argwhere where.default masked_select _unique _unique2 unique_dim "
        "unique_consecutive",
        one_hot: "one_hot",
        histogram: "histc bincount",
        searchsorted: "searchsorted",
        bucketize: "bucketize",
        scatter: "scatter",
        scatter_reduce: "scatter_add scatter_reduce",
        index_put: "index_put _unsafe_index_put",
        index_add: "index_add",
        index_reduce: "index_reduce",
        renormed: "embedding_renorm embedding_renorm_",
        index_copy: "index_copy",
        index_fill: "index_fill",
        masked_scatter: "masked_scatter",
    }
)
