"""Pieces that are cut out of a view: cut before the view instead, so that each piece has units of its own.

Query, key and value of multi-query attention often come from one layer, ``x.view(..., heads + 2, size)``, and are cut
along ``heads + 2``. Read in that order, one axis of ``size`` units belongs to all three. The same pieces cut from the
axis before it is viewed are three axes, of which each may be relabelled on its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.fx import Node

aten = torch.ops.aten
_VIEW = aten.view.default
_ORDERS = (
    aten.transpose.int,
    aten.permute.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
)
_VIEWS = (_VIEW, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)
_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


@dataclass(frozen=True)
class _Cut:
    """A piece of a view.

    Args:
        node: What makes it.
        dim: The dimension of the view.
        start: The first position.
        stop: The position behind the last one.
        drops: Where the node drops the dimension, its place there.
        path: What reorders the dimensions of the view before they are cut.
    """

    node: Node
    dim: int
    start: int
    stop: int
    drops: int | None = None
    path: tuple[Node, ...] = ()


Known = Callable[["Node"], Tensor | None]
"""Returns the entries of a tensor that no weight and no input decides, None for all others."""


def cut_before_views(graph: Any, live: Sequence[Node], known: Known, rely_on: Callable[[Node], None]) -> bool:
    """Cut pieces before the views from which a graph cuts them, and return whether there were any.

    Views stay as they are if anything but a cut along one dimension reads them, if that dimension is no part of a
    larger one before, or if all pieces are of one position, which rules tell apart by themselves.

    Args:
        graph: What an export or a recording made; it is changed.
        live: Its nodes that count; what else reads a view is left as it is.
        known: Returns the entries of tensors that are known.
        rely_on: Called with each tensor whose entries decided what was cut.
    """
    changed, counted = False, set(live)
    for view in [node for node in live if node.target in _VIEWS]:
        cuts = _cuts_of(view, counted, known)
        if cuts is None or len({cut.dim for cut in cuts}) != 1:
            continue
        size = view.meta["val"].shape[cuts[0].dim]
        end = _end_of_run(view.args[0].meta["val"].shape, view.meta["val"].shape, cuts[0].dim)
        if end is None or not any(1 < cut.stop - cut.start < size for cut in cuts):
            continue
        if _rewrite(graph, view, cuts, end):
            changed = True
            for index in [i for cut in cuts if cut.node.target is aten.index.Tensor for i in cut.node.args[1]]:
                if index is not None:
                    rely_on(index)
    return changed


def _cuts_of(view: Node, live: Collection[Node], known: Known) -> list[_Cut] | None:
    """Return the pieces of a view, None if something else reads it."""
    cuts: list[_Cut] = []
    for user in filter(live.__contains__, view.users):
        if _is_whole(user, view):
            found = _cuts_of(user, live, known)
        elif user.target in _ORDERS:
            order = _order(user)
            found = [
                replace(cut, dim=order[cut.dim], path=(user, *cut.path)) for cut in _cuts_of(user, live, known) or ()
            ] or None
        elif user.target in _SPLITS and user.args[0] is view:
            found = _pieces(user, live)
        else:
            cut = _cut_by(user, view, known)
            found = None if cut is None else [cut]
        if found is None:
            return None
        cuts += found
    return cuts or None


def _is_whole(node: Node, source: Node) -> bool:
    """Whether a node is a slice that leaves nothing out."""
    if node.target is not aten.slice.Tensor or node.args[0] is not source:
        return False
    shapes = [_sizes(n.meta["val"].shape) for n in (node, source)]
    return shapes[0] == shapes[1] and _argument(node, 4, "step", 1) == 1


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _pieces(split: Node, live: Collection[Node]) -> list[_Cut] | None:
    """Return what is read of the pieces that one operator makes."""
    dim = _argument(split, 2, "dim", 0) % split.args[0].meta["val"].dim()
    sizes = [piece.shape[dim] for piece in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    stops = list(accumulate(sizes))
    items = [user for user in split.users if user in live]
    if not all(item.target is operator.getitem for item in items):
        return None
    return [_Cut(item, dim, stops[i] - sizes[i], stops[i]) for item in items for i in item.args[1:]]


def _cut_by(node: Node, view: Node, known: Known) -> _Cut | None:
    """Return the range of one dimension that a node reads, None if it does anything else."""
    shape = view.meta["val"].shape
    if node.args[:1] != (view,) or len(node.all_input_nodes) != 1 + (node.target is aten.index.Tensor):
        return None
    if node.target is aten.index.Tensor:
        given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
        values = known(given[0][1]) if len(given) == 1 else None
        if values is None or values.dim() != 1 or values.dtype != torch.int64 or not values.numel():
            return None
        dim, positions = given[0][0], values.tolist()
    elif node.target is aten.slice.Tensor:
        dim = _argument(node, 1, "dim", 0) % len(shape)
        ends = [_argument(node, 2, "start", None), _argument(node, 3, "end", None), _argument(node, 4, "step", 1)]
        if not (isinstance(shape[dim], int) and all(end is None or isinstance(end, int) for end in ends)):
            return None
        positions = list(range(shape[dim])[slice(*ends)])
    elif node.target is aten.select.int:
        dim, positions = node.args[1] % len(shape), [node.args[2]]
    else:
        return None
    size = shape[dim]
    if not isinstance(size, int) or not positions:
        return None
    start = positions[0] % size
    if [position % size for position in positions] != list(range(start, start + len(positions))):
        return None
    return _Cut(node, dim, start, start + len(positions), dim if node.target is aten.select.int else None)


def _order(node: Node) -> list[int]:
    """Return which dimension of its input each dimension of a node is."""
    source = torch.empty(tuple(range(node.args[0].meta["val"].dim())), device="meta")
    return list(node.target(source, *node.args[1:], **node.kwargs).shape)


def _end_of_run(before: Any, after: Any, dim: int) -> int | None:
    """Return where the dimensions end that a view makes of one with ``dim`` among them; None if that is all of it."""
    ends = {1}  # products of the dimensions behind each one: where dimensions of both shapes end
    behind = 1
    for size in reversed(before):
        if not isinstance(size, int):
            break
        behind *= size
        ends.add(behind)
    behind, found = 1, len(after)
    for place in range(len(after) - 1, dim, -1):
        if behind in ends:
            found = place + 1
        if not isinstance(after[place], int):
            return None
        behind *= after[place]
    return found if behind not in ends and isinstance(after[dim], int) else None


def _rewrite(graph: Any, view: Node, cuts: list[_Cut], end: int) -> bool:
    """Replace pieces of a view by views of pieces."""
    shape = view.meta["val"].shape
    given = view.args[1] if view.target is not aten.unflatten.int else []
    sizes: list[Any] = [_written(size, given, place) for place, size in enumerate(shape)]
    if sizes.count(-1) > 1:
        return False
    dim, source = cuts[0].dim, view.args[0]
    width = 1
    for size in shape[dim + 1 : end]:
        width *= size
    whole = [*sizes[:dim], shape[dim] * width, *sizes[end:]]
    if _sizes(source.meta["val"].shape) != _sizes([*shape[:dim], shape[dim] * width, *shape[end:]]):
        source = _insert(graph, view, aten.reshape.default, source, whole)
    made: list[Node] = []
    for cut in cuts:
        node = _insert(graph, cut.node, aten.slice.Tensor, source, dim, cut.start * width, cut.stop * width)
        kept = [*sizes[:dim], cut.stop - cut.start, *sizes[dim + 1 :]]
        node = _insert(graph, cut.node, aten.reshape.default, node, kept)
        for step in cut.path:
            node = _insert(graph, cut.node, step.target, node, *step.args[1:], **step.kwargs)
        if cut.drops is not None:
            node = _insert(graph, cut.node, aten.select.int, node, cut.drops, 0)
        made.append(node)
    for cut, node in zip(cuts, made, strict=True):
        cut.node.replace_all_uses_with(node)
    return True


def _sizes(shape: Any) -> tuple[str, ...]:
    """Return sizes in a form that can be compared without a question about symbols."""
    return tuple(map(str, shape))


def _written(size: Any, given: list[Any], place: int) -> Any:
    """Return a size as an argument: a number, the node that makes it, or -1 for one that follows from the others."""
    if isinstance(size, int):
        return size
    return given[place] if place < len(given) else -1


def _insert(graph: Any, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call in front of a node."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    node.meta = {"nn_module_stack": before.meta.get("nn_module_stack", {})}
    values = torch.fx.node.map_arg(args, lambda leaf: leaf.meta["val"])
    node.meta["val"] = target(*values, **kwargs)
    return node
