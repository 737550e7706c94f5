"""What discovery found in a model, and what it left fixed and why, for people to read."""

from __future__ import annotations

import html
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from modeconn.symmetry.findings import UnknownOperator
from modeconn.symmetry.groups import Group
from modeconn.symmetry.kinds import KINDS
from modeconn.tools import provenance
from modeconn.tools.json_files import KIND, JsonFile, from_json, taken_as, to_json
from modeconn.tools.table import html_table

_PLACES_SHOWN = 4


@dataclass(frozen=True, repr=False)
class SymmetryReport(JsonFile):
    """The symmetry of a model in numbers.

    Args:
        groups: Every group with its size and places.
        log10_size: Decimal logarithm of the number of relabellings that leave the function as it is.
        share_moving: Share of the scalars in saved parameters and buffers whose tensor has an axis that moves.
        fixed: For each reason, the axes that it fixed, ``(parameter or buffer, dimension, positions)``.
        unread: Parameters and buffers in neither graph.
        unknown: Operators without a rule and what they cost.
        dimension: Number of directions in which the rotations among the relabellings can be moved a little.
        limited: For each reason, the axes that move and on which it keeps the group from being larger, as in ``fixed``;
            empty if nothing but permutations was looked for.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    groups: tuple[Group, ...]
    log10_size: float
    share_moving: float
    fixed: dict[str, tuple[tuple[str, int, int], ...]]
    unread: tuple[str, ...]
    unknown: tuple[UnknownOperator, ...]
    dimension: int = 0
    limited: dict[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: tuple[Group, ...],
        shapes: Mapping[str, tuple[int, ...]],
        fixed: Mapping[str, Sequence[str | None]],
        unread: tuple[str, ...],
        unknown: tuple[UnknownOperator, ...],
        limited: Mapping[str, Sequence[str | None]] | None = None,
    ) -> SymmetryReport:
        """Sum up what discovery found.

        Args:
            groups: The groups.
            shapes: The shape of every parameter and buffer, by name.
            fixed: Why each of their axes is fixed, None where it moves.
            unread: Parameters and buffers in neither graph.
            unknown: Operators without a rule.
            limited: Why the group on each of the axes that move is no larger.
        """
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        moving = {name for group in groups for name, _ in group.places}
        return cls(
            groups=groups,
            log10_size=sum(group.log10_size for group in groups),
            share_moving=sum(sizes[name] for name in moving) / max(sum(sizes.values()), 1),
            fixed=_by_reason(fixed, shapes),
            unread=unread,
            unknown=unknown,
            dimension=sum(group.dimension for group in groups),
            limited=_by_reason(limited or {}, shapes),
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON; also write it to ``path`` if given."""
        groups = [
            {
                "name": group.name,
                "atom": group.atom,
                "kind": group.kind.name,
                "shape": group.shape,
                "parents": group.parents,
                "places": group.places,
            }
            for group in self.groups
        ]
        plain = {name: getattr(self, name) for name in ("log10_size", "share_moving", "fixed", "unread")}
        if self.dimension or self.limited:
            plain |= {"dimension": self.dimension, "limited": self.limited}
        record = {**plain, "groups": groups, "unknown": [vars(one) for one in self.unknown]}
        return to_json({KIND: type(self).__name__, **record, **provenance.entry(self)}, path)

    @classmethod
    def from_json(cls, text: str) -> SymmetryReport:
        """Invert `to_json`.

        Raises:
            ValueError: If the text is no such report.
        """
        record = from_json(text, "report of symmetries")
        with taken_as("report of symmetries"):
            if record[KIND] != cls.__name__:
                raise ValueError(f"it is a {record[KIND]}")
            groups = tuple(
                Group(
                    group["name"],
                    group["atom"],
                    group["shape"][-1],
                    tuple((name, size) for name, size in group["parents"]),
                    tuple((name, dim) for name, dim in group["places"]),
                    KINDS[group["kind"]],
                )
                for group in record["groups"]
            )
            fixed, limited = (
                {why: tuple((name, dim, size) for name, dim, size in axes) for why, axes in record.get(key, {}).items()}
                for key in ("fixed", "limited")
            )
            unknown = tuple(UnknownOperator(**one) for one in record["unknown"])
            numbers = (record["log10_size"], record["share_moving"])
            more = (tuple(record["unread"]), unknown, record.get("dimension", 0), limited)
            found = cls(groups, *numbers, fixed, *more)
            repr(found)  # a report that cannot be shown holds something else than was written
        provenance.keep(found, record.get(provenance.ATTRIBUTE))
        return found

    @property
    def _headline(self) -> str:
        count = len(self.groups)
        rotations = f" and rotations of {self.dimension:,} dimensions" if self.dimension else ""
        return (
            f"{count} group{'s' * (count != 1)}, 10^{self.log10_size:,.1f} relabellings{rotations}; "
            f"{self.share_moving:.1%} of the weights are in tensors that move"
        )

    def _group_rows(self) -> list[list[str]]:
        return [[g.name, str(g), some([f"{name}[{dim}]" for name, dim in g.places])] for g in self.groups]

    def _reason_rows(self, reasons: Mapping[str, Sequence[tuple[str, int, int]]]) -> list[list[str]]:
        rows = []
        for why, axes in sorted(reasons.items(), key=lambda item: -len(item[1])):
            plural = "axis" if len(axes) == 1 else "axes"
            rows.append([why, f"{len(axes)} {plural}", some([f"{name}[{dim}]" for name, dim, _ in axes])])
        return rows

    def _remarks(self) -> list[str]:
        remarks = [f"no rule for {unknown}" for unknown in self.unknown]
        if self.dimension:
            remarks.append("a rotated network equals the first in eval mode; in train mode if it has no dropout")
        if self.unread:
            remarks.append(f"in neither graph, left as they are: {some(self.unread)}")
        return remarks

    def __repr__(self) -> str:
        lines = [self._headline, "", "group", *_columns(self._group_rows())]
        if self.fixed:
            lines += ["", "fixed because", *_columns(self._reason_rows(self.fixed))]
        if self.limited:
            lines += ["", "no larger because", *_columns(self._reason_rows(self.limited))]
        return "\n".join([*lines, *([""] if self._remarks() else []), *self._remarks()])

    def _repr_html_(self) -> str:
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        groups = html_table(("group", "size", "where"), self._group_rows(), left=(0, 2))
        fixed = html_table(("fixed because", "axes", "where"), self._reason_rows(self.fixed), left=(0, 2))
        limited = html_table(("no larger because", "axes", "where"), self._reason_rows(self.limited), left=(0, 2))
        return f"<p>{html.escape(self._headline)}</p>{groups}{fixed}{limited * bool(self.limited)}{remarks}"


def _by_reason(
    reasons: Mapping[str, Sequence[str | None]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """Return the axes by the reason that is given for them, ``(parameter or buffer, dimension, positions)``."""
    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for name, of_axes in reasons.items():
        for dim, why in enumerate(of_axes):
            if why:
                found[why].append((name, dim, shapes[name][dim]))
    return {why: tuple(axes) for why, axes in found.items()}


def some(names: Sequence[str]) -> str:
    """Return the first names of many, and how many more there are."""
    shown = "  ".join(names[:_PLACES_SHOWN])
    return shown if len(names) <= _PLACES_SHOWN else f"{shown}  and {len(names) - _PLACES_SHOWN} more"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
