"""The kinds of groups that may act along an axis: a lattice in which operators lower an atom, and nothing raises it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, eq=False)
class Kind:
    """A family of groups, one for each number of units.

    Args:
        name: In files.
        below: Kinds whose groups are parts of this one's; what is below them is added.
        log10_order: Returns the decimal logarithm of the number of elements, from the number of units; 0 for groups
            that are continuous.
        dimension: Returns the number of directions in which an element can be moved a little, from the number of units.
    """

    name: str
    below: frozenset[Kind] = frozenset()
    log10_order: Callable[[int], float] = lambda size: 0.0
    dimension: Callable[[int], int] = lambda size: 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "below", self.below.union(*(kind.below for kind in self.below)))

    def __repr__(self) -> str:
        return f"Kind({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _named, (self.name,)  # there is one of each name, in copies and in other processes

    @cache  # noqa: B019 (kinds are few, and live as long as the program)
    def meet(self, other: Kind) -> Kind:
        """Return the largest kind that is a part of both.

        Raises:
            ValueError: If there is no such kind: what is below two kinds must have a largest member.
        """
        common = (self.below | {self}) & (other.below | {other})
        for kind in common:
            if common <= kind.below | {kind}:
                return kind
        raise ValueError(f"the kinds {self.name} and {other.name} have no largest kind below both.")


FIXED = Kind("fixed")
"""Nothing but the identity: each position has its meaning."""

PERMUTATION = Kind("permutation", frozenset({FIXED}), lambda size: math.lgamma(size + 1) / math.log(10))
"""Any order of the units."""

ORTHOGONAL_ONES = Kind(
    "orthogonal-ones", frozenset({PERMUTATION}), dimension=lambda size: max(size - 1, 0) * max(size - 2, 0) // 2
)
"""Orthogonal maps that fix the vector of ones: they keep the mean of the units, and so what layer norm makes of them.

Of two units these are the two permutations.
"""

ORTHOGONAL = Kind("orthogonal", frozenset({ORTHOGONAL_ONES}), dimension=lambda size: size * (size - 1) // 2)
"""Rotations and reflections: they keep the length of the vector of units, and so what RMS norm makes of them."""

LINEAR = Kind("linear", frozenset({ORTHOGONAL}), dimension=lambda size: size * size)
"""Any invertible map. A layer that reads the units undoes it by the inverse, so it may be a scale for each unit: that
is how gains are folded (`modeconn.symmetry.gains`). No group is of this kind in the end."""

KINDS = {kind.name: kind for kind in (FIXED, PERMUTATION, ORTHOGONAL_ONES, ORTHOGONAL, LINEAR)}
"""Every kind by its name."""

SYMMETRIES = {"permutation": PERMUTATION, "orthogonal": ORTHOGONAL}
"""The largest kind of group that is looked for, by what `modeconn.discover` calls it."""


def check_symmetries(symmetries: str) -> None:
    """Raise a ValueError unless it names a largest kind."""
    if symmetries not in SYMMETRIES:
        known = " or ".join(map(repr, SYMMETRIES))
        raise ValueError(f"symmetries must be {known}, got symmetries={symmetries!r}.")


def _named(name: str) -> Kind:
    return KINDS[name]
