"""The settings of Deep-Align, which its training reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from modeconn.deep_align.augmentation import WeightAugmentation
from modeconn.tools.checks import check_at_least, check_integers, check_positive
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown


@dataclass(frozen=True)
class Settings(Shown):
    """What `modeconn.DeepAlign`, whose docstring explains each, is set to."""

    features: int = 64
    edge_features: int = 4
    depth: int = 4
    scale: float = 6.0
    num_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 5e-4
    supervised: float = 1.0
    alignment: float = 1.0
    connectivity: float = 1.0
    augmentation: WeightAugmentation = field(default_factory=WeightAugmentation)
    num_validation_pairs: int = 64
    validate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "features", "edge_features", "depth", "num_steps", "batch_size", "seed")
        check_integers(self, "num_validation_pairs", "validate_every")
        check_positive(self, "features", "edge_features", "depth", "scale", "batch_size", "learning_rate")
        check_positive(self, "num_validation_pairs", "validate_every")
        check_at_least(self, 0, "num_steps", "weight_decay", "supervised", "alignment", "connectivity")
        if self.supervised == self.alignment == self.connectivity == 0:
            raise ValueError("one of supervised, alignment and connectivity must be positive, all of them are 0.")
        if self.features % self.edge_features:
            raise ValueError(
                f"features must be a multiple of edge_features={self.edge_features}, got features={self.features}."
            )
