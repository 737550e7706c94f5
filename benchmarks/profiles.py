"""The numbers of a profile that results keep."""

from __future__ import annotations

import modeconn


def numbers_of(profile: modeconn.Profile) -> dict[str, float]:
    """Return what tables of connections show, by name."""
    return {
        "end accuracy": float(profile.own_accuracy.mean()),
        "end loss": float(profile.own_loss.mean()),
        "min accuracy": profile.min_accuracy,
        "mean accuracy": profile.mean_accuracy,
        "arc-length mean accuracy": profile.arc_mean_accuracy,
        "barrier": profile.barrier,
        "seconds to evaluate": profile.seconds,
    }
