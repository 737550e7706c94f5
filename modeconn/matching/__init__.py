"""Choose the relabelling of one network's units that brings it closest to another network."""

from modeconn.matching.activation_matching import ActivationMatching
from modeconn.matching.alignment import Alignment, align
from modeconn.matching.assignment import match_groups, match_units
from modeconn.matching.method import Match, Method
from modeconn.matching.sinkhorn import Sinkhorn
from modeconn.matching.soft import SoftPermutation
from modeconn.matching.straight_through import StraightThrough
from modeconn.matching.transport import TransportMatching, match_softly
from modeconn.matching.unit_correlations import unit_correlations
from modeconn.matching.weight_matching import WeightMatching

__all__ = [
    "ActivationMatching",
    "Alignment",
    "Match",
    "Method",
    "Sinkhorn",
    "SoftPermutation",
    "StraightThrough",
    "TransportMatching",
    "WeightMatching",
    "align",
    "match_groups",
    "match_softly",
    "match_units",
    "unit_correlations",
]
