"""Which tensor says of which group each row is, where rows lie sorted by group: tokens of experts."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

from modeconn.symmetry.rules.operators import is_written, name_of

if TYPE_CHECKING:
    from torch.fx import Node

aten = torch.ops.aten
_CASTS = ("to", "_to_copy", "clone", "contiguous", "detach", "float", "int", "long", "lift_fresh_copy", "alias")


def counted(ends: Node, num_groups: int) -> Node:
    """Return the group numbers whose counts give the ends of groups of rows; the ends where it cannot be told."""
    sums = _plain(ends)
    if name_of(sums.target) != "cumsum":
        return ends
    counts = _plain(sums.args[0])
    limits = (*counts.args[1:], *counts.kwargs.values())
    if name_of(counts.target) == "bincount" or (
        name_of(counts.target) == "histc" and limits == (num_groups, 0, num_groups - 1)
    ):
        numbers = _plain(counts.args[0])
        return _before_sorting(numbers) or numbers
    return ends


def sorted_numbers(numbers: Node | None) -> Node | None:
    """Return the group numbers that a tensor holds in ascending order; None if it is not sorted."""
    return None if numbers is None else _before_sorting(_plain(numbers))


def _plain(node: Node) -> Node:
    """Return what a node is a copy of, in another type perhaps."""
    while name_of(node.target) in _CASTS and not is_written(node.args[0]):
        node = node.args[0]
    return node


def _before_sorting(node: Node) -> Node | None:
    """Return the one-dimensional tensor that a node is in ascending order, None if it is not sorted."""
    if is_written(node) or node.meta["val"].dim() != 1:
        return None
    if node.target is operator.getitem and node.args[1] == 0 and _ascends(node.args[0]):
        return _plain(node.args[0].args[0])
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:
        source, order = _plain(node.args[0]), _plain(node.args[1][0])
        sort = order.args[0] if order.target is operator.getitem and order.args[1] == 1 else order
        if (
            _ascends(sort)
            and _plain(sort.args[0]) is source
            and (sort is not order or name_of(sort.target) == "argsort")
        ):
            return source
    return None


def _ascends(node: Node) -> bool:
    """Whether a node sorts, the smallest first."""
    schema = getattr(node.target, "_schema", None)
    if name_of(node.target) not in ("sort", "argsort") or schema is None:
        return False
    given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    return not given.get("descending", False)
