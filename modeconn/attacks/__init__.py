"""Attacks on networks, training against them, and what they leave of a network along a curve."""

from modeconn.attacks.by_name import build
from modeconn.attacks.torch_attacks import Cascade, TorchAttack, autoattack
from modeconn.network.attack import Attack

__all__ = ["Attack", "Cascade", "TorchAttack", "autoattack", "build"]
