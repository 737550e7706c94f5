"""Refine the relabelling of a network and the curve to it together."""

from modeconn.refinement.pam import PAM, PermutationStep
from modeconn.refinement.proximal_linear import ProximalLinear

__all__ = ["PAM", "PermutationStep", "ProximalLinear"]
