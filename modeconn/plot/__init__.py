"""Draw results with matplotlib: each function takes an ``ax``, draws what it is given, and returns the ``ax``.

Nothing is computed here but means, spreads and intervals, and no global setting of matplotlib is touched.
"""

from modeconn.plot.along import profile, robust_profile, spectrum
from modeconn.plot.fits import comparison, history, history_by_t, turns
from modeconn.plot.planes import mean_plane, plane
from modeconn.plot.units import correlation, cycles, eigen_angles, unit_correlation

__all__ = [
    "comparison",
    "correlation",
    "cycles",
    "eigen_angles",
    "history",
    "history_by_t",
    "mean_plane",
    "plane",
    "profile",
    "robust_profile",
    "spectrum",
    "turns",
    "unit_correlation",
]
