"""Which hidden units of a model may be relabelled together without changing its function."""

from modeconn.symmetry.balancing import balance
from modeconn.symmetry.discover import UnknownOperatorWarning, discover
from modeconn.symmetry.folding import fold_gains
from modeconn.symmetry.groups import Group
from modeconn.symmetry.invertible import Invertible
from modeconn.symmetry.kinds import LINEAR, PERMUTATION
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.rules import RULES
from modeconn.symmetry.rules.elementwise import broadcast, pointwise
from modeconn.symmetry.rules.operators import leaves
from modeconn.symmetry.spec import Orthogonal, Permutation, PermutationSpec
from modeconn.symmetry.verify import VerificationError, verify
from modeconn.symmetry.walk import Rule, Traced, Walk

__all__ = [
    "LINEAR",
    "PERMUTATION",
    "RULES",
    "Group",
    "Invertible",
    "Orthogonal",
    "Permutation",
    "PermutationSpec",
    "Relabelling",
    "Rule",
    "Traced",
    "UnknownOperatorWarning",
    "VerificationError",
    "Walk",
    "balance",
    "broadcast",
    "discover",
    "fold_gains",
    "leaves",
    "pointwise",
    "verify",
]
