"""Values of the networks of a plane: how they are measured, how far a plane goes, and where it is looked at nearer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeconn.measure.meter import Meter
from modeconn.measure.robustness import attacked
from modeconn.network.attack import Attack
from modeconn.network.batches import inputs_and_targets
from modeconn.tools.measurements import Records
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import reseed

Point = tuple[float, float]
_FLATTEST = 0.4
_MARGINS = (0.1, 0.2, 0.4, 0.8)  # by which a plane goes beyond what lies in it, as fractions of its width


class PlaneNetworks(Protocol):
    """One network that can be moved in a plane."""

    @property
    def statistics(self) -> str:
        """Which statistics norm layers have, empty for none."""
        ...

    def __call__(self, x: float, y: float) -> nn.Module:
        """Return the network at a point; the next call may change it."""
        ...


class OwnExamples:
    """The examples of a network, adversarial ones: batches that are attacked anew whenever they are read.

    Args:
        batches: Inputs in [0, 1] and targets, on the device of the networks.
        attack: What attacks them.
        seed: The same random numbers for every network; each batch has its own.
    """

    def __init__(self, batches: Iterable[Any], attack: Attack, seed: int) -> None:
        self._batches, self._attack, self._seed = batches, attack, seed
        self.model: nn.Module | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._batches):
            x, y = inputs_and_targets(batch)
            with torch.enable_grad():
                found = attacked(self._attack, self.model, x, y, self._seed + number, "the attack")
            yield found, y


class Measuring:
    """Values of networks by their coordinates, each measured once; processes share the work.

    Args:
        networks: What is measured.
        meter: A new one.
        data: What the meter reads, if it depends on the network.
        known: Finished measurements.
        key: Of a point's measurement, from its coordinates.
        device: Where random numbers are drawn, within a stretch of `modeconn.tools.rng.seeded`.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        networks: PlaneNetworks,
        meter: Meter,
        data: OwnExamples | None,
        known: Records,
        key: Callable[[Point], str],
        device: torch.device,
        *,
        progress: bool,
    ) -> None:
        self._networks, self._meter, self._data, self._known, self._key = networks, meter, data, known, key
        self._device, self._progress = device, progress
        self.num_examples = 0

    def of(self, points: Sequence[Point], what: str) -> list[dict[str, float]]:
        """Return the values of each point, by name of the quantity; those of the grid are told as ``what``."""
        bar = progress_bar(total=len(points), show=self._progress and len(points) > 1, desc=what, unit="network")
        with bar:
            tasks = [(self._key(point), lambda point=point: self._measured(point)) for point in points]
            self._known.measure(tasks, bar.update)
        found = [self._known.get(self._key(point), _values) for point in points]
        self.num_examples = self._known.get(self._key(points[0]), lambda record: int(record["examples"]))
        return found

    def _measured(self, point: Point) -> dict[str, Any]:
        reseed(0, self._device)  # what a network draws does not depend on which others are measured
        model = self._networks(*point)
        if self._data is not None:
            self._data.model = model
        self._meter.measure(model)
        found = self._meter.take()
        values = {"loss": float(found.loss[0])}
        if found.accuracy is not None:
            values |= {"accuracy": float(found.accuracy[0])}
        values |= {name: float(value[0]) for name, value in found.metrics.items()}
        return {"values": {name: _written(value) for name, value in values.items()}, "examples": found.num_examples}


def _written(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)  # NaN and infinities, as JSON of all readers has none


def _values(record: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in record["values"].items()}


@dataclass(frozen=True)
class Extent:
    """How far a plane goes.

    Args:
        x: From and to.
        y: From and to.
    """

    x: Point
    y: Point

    @classmethod
    def around(cls, points: Sequence[Point]) -> Extent:
        """Return the smallest that holds points."""
        columns, rows = zip(*points, strict=True)
        return cls((min(columns), max(columns)), (min(rows), max(rows)))

    def at_least(self, share: float) -> Extent:
        """Return the same with width and height at least such a share of each other, for the sake of the picture."""
        lengths = [last - first for first, last in (self.x, self.y)]
        more = [max(0.0, share * max(lengths) - length) / 2 for length in lengths]
        return Extent(*((first - add, last + add) for (first, last), add in zip((self.x, self.y), more, strict=True)))

    def grid(self, num_points: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return evenly spaced coordinates of columns and rows."""
        return tuple(  # type: ignore[return-value]
            torch.linspace(*ends, count, dtype=torch.float64, device="cpu")
            for ends, count in zip((self.x, self.y), num_points, strict=True)
        )


def chosen_extent(held: Extent, span: float, measuring: Measuring, limit: float | None) -> Extent:
    """Return how far a plane goes beyond what it has to hold: on each side until the loss exceeds a limit.

    The loss is looked at in the middle of each side, at four distances at most.

    Args:
        held: What it has to hold.
        span: The length that margins are fractions of.
        measuring: Tells the loss.
        limit: The loss; None for a margin of a fifth on each side.
    """
    (left, right), (bottom, top) = held.x, held.y
    middle = ((left + right) / 2, (bottom + top) / 2)
    sides = {
        "left": lambda m: (left - m * span, middle[1]),
        "right": lambda m: (right + m * span, middle[1]),
        "bottom": lambda m: (middle[0], bottom - m * span),
        "top": lambda m: (middle[0], top + m * span),
    }
    if limit is None:
        margins = dict.fromkeys(sides, _MARGINS[1])
    else:
        margins = dict.fromkeys(sides, _MARGINS[-1])
    waiting = list(sides) if limit is not None else []
    for margin in _MARGINS:
        found = measuring.of([sides[side](margin) for side in waiting], "extent") if waiting else []
        for side, values in zip(list(waiting), found, strict=True):
            if not values["loss"] <= limit:
                margins[side] = margin
                waiting.remove(side)
    return Extent(
        (sides["left"](margins["left"])[0], sides["right"](margins["right"])[0]),
        (sides["bottom"](margins["bottom"])[1], sides["top"](margins["top"])[1]),
    ).at_least(_FLATTEST)


def cells_on(curve: Tensor, x: Tensor, y: Tensor, rounds: int) -> list[Point]:
    """Return points that divide the cells of a grid that a curve passes, in halves and again, as often as ``rounds``.

    Args:
        curve: Points ``(N, 2)``, close to each other.
        x: Coordinates of the columns.
        y: Coordinates of the rows.
        rounds: How often.
    """
    finest = 2**rounds
    origin, steps = (float(x[0]), float(y[0])), (float(x[1] - x[0]), float(y[1] - y[0]))
    places = torch.stack([(curve[:, k] - origin[k]) / steps[k] for k in (0, 1)], 1)
    found: dict[tuple[int, int], None] = {}
    for level in range(rounds):
        size = finest >> level  # of a cell, in steps of the finest grid
        passed = {(int(column), int(row)) for column, row in (places * 2**level).floor().tolist()}
        for column, row in sorted(passed):
            if 0 <= column < (len(x) - 1) << level and 0 <= row < (len(y) - 1) << level:
                for i in (0, 1, 2):
                    for j in (0, 1, 2):
                        found[column * size + i * size // 2, row * size + j * size // 2] = None
    new = [place for place in found if place[0] % finest or place[1] % finest]
    return [(origin[0] + i / finest * steps[0], origin[1] + j / finest * steps[1]) for i, j in new]


def together(found: Sequence[Mapping[str, float]], shape: Sequence[int]) -> dict[str, Tensor]:
    """Return values of points by name of the quantity, each in a shape; where there is accuracy, with the error."""
    values = {
        name: torch.tensor([one[name] for one in found], dtype=torch.float64, device="cpu").reshape(*shape)
        for name in found[0]
    }
    if "accuracy" in values:
        first = {name: values.pop(name) for name in ("loss", "accuracy")}
        values = {**first, "error": 1 - first["accuracy"], **values}
    return values
