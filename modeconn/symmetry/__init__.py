"""Which hidden units of a model may be relabelled together without changing its function."""

from modeconn.symmetry.discover import UnknownOperatorWarning, discover
from modeconn.symmetry.permutation import Permutation
from modeconn.symmetry.rules import RULES
from modeconn.symmetry.spec import Group, PermutationSpec, VerificationError

__all__ = [
    "RULES",
    "Group",
    "Permutation",
    "PermutationSpec",
    "UnknownOperatorWarning",
    "VerificationError",
    "discover",
]
