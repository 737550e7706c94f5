"""A slider over the positions of a profile, in a notebook."""

from __future__ import annotations

import io
from typing import Any

from modeconn.measure.along import AlongCurve


def explorer(profile: AlongCurve, quantity: str) -> Any:
    """Return a widget with a slider over t, the values there, and a figure with a mark at t.

    Args:
        profile: What was measured.
        quantity: What the figure shows.

    Raises:
        ImportError: If ipywidgets is not installed.
        ValueError: If there is no such quantity.
    """
    from matplotlib.figure import Figure

    widgets = library()

    positions = profile.t.tolist()
    slider = widgets.SelectionSlider(
        options=[(f"{t:.3g}", number) for number, t in enumerate(positions)], description="t", continuous_update=True
    )
    text, picture = widgets.HTML(), widgets.Image(format="png")

    def show(number: int) -> None:
        rows = [f"{name} {profile.quantity(name).form.format(float(v[number]))}" for name, v in profile.values.items()]
        text.value = " &nbsp; ".join(rows)
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        ax = profile.plot(quantity=quantity, ax=figure.subplots())
        ax.axvline(positions[number], color="#8C8C8C", linewidth=1.2)
        picture.value = _png(figure)

    slider.observe(lambda change: show(change["new"]), names="value")
    show(0)
    return widgets.VBox([slider, text, picture])


def library() -> Any:
    """Return ipywidgets.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import ipywidgets
    except ImportError:
        raise ImportError("explore shows a slider, which needs ipywidgets: pip install ipywidgets.") from None
    return ipywidgets


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
