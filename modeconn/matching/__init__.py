"""Choose the relabelling of one network's units that brings it closest to another network."""

from modeconn.matching.activation_matching import ActivationMatching
from modeconn.matching.alignment import Alignment, align
from modeconn.matching.assignment import match_groups, match_units
from modeconn.matching.method import Match, Method
from modeconn.matching.weight_matching import WeightMatching

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
