"""Views: reshapes, permuted and repeated axes, pieces cut out and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch

from modeconn.symmetry.axes import UNIT, Axis
from modeconn.symmetry.kinds import LINEAR, ORTHOGONAL_ONES
from modeconn.symmetry.rules.elementwise import broadcast, reordered
from modeconn.symmetry.rules.operators import leaves, reads_shapes, table
from modeconn.symmetry.walk import Traced, Walk


@leaves(LINEAR)
@reads_shapes
def reshape(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Any view of the same entries in the same order: shortest runs of axes with equal products correspond."""
    source = [axis for axis in input.axes if axis != UNIT]
    sizes = [walk.size(axis) for axis in source]
    out: list[Axis] = []
    run: list[Axis] = []
    i = 0
    wanted: list[int] = []
    if 0 in sizes:
        return [walk.fixed(n, "empty") for n in walk.shape]
    for size in walk.shape:
        if size == 1 and not wanted:
            out.append(UNIT)
            continue
        wanted.append(size)
        while i < len(source) and prod(map(walk.size, run)) < prod(wanted):
            run.append(source[i])
            i += 1
        if prod(map(walk.size, run)) == prod(wanted):
            out += walk.split(walk.product(run), wanted) if len(run) != len(wanted) else _pairwise(walk, run, wanted)
            run, wanted = [], []
    return out


def _pairwise(walk: Walk, run: list[Axis], wanted: list[int]) -> list[Axis]:
    return run if [walk.size(axis) for axis in run] == wanted else walk.split(walk.product(run), wanted)


def view_as_type(walk: Walk, input: Traced, dtype: torch.dtype) -> list[Axis]:
    """The same bytes as numbers of another type: of another size, neighbours along the last axis are one number."""
    before, after = walk.size(input.axes[-1]) if input.axes else 1, walk.shape[-1] if walk.shape else 1
    why = f"its entries are read as {str(dtype).removeprefix('torch.')}"
    if before == after:
        return list(input.axes)
    if before < after:
        return input.replace({-1: walk.product([input.axes[-1], walk.fixed(after // before, why)])})
    last, part = walk.split(input.axes[-1], [after, before // after])
    walk.fix(part, why)
    return input.replace({-1: last})


def strided(
    walk: Walk, input: Traced, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> list[Axis] | None:
    """Another reading of the memory of a tensor, such as windows that overlap: axes that are read whole are kept."""
    given = None if input.node is None else input.node.meta["val"]
    sizes, steps = list(map(walk.size, input.axes)), [] if given is None else [_number(n) for n in given.stride()]
    start = 0 if offset is None or given is None else offset - given.storage_offset()
    places = sorted((step, n) for step, n in zip(steps, sizes, strict=False) if n > 1 and step is not None)
    is_dense = all(step == prod(n for _, n in places[:i]) for i, (step, _) in enumerate(places))
    if given is None or None in steps or not is_dense:
        return None
    read = [(n, step) for n, step in zip(size, stride, strict=True)]
    if start < 0 or start + sum((n - 1) * step for n, step in read) >= prod(sizes):
        return None
    out = [UNIT if n == 1 else walk.fixed(n, _REREAD) for n in size]
    for axis, n, step in zip(input.axes, sizes, steps, strict=True):
        if n == 1:
            continue
        dim = read.index((n, step)) if (n, step) in read else None
        others = [pair for d, pair in enumerate(read) if d != dim and pair[0] > 1]
        below = start % step + sum((m - 1) * s for m, s in others if s < step)
        is_whole = below < step and not any(s % (n * step) for _, s in others if s >= step) and not start // step % n
        if dim is not None and is_whole:
            out[dim] = axis
        else:
            walk.fix(axis, _REREAD)
    return out


_REREAD = "its memory is read in another way"


def _number(size: Any) -> int | None:
    return size if isinstance(size, int) else size.node.hint


@leaves(LINEAR)
def permute(walk: Walk, input: Traced, dims: Sequence[int]) -> list[Axis]:
    """Reorder the axes."""
    return [input.axes[dim] for dim in dims]


@leaves(LINEAR)
def transpose(walk: Walk, input: Traced, dim0: int = -2, dim1: int = -1) -> list[Axis]:
    """Exchange two axes (``t`` and ``mT`` the last two)."""
    if len(input.axes) < 2:
        return list(input.axes)
    return input.replace({dim0: input.axes[dim1], dim1: input.axes[dim0]})


@leaves(LINEAR)
def reverse(walk: Walk, input: Traced) -> list[Axis]:
    """All axes in the reverse order (``tensor.T``)."""
    return list(input.axes[::-1])


@leaves(LINEAR)
def movedim(walk: Walk, input: Traced, source: Any, destination: Any) -> list[Axis]:
    """Move axes to other places."""
    # Raises unless the arguments are valid.
    order = list(torch.empty([1] * len(input.axes)).movedim(source, destination).shape)
    rank = len(order)
    source = [source] if isinstance(source, int) else source
    destination = [destination] if isinstance(destination, int) else destination
    places = {d % rank: s % rank for s, d in zip(source, destination, strict=True)}
    others = iter([d for d in range(rank) if d not in places.values()])
    return [input.axes[places[d] if d in places else next(others)] for d in range(rank)]


@leaves(LINEAR)
@reads_shapes
def expand(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[Axis]:
    """Repeated entries are equal, hence interchangeable."""
    offset = len(walk.shape) - len(input.axes)
    return [
        _alike(walk, size) if dim < offset or input.axes[dim - offset] == UNIT else input.axes[dim - offset]
        for dim, size in enumerate(walk.shape)
    ]


def _alike(walk: Walk, count: int) -> Axis:
    """Return the axis of some copies of one entry."""
    axis = walk.free(count)
    walk.lower(axis, ORTHOGONAL_ONES, "its units are copies of one")
    return axis


@leaves(LINEAR)
@reads_shapes
def repeat(walk: Walk, input: Traced, repeats: Sequence[int]) -> list[Axis]:
    """Tiles: copies x positions."""
    offset = len(repeats) - len(input.axes)
    axes = [UNIT] * offset + list(input.axes)
    counts = [n // walk.size(axis) if n else 0 for n, axis in zip(walk.shape, axes, strict=True)]
    return [walk.product([_alike(walk, count), axis]) for count, axis in zip(counts, axes, strict=True)]


@leaves(LINEAR)
def repeat_interleave(
    walk: Walk, input: Traced, repeats: Any = None, dim: int | None = None, **kwargs: Any
) -> list[Axis] | None:
    """Each position several times in a row: positions x copies; a number of times of its own, looked up."""
    if not isinstance(repeats, int):
        return None if dim is None else reordered(walk, input, [dim], "looked up by number")
    if dim is None:
        return [walk.product([walk.product(input.axes), _alike(walk, repeats)])]
    return input.replace({dim: walk.product([input.axes[dim], _alike(walk, repeats)])})


@leaves(LINEAR)
def cat(walk: Walk, tensors: Sequence[Traced], dim: int = 0) -> list[Axis]:
    """One behind the other; tensors of one position each are a stack."""
    tensors = [t for t in tensors if len(t.axes) == len(walk.shape)]  # torch skips empty one-dimensional tensors
    dim %= len(walk.shape)
    if len(tensors) > 1 and all(t.axes[dim] == UNIT for t in tensors):
        return stack(walk, [Traced(tuple(t.without(dim)), t.node) for t in tensors], dim)
    others = [Traced(tuple(t.replace({dim: UNIT}))) for t in tensors]
    axes = broadcast(walk, others, len(walk.shape))
    axes[dim] = walk.concatenate(t.axes[dim] for t in tensors)
    return axes


@leaves(LINEAR)
def stack(walk: Walk, tensors: Sequence[Traced], dim: int = 0) -> list[Axis]:
    """A new fixed axis; along it, every other axis may be relabelled differently."""
    over = walk.fixed(len(tensors), "stacked")
    axes = [walk.family(over, [t.axes[d] for t in tensors]) for d in range(len(tensors[0].axes))]
    dim %= len(axes) + 1
    return [*axes[:dim], over, *axes[dim:]]


@leaves(LINEAR)
@reads_shapes
def split(walk: Walk, input: Traced, *args: Any, **kwargs: Any) -> list[list[Axis]]:
    """``split``, ``chunk``, ``tensor_split``: consecutive pieces of one axis."""
    dim = walk.arguments.get("dim", 0) % len(input.axes)
    sizes = [shape[dim] for shape in walk.shapes]
    if sum(sizes) != walk.size(input.axes[dim]):  # values say how many each piece has
        walk.fix(input.axes[dim], "sliced")
        walk.show(input.without(dim))
        return [input.replace({dim: walk.fixed(size, "sliced")}) for size in sizes]
    return [piece(walk, input, dim, start, stop) for start, stop in _bounds(sizes)]


def _bounds(sizes: Iterable[int]) -> Iterable[tuple[int, int]]:
    return pairwise(accumulate(sizes, initial=0))


def piece(walk: Walk, input: Traced, dim: int, start: int, stop: int) -> list[Axis]:
    """Return the axes of a range of one of them."""
    axis, size = input.axes[dim], walk.size(input.axes[dim])
    if (start, stop) == (0, size):
        return list(input.axes)
    if stop - start == 1 and not _cuttable(walk, input, dim):
        return [UNIT if d == dim else walk.member(a, axis, start) for d, a in enumerate(input.axes)]
    if walk.is_fixed(axis):
        walk.show(input.without(dim))
        return input.replace({dim: walk.fixed(stop - start, "sliced")})
    pieces = walk.cut(axis, [start, stop - start, size - stop])
    return input.replace({dim: pieces[1]})


def _cuttable(walk: Walk, input: Traced, dim: int) -> bool:
    """Whether one index is best taken by pinning that one position: nothing else could move differently there."""
    others_fixed = all(walk.is_fixed(axis) for axis in input.without(dim))
    return others_fixed and not walk.is_fixed(input.axes[dim])


@leaves(LINEAR)
def slice_(
    walk: Walk, input: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> list[Axis]:
    """A range of one axis; with a step, one member of each block."""
    dim %= len(input.axes)
    size = walk.size(input.axes[dim])
    first, stop, _ = slice(start, end, step).indices(size)
    if step == 1:
        return piece(walk, input, dim, first, max(first, stop))
    if size % step == 0 and first < step and walk.shape[dim] == size // step:
        return stepped(walk, input, dim, first, step)
    return reordered(walk, input, [dim], "sliced")


def stepped(walk: Walk, input: Traced, dim: int, first: int, step: int) -> list[Axis]:
    """Return the axes of every ``step``-th position of one of them: a member of each block of ``step``."""
    blocks, offset = walk.split(input.axes[dim], (walk.size(input.axes[dim]) // step, step))
    return input.replace({dim: walk.member(blocks, offset, first)})


@leaves(LINEAR)
def select(walk: Walk, input: Traced, dim: int, index: int) -> list[Axis]:
    """One index of an axis, which becomes fixed."""
    dim, axis = dim % len(input.axes), input.axes[dim]
    index %= walk.size(axis)
    if _cuttable(walk, input, dim):
        walk.cut(axis, [index, 1, walk.size(axis) - index - 1])
        return input.without(dim)
    return [walk.member(a, axis, index) for d, a in enumerate(input.axes) if d != dim]


@leaves(LINEAR)
def select_scatter(walk: Walk, input: Traced, src: Traced, dim: int, index: int) -> list[Axis]:
    """One index of an axis written."""
    return _written(walk, input, src, select(walk, input, dim, index))


@leaves(LINEAR)
def slice_scatter(
    walk: Walk, input: Traced, src: Traced, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> list[Axis] | None:
    """A range of one axis written."""
    first, stop, _ = slice(start, end, step).indices(walk.size(input.axes[dim]))
    return _written(walk, input, src, piece(walk, input, dim, first, stop)) if step == 1 else None


def _written(walk: Walk, input: Traced, src: Traced, place: Sequence[Axis]) -> list[Axis]:
    for x, y in zip(place, src.axes, strict=True):
        walk.unify(x, y)
    return list(input.axes)


@leaves(LINEAR)
def unbind(walk: Walk, input: Traced, dim: int = 0) -> list[list[Axis]]:
    """Every index of an axis."""
    return [select(walk, input, dim, index) for index in range(len(walk.shapes))]


def glu(walk: Walk, input: Traced, dim: int = -1) -> list[Axis]:
    """The first half of an axis gated by the second."""
    half = walk.size(input.axes[dim]) // 2
    values, gates = walk.cut(input.axes[dim], [half, half])
    walk.unify(values, gates)
    return input.replace({dim: values})


RULES = table(
    {
        reshape: "view reshape flatten unflatten _unsafe_view _reshape_alias view_as reshape_as squeeze unsqueeze "
        "view_copy atleast_1d ravel",
        view_as_type: "view.dtype",
        strided: "as_strided",
        permute: "permute",
        transpose: "transpose t mT swapaxes swapdims transpose_copy",
        reverse: "numpy_T",
        movedim: "movedim moveaxis",
        expand: "expand expand_as broadcast_to",
        repeat: "repeat",
        repeat_interleave: "repeat_interleave",
        cat: "cat concat concatenate",
        stack: "stack",
        split: "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk",
        slice_: "slice",
        select: "select",
        select_scatter: "select_scatter",
        slice_scatter: "slice_scatter",
        unbind: "unbind",
        glu: "glu",
    }
)
