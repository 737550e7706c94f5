"""Positions on a curve at which something is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chosen_positions(t: Sequence[float] | None, num_points: int) -> list[float]:
    """Return the positions to look at: those given, or evenly spaced ones.

    Args:
        t: Positions in [0, 1], rising; None for ``num_points`` evenly spaced ones, both ends included.
        num_points: How many, at least 2; not looked at if ``t`` is given.

    Raises:
        ValueError: If those given do not rise, or there are fewer than both ends.
    """
    if t is None:
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, to hold both ends, got num_points={num_points}.")
        return torch.linspace(0, 1, num_points, dtype=torch.float64).tolist()
    chosen = [float(position) for position in t]
    if not chosen or any(not 0 <= position <= 1 for position in chosen) or chosen != sorted(set(chosen)):
        raise ValueError(f"t must hold rising positions in [0, 1], got t={chosen}.")
    return chosen
