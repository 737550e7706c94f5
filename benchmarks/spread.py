"""Mean and standard deviation over pairs of networks, for the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Spread = tuple[float, float | None]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation; of one value there is none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def shown(found: Spread, form: str, scale: float = 1) -> str:
    mean, deviation = found
    return f"{scale * mean:{form}}" + ("" if deviation is None else f" ± {scale * deviation:{form}}")
