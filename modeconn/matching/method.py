"""What a matching method takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from modeconn.matching.statistics import Moments
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import Orthogonal, Permutation, PermutationSpec


@dataclass(frozen=True)
class Match:
    """What a method found.

    Args:
        permutation: The relabelling of b.
        correlation: Mean correlation of paired units, ``(before, after)`` by group; empty if no data was used.
        constant_units: Units that never change on the data, or have no weights, ``(of a, of b)`` by group.
        history: The method's objective, step by step, if it has one.
    """

    permutation: Relabelling
    correlation: dict[str, tuple[float, float]] = field(default_factory=dict)
    constant_units: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[float, ...] = ()


class Method(Protocol):
    """A way to choose the relabelling of b; its settings are its fields.

    One that cannot do without data may say so in an attribute ``needs_data``, see `check_data`.
    """

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
    ) -> Match:
        """Return the relabelling that brings b closest to a in the method's sense."""
        ...


def check_method(method: Any, *, name: str = "method") -> None:
    """Raise a ValueError unless ``method`` is an object that can match networks."""
    if isinstance(method, type) or not callable(getattr(method, "match", None)):
        others = ", or True, False, or what align returned" if name == "align" else ""
        raise ValueError(
            f"{name} must be an object with a match(...), such as WeightMatching(){others}, got {method!r}."
        )


def check_data(method: Any, loader: Iterable[Any] | None) -> None:
    """Raise unless there is data for a method, and for the one that finds its start, or they need none.

    Raises:
        ValueError: With what ``method.needs_data`` says: why data is needed, and the way out.
    """
    while loader is None and method is not None:
        if reason := getattr(method, "needs_data", None):
            raise ValueError(reason)
        method = getattr(method, "start", None)


Start = Relabelling | Method | None
"""Where a method that improves a relabelling begins: a given one, one that another method finds, or nothing moved.

What `modeconn.align` returned stands for its relabelling.
"""


def check_start(start: Any) -> None:
    """Raise a ValueError unless ``start`` is one."""
    if start is not None and finished(start) is None:
        check_method(start, name="start")


def finished(given: Any) -> Relabelling | None:
    """Return the relabelling that something is or, if `modeconn.align` made it, holds; None for a method or a flag."""
    found = given if isinstance(given, Relabelling) else getattr(given, "permutation", None)
    return found if isinstance(found, Relabelling) else None


def starting_permutation(
    start: Start, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
) -> Permutation | Orthogonal:
    """Return the relabelling of b that ``start`` stands for.

    Raises:
        ValueError: If it is of another spec, or a relabelling of another kind.
    """
    if start is None:
        return spec.identity()
    given = finished(start)
    if given is None:
        given = start.match(spec, model_a, model_b, loader).permutation
    return check_own(given, spec)


def check_own(given: Relabelling, spec: PermutationSpec) -> Permutation | Orthogonal:
    """Return a relabelling of these groups as one of this spec.

    Raises:
        ValueError: If it is of another spec, or a relabelling of another kind.
    """
    if not isinstance(given, (Permutation, Orthogonal)):
        raise ValueError(
            f"start= is a {given.kind}, and this method moves whole units. Pass a permutation, or a method that finds "
            f"one."
        )
    kinds = [{g.name: (g.shape, g.kind) for g in of.groups} for of in (given.spec, spec)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "start= is a permutation of another spec: its groups differ from those of the networks that are matched. "
            "Pass one that align returned for this architecture."
        )
    return spec.relabelling(given.tensors())


def check_permutes(spec: PermutationSpec, method: Any) -> None:
    """Raise a ValueError if a spec has groups that rotate, for a method that moves whole units alone."""
    rotating = [group.name for group in spec.groups if group.rotates]
    if rotating:
        raise ValueError(
            f"{type(method).__name__} permutes units, and this spec has {len(rotating)} groups that rotate them, such "
            f"as {rotating[0]!r}. WeightMatching, ActivationMatching, Sinkhorn and StraightThrough rotate them; or "
            f"look for permutations alone, with symmetries='permutation'."
        )


def correlations(moments: Mapping[str, Moments], relabelling: Relabelling) -> dict[str, tuple[float, float]]:
    """Return the mean correlation of paired units before and after relabelling, by group.

    Units that are constant in either network count as 0. Groups whose units are not paired one by one are left out.
    """
    result = {}
    for name, m in moments.items():
        sources = relabelling.sources(name)
        if sources is None:
            continue
        correlation = m.correlation()
        after = correlation.gather(1, sources.to(correlation.device)[:, None]).mean()
        result[name] = (float(correlation.diagonal().mean()), float(after))
    return result
