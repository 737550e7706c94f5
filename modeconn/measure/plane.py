"""Loss, accuracy and other metrics of the networks of a plane through weight space."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modeconn import plot
from modeconn.measure.along import Quantity
from modeconn.measure.profile import QUANTITIES
from modeconn.tools import provenance
from modeconn.tools.checks import there_are
from modeconn.tools.door import looked_at
from modeconn.tools.json_files import KIND, JsonFile, from_json, numbers, taken_as, to_json
from modeconn.tools.page import figure_page
from modeconn.tools.table import csv_table, html_table, table
from modeconn.tools.vtk import image_data
from modeconn.tools.writing import write_arrays, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_MARK = "#D55E00"  # what stands out from the colours of a surface
_LIFTS = (0.2, 0.08)  # by which networks, with their names, and the curve lie above a surface, by its height


@dataclass(frozen=True, eq=False, repr=False)
class Plane(JsonFile):
    """Values of networks on a plane through weight space, on a grid, and nearer by where it was refined.

    Distances in the plane are those of weight space: coordinates belong to two orthonormal directions.

    Args:
        x: Coordinates of the columns, rising, float64 ``(W,)``, as all others on the CPU.
        y: Coordinates of the rows, rising, ``(H,)``.
        values: By name of the quantity, ``(H, W)``.
        networks: Coordinates ``(2,)`` of the networks that the plane was laid through, by name.
        own: By name of the quantity, the values of these networks in their order, ``(K,)``.
        curve: Points of the curve, projected to the plane, ``(N, 2)``; None without a curve.
        curve_distance: The largest distance of the curve from the plane, 0 for a curve that lies in it.
        between: Coordinates of points that refinement added, ``(M, 2)``.
        between_values: By name of the quantity, their values, ``(M,)``.
        limit: The loss at which figures end their colours.
        times: How many times the largest loss of the networks, of a connection of its ends, that is.
        num_examples: How many examples were measured at each point.
        seconds: How long all that took.
        higher_is_better: By name of a metric, whether high values are good.
        statistics: Which statistics of norm layers networks were measured with; empty for networks that have none.
        attack: What examples were attacked by at each point, empty for clean examples.

    Raises:
        ValueError: If coordinates do not rise, or there are not as many values.
    """

    x: Tensor
    y: Tensor
    values: Mapping[str, Tensor]
    networks: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    curve: Tensor | None = None
    curve_distance: float = 0.0
    between: Tensor | None = None
    between_values: Mapping[str, Tensor] = field(default_factory=dict)
    limit: float | None = None
    times: float = 0.0
    num_examples: int = 0
    seconds: float = 0.0
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    statistics: str = ""
    attack: str = ""

    made_by: Mapping[str, Any] | None = field(default=None, init=False)
    """How it came about: call or command, versions, data."""

    @looked_at
    def __post_init__(self) -> None:
        for name, axis in (("x", self.x), ("y", self.y)):
            if axis.ndim != 1 or len(axis) < 2 or not bool((axis.diff() > 0).all() and axis.isfinite().all()):
                raise ValueError(f"{name} must hold two or more rising coordinates, got {axis.tolist()!r:.80}.")
        shape = (len(self.y), len(self.x))
        for name, value in self.values.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name!r} must have the shape (rows, columns) = {shape}, got {tuple(value.shape)}.")
        if not self.values:
            raise ValueError("values must hold one quantity or more.")

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is written, and which way it gets worse."""
        return QUANTITIES.get(name) or Quantity("{:.4g}", self.higher_is_better.get(name))

    def scattered(self, name: str) -> tuple[Tensor, Tensor]:
        """Return all points of a quantity: coordinates ``(M, 2)`` and values ``(M,)``.

        They are those of the grid, those between them along the curve, and the networks that the plane goes through, as
        far as they lie in its window; so that a coarse grid does not hide how low the loss is at a network.
        """
        rows, columns = torch.meshgrid(self.y, self.x, indexing="ij")
        points, values = torch.stack([columns.flatten(), rows.flatten()], 1), self.values[name].flatten()
        if self.between is not None and name in self.between_values:
            points, values = torch.cat([points, self.between]), torch.cat([values, self.between_values[name]])
        if self.networks and self.values.keys() <= self.own.keys():
            places = torch.stack(list(self.networks.values()))
            ends = torch.stack([self.x[[0, -1]], self.y[[0, -1]]], 1)  # low and high
            is_inside = ((places >= ends[0]) & (places <= ends[1])).all(1)
            is_new = torch.cdist(places, points).amin(1) > 1e-9 * self._width
            added = is_inside & is_new
            points, values = torch.cat([points, places[added]]), torch.cat([values, self.own[name][added]])
        return points, values

    @property
    def caption(self) -> str:
        """What a figure of it has to say: networks, data, statistics, where colours end."""
        parts = [f"plane through {', '.join(self.networks)}"] if self.networks else ["plane"]
        parts.append(f"{len(self.x)} x {len(self.y)} networks on {self.num_examples:,} examples")
        if self.between is not None and len(self.between):
            parts.append(f"{len(self.between)} more near the curve")
        lost = sum(int((~value.isfinite()).sum()) for name, value in self.values.items() if name == "loss")
        parts += [f"{lost} with a loss that is not finite, drawn as the highest"] if lost else []
        parts += [f"under {self.attack}"] if self.attack else []
        parts += [self.statistics] if self.statistics else []
        if self.curve is not None and self.curve_distance > 1e-3 * self._width:
            parts.append(f"the curve is projected, from up to {self.curve_distance:.3g} away")
        if self.limit is not None:
            parts.append(f"colours end at a loss of {self.limit:.3g}, {self.times:g} times the ends'")
        return "; ".join(parts)

    @property
    def _width(self) -> float:
        return float(self.x[-1] - self.x[0])

    # -- files

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything as JSON; also write it to ``path`` if given."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return to_json({KIND: type(self).__name__, **record, **provenance.entry(self)}, path)

    @classmethod
    def from_json(cls, text: str) -> Plane:
        """Invert `to_json`.

        Raises:
            ValueError: If the text is no plane.
        """
        record = from_json(text, cls.__name__)
        if record.get(KIND) != cls.__name__:
            raise ValueError(f"this is a {record.get(KIND, 'file of another kind')!s:.60}, not a {cls.__name__}.")
        with taken_as(cls.__name__):
            own = {f.name: record[f.name] for f in fields(cls) if f.init and f.name in record}
            result = cls(**{name: _tensors(value) for name, value in own.items()})
        provenance.keep(result, record.get(provenance.ATTRIBUTE))
        return result

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one row for each point, as comma-separated values; also write it to ``path`` if given."""
        points, _ = self.scattered(next(iter(self.values)))
        columns = {"x": points[:, 0], "y": points[:, 1], **{name: self.scattered(name)[1] for name in self.values}}
        return write_text(csv_table(columns, zip(*(c.tolist() for c in columns.values()), strict=True)), path)

    def to_npz(self, path: str | os.PathLike[str]) -> None:
        """Write coordinates, values ``(H, W)``, networks and curve for `numpy.load`."""
        arrays = {"x": self.x, "y": self.y, **{f"values/{name}": value for name, value in self.values.items()}}
        arrays |= {f"networks/{name}": place for name, place in self.networks.items()}
        if self.curve is not None:
            arrays["curve"] = self.curve
        if self.between is not None:
            arrays["between"] = self.between
            arrays |= {f"between/{name}": value for name, value in self.between_values.items()}
        write_arrays(arrays, path)

    def to_vti(self, path: str | os.PathLike[str]) -> None:
        """Write the values of the grid as VTK image data (``.vti``), for ParaView and the like."""
        spacing = [float(axis[1] - axis[0]) for axis in (self.x, self.y)]
        content = image_data(
            {name: value.numpy() for name, value in self.values.items()}, (float(self.x[0]), float(self.y[0])), spacing
        )
        write_text(content, path)

    def to_html(self, path: str | os.PathLike[str], *, quantity: str | None = None) -> None:
        """Write a quantity as a surface that can be turned in a browser, one file that needs no network.

        Args:
            path: The file.
            quantity: What to show; default: the first. The loss has a logarithmic height, up to the plane's limit.

        Raises:
            ValueError: If there is no such quantity.
        """
        name = next(iter(self.values)) if quantity is None else quantity
        if not isinstance(name, str) or name not in self.values:
            raise ValueError(f"the plane has no quantity {name!r}; {there_are(map(repr, self.values))}.")
        if not bool(self.values[name].isfinite().any()):
            raise ValueError(f"{name!r} is finite nowhere on this plane, so that there is no surface to show.")
        write_text(figure_page(f"{name} on a plane of networks", self.caption, *self._surface(name)), path)

    def _surface(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return traces and layout of a surface, as plotly has them; networks and curve lie on it, a little above."""
        (points, values), unit = self.scattered(name), self.quantity(name).unit
        is_finite = values.isfinite()
        is_log = name == "loss" and self.limit is not None and float(values[is_finite].min()) > 0
        heights = values.clamp(max=self.limit).log10() if is_log else values
        low, high = float(heights[is_finite].min()), float(heights[is_finite].max())
        heights = torch.where(is_finite, heights, high)
        ticks = [low + share * (high - low) for share in (0, 0.25, 0.5, 0.75, 1)]
        scale = {"tickvals": ticks, "ticktext": [f"{10**tick if is_log else tick:.3g}" for tick in ticks]}
        title = {"title": {"text": f"{name} ({unit})" if unit else name}}
        triangles = _triangles(points)
        surface = {"type": "mesh3d", "x": points[:, 0], "y": points[:, 1], "z": heights, "customdata": values}
        surface |= dict(zip("ijk", torch.from_numpy(triangles.simplices.astype(np.int64)).T, strict=True))
        surface |= {
            "intensity": heights,
            "colorscale": "Viridis",
            "colorbar": {**title, **scale, "y": 0.45, "len": 0.85},
        }
        surface["hovertemplate"] = f"x %{{x:.3g}}<br>y %{{y:.3g}}<br>{name} %{{customdata:.4g}}<extra></extra>"
        traces = [surface]

        def above(places: Tensor, lift: float) -> dict[str, Any]:
            on_it = _interpolated(triangles, heights, places) + lift * (high - low)
            return {"type": "scatter3d", "x": places[:, 0], "y": places[:, 1], "z": on_it}

        if self.networks:
            look = {"mode": "markers+text", "marker": {"size": 5, "color": _MARK}, "textposition": "top center"}
            look["textfont"] = {"color": "white", "size": 14}  # networks lie low, where surfaces are dark
            told = self.own[name].tolist() if name in self.own else [float("nan")] * len(self.networks)
            texts = {"text": list(self.networks), "hoverinfo": "text"}
            texts["hovertext"] = [f"{one}: {value:.4g}" for one, value in zip(self.networks, told, strict=True)]
            traces.append({**above(torch.stack(list(self.networks.values())), _LIFTS[0]), **look, **texts})
        if self.curve is not None:
            traces.append(
                {
                    **above(self.curve, _LIFTS[1]),
                    "mode": "lines",
                    "line": {"color": _MARK, "width": 6},
                    "hoverinfo": "skip",
                }
            )
        axes = {axis: {"title": {"text": "distance"}} for axis in ("xaxis", "yaxis")}
        ratio = {"x": 1.4, "y": 1.0, "z": 0.35}
        scene = {**axes, "zaxis": {"title": {"text": ""}, **scale}, "aspectmode": "manual", "aspectratio": ratio}
        scene["camera"] = {"eye": {"x": 0.15, "y": -1.1, "z": 1.75}, "center": {"x": 0, "y": -0.05, "z": -0.1}}
        return traces, {"scene": scene, "showlegend": False, "margin": {"l": 0, "r": 0, "t": 10, "b": 0}}

    # -- text and pictures

    def plot(self, *, quantity: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw one quantity with matplotlib, default the first; see `modeconn.plot.plane`."""
        return plot.plane(self, quantity=quantity, ax=ax)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = [name for name in self.values if name != "error"]
        header = ["", *self.networks, "min", "max"]
        rows = []
        for name in names:
            own = self.own.get(name)
            here = [float("nan")] * len(self.networks) if own is None else own.tolist()
            known = torch.cat([self.scattered(name)[1], torch.tensor(here, dtype=torch.float64, device="cpu")])
            finite = known[known.isfinite()]
            ends = (float(finite.min()), float(finite.max())) if len(finite) else (float("nan"),) * 2
            numbers = [*here, *ends]
            rows.append([name, *(self.quantity(name).form.format(number) for number in numbers)])
        return header, rows

    def __repr__(self) -> str:
        title = f"Plane({len(self.x)} x {len(self.y)} points, {self.num_examples} examples, {self.seconds:.1f} s)"
        return "\n".join([title, table(*self._table()), self.caption])

    def _repr_html_(self) -> str:
        return f"{html_table(*self._table())}<p>{html.escape(self.caption)}</p>"


def _triangles(points: Tensor) -> Any:
    """Return triangles between points ``(M, 2)``, as `scipy.spatial.Delaunay` has them."""
    from scipy.spatial import Delaunay

    return Delaunay(points.numpy())


def _interpolated(triangles: Any, values: Tensor, places: Tensor) -> Tensor:
    """Return values of the corners ``(M,)`` at places ``(N, 2)``, linear in each triangle; NaN beyond them."""
    from scipy.interpolate import LinearNDInterpolator

    return torch.from_numpy(np.asarray(LinearNDInterpolator(triangles, values.numpy())(places.numpy())))


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(one) for name, one in value.items()}
    return torch.tensor(numbers(value), dtype=torch.float64, device="cpu") if isinstance(value, list) else value
