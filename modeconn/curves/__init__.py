"""Curves through weight space: from a position ``t`` and control points to the weights of one network."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from modeconn.curves.bezier import Bezier
from modeconn.curves.curve import Curve, check_positions, mix
from modeconn.curves.line import Line
from modeconn.curves.polychain import PolyChain

CURVES: dict[str, type[Curve]] = {curve.__name__: curve for curve in (Line, Bezier, PolyChain)}
"""The curves that files name without their module."""

__all__ = ["CURVES", "Bezier", "Curve", "Line", "PolyChain", "check_positions", "describe", "mix", "rebuild"]


def describe(curve: Curve) -> tuple[str, dict[str, Any]]:
    """Return what files hold of a curve: its name, ``module:name`` for a class of the user's, and its settings.

    Raises:
        ValueError: If it is no curve, or no dataclass with fields that JSON can hold.
    """
    if not isinstance(curve, Curve):
        what = f"the class {curve.__name__}" if isinstance(curve, type) else repr(curve)
        raise ValueError(f"curve must be a modeconn.curves.Curve, such as Bezier(2), got {what}.")
    kind = type(curve)
    way_out = "write its class as a @dataclass(frozen=True) with fields that JSON can hold"
    if not dataclasses.is_dataclass(curve):
        raise ValueError(f"{kind.__name__} says nothing of its settings, so that no file could hold it: {way_out}.")
    settings = {field.name: getattr(curve, field.name) for field in dataclasses.fields(curve)}
    try:
        if json.loads(json.dumps(settings)) == settings:
            return _name_of(kind), settings
    except TypeError:
        pass
    raise ValueError(f"no file could hold the settings of {curve!r}: {way_out}.")


def rebuild(name: str, settings: dict[str, Any], kind: type[Curve] | None = None) -> Curve:
    """Invert `describe`.

    Args:
        name: What it returned.
        settings: What it returned.
        kind: The class; needed for one of the user's. Its module may have another name than in the file.

    Raises:
        ValueError: If the class is missing, or is not the one that is named.
    """
    if kind is None and name not in CURVES:
        raise ValueError(
            f"the curve is of the class {name}, which files do not hold. Pass curve={_last(name)} (on the "
            f"command line --curve-class package.module:{_last(name)})."
        )
    found = CURVES[name] if kind is None else kind
    if not isinstance(found, type):
        raise ValueError(f"curve must be the class of the curve, got curve={found!r}. Pass {type(found).__name__}.")
    if _last(_name_of(found)) != _last(name):
        raise ValueError(f"the curve is of the class {name}, not of {_name_of(found)}.")
    return found(**settings)


def _name_of(kind: type[Curve]) -> str:
    return kind.__name__ if CURVES.get(kind.__name__) is kind else f"{kind.__module__}:{kind.__qualname__}"


def _last(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]
