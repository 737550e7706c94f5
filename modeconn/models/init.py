"""Initialisations that several architectures share."""

from __future__ import annotations

from torch import nn


def he_init_convolutions(model: nn.Module) -> None:
    """Draw every convolution from ``N(0, 2 / fan_out)`` and set its bias to 0 (He et al., 2015).

    Linear and norm layers keep torch's own initialisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
