"""modeconn: connect independently trained neural networks.

import modeconn
from modeconn import data, models

train, test = data.load("digits")
a, b = (models.train(models.mlp(64, (128, 128), 10, seed=s), train, seed=s) for s in (1, 2))

spec = modeconn.discover(a)                                # which units may be relabelled
aligned = modeconn.align(a, b, train, spec=spec)           # b, relabelled after a
connection = modeconn.fit_curve(a, b, train, align=True)   # a low-loss curve between them
profile = connection.evaluate(test)                        # loss and accuracy along it
"""

from modeconn.tools import program as _program  # noqa: F401, first: stopped while it imports, the program is silent

# isort: split
from modeconn import attacks, data, models, plot, tensor_files
from modeconn._version import __version__
from modeconn.attacks.pgd import PGD
from modeconn.attacks.training import TRADES, AdversarialTraining, FreeAdversarialTraining
from modeconn.comparison import Comparison, compare
from modeconn.connection import Connection
from modeconn.curves import Bezier, Line, PolyChain
from modeconn.deep_align import DeepAlign
from modeconn.fit import fit_curve
from modeconn.learning import callbacks
from modeconn.learning.checkpoint import Checkpoint
from modeconn.learning.history import History
from modeconn.matching import (
    ActivationMatching,
    Alignment,
    Sinkhorn,
    SoftPermutation,
    StraightThrough,
    TransportMatching,
    WeightMatching,
    align,
    unit_correlations,
)
from modeconn.measure import metrics
from modeconn.measure.along import AlongCurve
from modeconn.measure.curvature import Curvature
from modeconn.measure.one_network import evaluate
from modeconn.measure.plane import Plane
from modeconn.measure.predictions import Predictions
from modeconn.measure.profile import Profile
from modeconn.measure.robust_profile import RobustProfile
from modeconn.measure.robustness import robustness
from modeconn.merging import Merge, interpolate, merge_many
from modeconn.network.attack import AdversarialExamples
from modeconn.network.ensemble import Ensemble
from modeconn.network.loss import TrainingData, cross_entropy
from modeconn.network.recipe import Recipe, constant, cosine, halving, one_cycle, piecewise_linear, triangular
from modeconn.network.repair import repair
from modeconn.network.weights import WeightSpace
from modeconn.planes import plane
from modeconn.refinement import PAM, BestSwap, ProximalLinear, RelaxedStep, RotationStep, SinkhornStep, best_swap
from modeconn.symmetry import (
    RULES,
    Invertible,
    Orthogonal,
    Permutation,
    PermutationSpec,
    Relabelling,
    UnknownOperatorWarning,
    VerificationError,
    balance,
    discover,
    fold_gains,
    verify,
)
from modeconn.tools.processes import alone

__all__ = [  # in the order of the stages
    "__version__", "alone", "plot", "tensor_files", "data",
    "WeightSpace", "TrainingData", "cross_entropy", "Recipe", "constant", "piecewise_linear", "halving", "one_cycle",
    "cosine", "triangular",
    "AdversarialExamples", "repair", "Ensemble",
    "RULES", "discover", "UnknownOperatorWarning", "PermutationSpec", "Relabelling", "Permutation", "Orthogonal",
    "Invertible", "balance", "fold_gains", "verify",
    "VerificationError",
    "attacks", "PGD", "AdversarialTraining", "TRADES", "FreeAdversarialTraining",
    "metrics", "AlongCurve", "Profile", "evaluate", "RobustProfile", "robustness", "Curvature", "Plane", "Predictions",
    "Line", "Bezier", "PolyChain",
    "align", "unit_correlations", "Alignment",
    "ActivationMatching", "WeightMatching", "TransportMatching", "SoftPermutation", "Sinkhorn",
    "StraightThrough",
    "callbacks", "Checkpoint", "History",
    "PAM", "ProximalLinear", "SinkhornStep", "RelaxedStep", "RotationStep", "best_swap", "BestSwap",
    "DeepAlign", "models",
    "Connection", "interpolate", "merge_many", "Merge", "plane", "fit_curve", "compare", "Comparison",
]  # fmt: skip
