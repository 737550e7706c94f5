"""Refine the relabelling of a network and the curve to it together."""

from modeconn.refinement.best_swap import BestSwap, best_swap
from modeconn.refinement.pam import PAM, PermutationStep
from modeconn.refinement.proximal_linear import ProximalLinear
from modeconn.refinement.relaxed_step import RelaxedStep
from modeconn.refinement.rotation_step import RotationStep
from modeconn.refinement.sinkhorn_step import SinkhornStep

__all__ = [
    "PAM",
    "BestSwap",
    "PermutationStep",
    "ProximalLinear",
    "RelaxedStep",
    "RotationStep",
    "SinkhornStep",
    "best_swap",
]
