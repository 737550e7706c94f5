"""Operators by name."""

from __future__ import annotations

import functools
from typing import Any

import torch

from modeconn.symmetry.walk import Rule

aten = torch.ops.aten


def table(names: dict[Rule, str]) -> dict[Any, Rule]:
    """Return the rules by operator, of the operators with these names that this torch has."""
    return {getattr(aten, name): rule for rule, text in names.items() for name in text.split() if hasattr(aten, name)}


def operator_of(name: str) -> Any:
    """Invert `str` of an operator: ``aten.linear``, one overload of it, or the name ``"library::operator"`` itself."""
    return name if "::" in name else functools.reduce(getattr, name.split("."), torch.ops)
