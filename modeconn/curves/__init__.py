"""Curves through weight space: from a position ``t`` and control points to the weights of one network."""

from __future__ import annotations

from modeconn.curves.bezier import Bezier
from modeconn.curves.curve import Curve, check_positions, mix
from modeconn.curves.line import Line
from modeconn.curves.polychain import PolyChain

CURVES: dict[str, type[Curve]] = {curve.__name__: curve for curve in (Line, Bezier, PolyChain)}
"""The curves that files may name."""

__all__ = ["CURVES", "Bezier", "Curve", "Line", "PolyChain", "check_positions", "mix"]
