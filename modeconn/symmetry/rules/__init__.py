"""One rule per operator: how the axes of its inputs act on the axes of its outputs.

A rule is called as ``rule(walk, *args, **kwargs)`` with the operator's own arguments, each tensor replaced by a
`Traced`, and returns the axes of the output (a list of axes; a list of such lists for several outputs). It is right if

1. axes that the operator indexes with one loop variable are unified;
2. an axis whose positions carry meaning (order, neighbours, integer indices) is fixed;
3. every tensor that the operator forms inside is shown (``walk.show``): the products of a contraction, statistics of a
   norm, the sum in a softmax, what is alike at all places of an axis that is mixed or reordered. They decide what may
   vary with what.

Where rotations are looked for, an operator leaves permutations on all axes that it touches, unless its rule says by
`operators.leaves` that it leaves more: a linear map leaves everything, and the rule lowers (``walk.lower``) the axes
along which it is not linear, or constant entries come in.

Rules only ever unify, fix and lower, so their order does not matter. Shapes come from ``walk.shapes``; a rule that
needs no other number than these is marked by `operators.reads_shapes`, and is asked also where a number depends on
values.

Each module has the rules of one kind and, at its end, the operators that they are for.
"""

from __future__ import annotations

from typing import Any

from modeconn.symmetry.rules import contractions, elementwise, lookup, recurrent, reductions, shapes, space, vision
from modeconn.symmetry.walk import Rule


class _Rules(dict[Any, Rule]):
    """Rules by operator, which the help of functions that take them names in place of listing all."""

    def __repr__(self) -> str:
        return f"<RULES: {len(self)} rules>"


RULES: dict[Any, Rule] = _Rules(
    (operator, rule)
    for module in (elementwise, contractions, reductions, space, shapes, lookup, recurrent, vision)
    for operator, rule in module.RULES.items()
)
"""The rules by operator (``aten.linear``), by one overload of it (``aten.max.dim``), which goes first, or by the name
``"library::operator"`` of one whose library need not be there."""
