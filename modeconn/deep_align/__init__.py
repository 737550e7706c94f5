"""Deep-Align: a network that reads the weights of two networks and says how to relabel the second."""

from modeconn.deep_align.aligner import DeepAlign
from modeconn.deep_align.augmentation import WeightAugmentation

__all__ = ["DeepAlign", "WeightAugmentation"]
