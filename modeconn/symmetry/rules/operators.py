"""Operators by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modeconn.symmetry.kinds import Kind
from modeconn.symmetry.walk import Rule

if TYPE_CHECKING:
    from torch.fx import Node

aten = torch.ops.aten


def table(names: dict[Rule, str]) -> dict[Any, Rule]:
    """Return the rules by operator, or by one overload of it, of those with these names that this torch has."""
    found = {}
    for rule, text in names.items():
        for name in text.split():
            with contextlib.suppress(AttributeError):
                found[operator_of(f"aten.{name}")] = rule
    return found


def leaves(kind: Kind) -> Callable[[Rule], Rule]:
    """Declare the largest kind of group that the operators of a rule leave on their axes, `LINEAR` for linear maps.

    A rule of an operator that is linear along some axes alone lowers the others itself. Where nothing is declared the
    operator may act on each unit by itself, and so leaves permutations.
    """

    def declare(rule: Rule) -> Rule:
        rule.leaves = kind  # type: ignore[attr-defined]
        return rule

    return declare


def reads_shapes(rule: Rule) -> Rule:
    """Mark a rule that takes sizes from ``walk.shapes`` alone: numbers among its arguments may depend on values."""
    rule.reads_shapes = True  # type: ignore[attr-defined]
    return rule


def name_of(target: Any) -> str:
    """Return the name of an operator without its library and overload, "" for other functions."""
    return getattr(getattr(target, "overloadpacket", target), "__name__", "") if target is not None else ""


def is_written(node: Node, but: Node | None = None) -> bool:
    """Whether a node, or a view of it, may be changed where it lies, by others than ``but``."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if user is but or schema is None:
            continue
        if schema.is_mutable or (any(out.alias_info for out in schema.returns) and is_written(user, but)):
            return True
    return False


def operator_of(name: str) -> Any:
    """Invert `str` of an operator: ``aten.linear``, one overload of it, or the name ``"library::operator"`` itself."""
    return name if "::" in name else functools.reduce(getattr, name.split("."), torch.ops)
