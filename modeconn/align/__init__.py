"""Choose the relabelling of one network's units that brings it closest to another network."""

from modeconn.align.activation_matching import ActivationMatching
from modeconn.align.align import Alignment, align
from modeconn.align.assignment import match_groups, match_units
from modeconn.align.method import Match, Method
from modeconn.align.weight_matching import WeightMatching

__all__ = [
    "ActivationMatching",
    "Alignment",
    "Match",
    "Method",
    "WeightMatching",
    "align",
    "match_groups",
    "match_units",
]
