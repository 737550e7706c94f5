"""Results along a curve: values at positions, and all that can be said, written and drawn of any such values."""

from __future__ import annotations

import dataclasses
import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from modeconn import plot
from modeconn.tools import provenance
from modeconn.tools.checks import there_are
from modeconn.tools.door import check, looked_at, shortened
from modeconn.tools.json_files import KIND, JsonFile, from_json, numbers, taken_as, to_json
from modeconn.tools.register import register
from modeconn.tools.table import csv_table, html_table, table
from modeconn.tools.writing import write_arrays, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Quantity:
    """How a quantity is written, and which way it gets worse.

    Args:
        form: As for `str.format`.
        higher_is_better: Whether high values are good; None where nobody knows, so that there is no barrier.
        unit: What its numbers are, for the axis of a figure; "%" if they are fractions that figures show in percent.
    """

    form: str = "{:.4f}"
    higher_is_better: bool | None = None
    unit: str = ""


class AlongCurve(JsonFile):
    r"""Values along a curve, by name: barrier, summary, table, files and figure of any kind of result.

    This class does for values of any origin. A kind of result with names of its own is a subclass, best a frozen
    dataclass: it has ``t`` and ``values``, and where it knows them ``own``, ``arc_length``, ``num_examples`` and
    ``seconds``, as fields or properties; `quantity` says how a value is written. Its fields go through JSON if they are
    tensors, mappings of tensors, or plain; others it turns in `_record` and back in `_restored`.

    Args:
        t: Positions, rising, float64 ``(N,)``.
        values: By name, float64 ``(N,)`` each.
        own: Values of both ends with the statistics they came with, by name, ``(2,)`` each; a name may be missing.
        arc_length: Length of the curve from 0 to each position, ``(N,)``, in the norm of weight space; None if unknown.
        num_examples: How many examples were measured at each point.
        seconds: How long that took.
        higher_is_better: By name, whether high values are good; a quantity left out has no barrier.

    Raises:
        ValueError: If positions do not rise, or there are not as many values.

    Example:
        >>> found = AlongCurve(torch.tensor([0.0, 0.5, 1.0]), {"sharpness": torch.tensor([1.0, 3.0, 2.0])})
        >>> found.summary()["sharpness"]["max"]
        3.0
    """

    kinds: ClassVar[dict[str, type[AlongCurve]]] = {}
    """Every kind of result by the name that files give it."""

    own: Mapping[str, Tensor] = {}
    arc_length: Tensor | None = None
    num_examples: int = 0
    seconds: float = 0.0
    higher_is_better: Mapping[str, bool] = {}
    made_by: ClassVar[Mapping[str, Any] | None] = None
    """How the result came about: call or command, versions, data."""

    statistics: str = ""
    """With which statistics of norm layers networks were measured; empty for networks that have none."""

    @looked_at
    def __init__(
        self,
        t: Tensor,
        values: Mapping[str, Tensor],
        *,
        own: Mapping[str, Tensor] | None = None,
        arc_length: Tensor | None = None,
        num_examples: int = 0,
        seconds: float = 0.0,
        higher_is_better: Mapping[str, bool] | None = None,
    ) -> None:
        for name, value in values.items():
            check(f"values[{name!r}]", value, Tensor)
        self.t, self.values, self.own = t.double(), {name: value.double() for name, value in values.items()}, own or {}
        self.arc_length, self.num_examples, self.seconds = arc_length, num_examples, seconds
        self.higher_is_better = dict(higher_is_better or {})
        self._check()

    def _check(self) -> None:
        """Raise unless positions and values belong together."""
        if self.t.ndim != 1 or not len(self.t) or not bool((self.t.diff() > 0).all() and self.t.isfinite().all()):
            raise ValueError(f"t must hold rising positions, got t={self.t.tolist()}.")
        for name, value in self.values.items():
            if value.shape != self.t.shape:
                raise ValueError(
                    f"{name!r} must have one value for each of {len(self.t)} positions, got a shape of "
                    f"{tuple(value.shape)}."
                )
        lengths = self.arc_length
        if lengths is not None and not (isinstance(lengths, Tensor) and lengths.shape == self.t.shape):
            raise ValueError(f"arc_length must have one value for each position, got {shortened(lengths, 60)}.")
        if not self.values or "t" in self.values:
            raise ValueError(f"values must hold one quantity or more, none named 't', got {list(self.values)}.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(AlongCurve.kinds, cls.__name__, cls)

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is written, and which way it gets worse."""
        return Quantity(higher_is_better=self.higher_is_better.get(name))

    # -- numbers

    def barrier_of(self, name: str) -> float:
        r"""Return how much worse the worst point is than the straight line between the values of both ends.

        .. math:: \max_t \; v(t) - [(1-t) v(0) + t v(1)]

        in the unit of the quantity, with the sign changed where high values are good; 0 or more, since the ends count.
        NaN unless both ends were measured and it is known which way is worse.

        Raises:
            ValueError: If there is no such quantity.
        """
        if not isinstance(name, str) or name not in self.values:
            raise ValueError(f"there is no {name!r} here; {there_are(map(repr, self.values))}.")
        better = self.quantity(name).higher_is_better
        if better is None:
            return math.nan
        values, between = self.values[name], self.between_ends(self.values[name])
        return float((between - values if better else values - between).max())

    def between_ends(self, values: Tensor) -> Tensor:
        """Return the straight line between the first and the last of ``values (N,)``; NaN unless these are the ends."""
        if self.t[0] != 0 or self.t[-1] != 1:
            return torch.full_like(values, torch.nan)
        return (1 - self.t) * values[0] + self.t * values[-1]

    def mean(self, values: Tensor) -> float:
        """Return the mean of ``values (N,)`` over t, by trapezoids: the expectation that fitting minimises."""
        return _mean(values, self.t)

    def arc_mean(self, values: Tensor) -> float:
        """Return the mean of ``values (N,)`` over arc length, by trapezoids, as Tatro et al. (2020) report it.

        A curve without length is one network: its mean over t. NaN where the length is not known.
        """
        if self.arc_length is None:
            return math.nan
        has_length = float(self.arc_length[-1]) > float(self.arc_length[0])
        return _mean(values, self.arc_length if has_length else self.t)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return minimum, maximum, mean over t and mean over arc length of every quantity, by name."""
        return {
            name: {
                "min": float(value.min()),
                "max": float(value.max()),
                "mean": self.mean(value),
                "arc_mean": self.arc_mean(value),
            }
            for name, value in self.values.items()
        }

    # -- files

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything and, for readers, barriers and summary as JSON; also write it to ``path`` if given."""
        record = {KIND: type(self).__name__, **self._record(), **self._for_readers(), **provenance.entry(self)}
        return to_json(record, path)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Invert `to_json`; `AlongCurve.from_json` reads every kind of result.

        Raises:
            ValueError: If the text is no such result.
        """
        record = from_json(text, cls.__name__)
        kind = record.get(KIND, cls.__name__)  # files of older versions do not say it
        if kind != cls.__name__ and str(kind) not in AlongCurve.kinds:
            raise ValueError(
                f"this is of the kind {shortened(kind, 60)}, which is no result along a curve, or one whose "
                f"class nobody imported: import it first."
            )
        found = cls if kind == cls.__name__ else AlongCurve.kinds[kind]
        if not issubclass(found, cls):
            raise ValueError(f"this is a {shortened(kind, 60)}, not a {cls.__name__}.")
        with taken_as(found.__name__):
            result = found._restored(record)
            result._check()
            repr(result)  # a result that cannot be shown holds something else than was written
        provenance.keep(result, record.get(provenance.ATTRIBUTE))
        return result

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one row for each point, as comma-separated values; also write it to ``path`` if given."""
        length = {} if self.arc_length is None else {"arc_length": self.arc_length}
        columns = {"t": self.t, **length, **self.values}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return write_text(csv_table(columns, rows), path)

    def to_npz(self, path: str | os.PathLike[str]) -> None:
        """Write positions, every quantity and own ends for `numpy.load`.

        There are "t", ``(N,)``, and "arc_length", ``(N,)``, where the length is known; "values/loss", ``(N,)``, and so
        on, by the names of ``values``; "own/loss", ``(2,)``, and so on for both ends with the statistics they came
        with; of a `RobustProfile` also "values/ROW low" and "values/ROW high", the ends of the intervals.
        """
        length = {} if self.arc_length is None else {"arc_length": self.arc_length}
        values = {f"values/{name}": value for name, value in self._arrays().items()}
        write_arrays({"t": self.t, **length, **values, **{f"own/{n}": value for n, value in self.own.items()}}, path)

    def _arrays(self) -> Mapping[str, Tensor]:
        """Return what has a value at each position, by name."""
        return self.values

    def _record(self) -> dict[str, Any]:
        """Return what `_restored` makes the result from again, as JSON can hold it."""
        return {name: getattr(self, name) for name in self._field_names()}

    @classmethod
    def _restored(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{name: _from_plain(record[name]) for name in cls._field_names() if name in record})

    @classmethod
    def _field_names(cls) -> list[str]:
        if dataclasses.is_dataclass(cls):
            return [field.name for field in dataclasses.fields(cls)]
        return ["t", "values", "own", "arc_length", "num_examples", "seconds", "higher_is_better"]

    def _for_readers(self) -> dict[str, Any]:
        return {"barriers": {name: self.barrier_of(name) for name in self.values}, "summary": self.summary()}

    # -- text and pictures

    def plot(self, *, quantity: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw one quantity along the curve with matplotlib, default the first; see `modeconn.plot.profile`."""
        return plot.profile(self, quantity=next(iter(self.values)) if quantity is None else quantity, ax=ax)

    def __repr__(self) -> str:
        return "\n".join([self._title(), table(*self._table()), *self._remarks()])

    def _repr_html_(self) -> str:
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<p>{self._extent()}</p>{html_table(*self._table())}{remarks}"

    def _title(self) -> str:
        return f"{type(self).__name__}({self._extent()})"

    def _extent(self) -> str:
        points = f"{len(self.t)} point{'s' * (len(self.t) != 1)}"
        return f"{points}, {self.num_examples} examples, {self.seconds:.1f} s"

    def _remarks(self) -> list[str]:
        """Return sentences for below the table."""
        own = "; own: as they came" if self.own else ""
        return [f"statistics: {self.statistics}{own}"] if self.statistics else []

    def _shown(self) -> list[str]:
        """Return the quantities that have a row in the table."""
        return list(self.values)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: values at the first and last position, own ends, extremes, means, barrier.

        Of one network there is its value alone.
        """
        are_several = len(self.t) > 1
        places = (0, -1) if are_several else (0,)
        own = ["own t=0", "own t=1"] if self.own else []
        about = ["min", "max", "mean", "arc mean", "barrier"] if are_several else []
        is_of_curve = are_several or self.arc_length is not None
        header = ["", *(f"t={self.t[place]:g}" if is_of_curve else "value" for place in places), *own, *about]
        rows = []
        for name in self._shown():
            ends = [float(self.values[name][place]) for place in places]
            came_with = self.own[name].tolist() if name in self.own else [math.nan] * len(own)
            numbers = [*ends, *came_with, *([*self.summary()[name].values(), self.barrier_of(name)] if about else [])]
            form = self.quantity(name).form
            rows.append([name, *("" if math.isnan(number) else form.format(number) for number in numbers)])
        return header, rows


def _mean(values: Tensor, along: Tensor) -> float:
    return float(torch.trapezoid(values, along) / (along[-1] - along[0])) if len(along) > 1 else float(values[0])


AlongCurve.kinds["AlongCurve"] = AlongCurve


def _from_plain(value: Any) -> Any:
    """Invert `to_plain`, for tensors and mappings of tensors."""
    if isinstance(value, dict):
        return {name: _from_plain(one) for name, one in value.items()}
    return torch.tensor(numbers(value), dtype=torch.float64, device="cpu") if isinstance(value, list) else value


def chosen_positions(t: Sequence[float] | None, num_points: int) -> list[float]:
    """Return the positions to look at: those given, or evenly spaced ones.

    Args:
        t: Positions in [0, 1], rising; None for ``num_points`` evenly spaced ones, both ends included.
        num_points: How many, at least 2, also where ``t`` says it.

    Raises:
        ValueError: If those given do not rise, or there are fewer than both ends.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, to hold both ends, got num_points={num_points}.")
    if t is None:
        return torch.linspace(0, 1, num_points, dtype=torch.float64, device="cpu").tolist()
    chosen = [float(position) for position in t]
    if not chosen or any(not 0 <= position <= 1 for position in chosen) or chosen != sorted(set(chosen)):
        raise ValueError(f"t must hold rising positions in [0, 1], got t={chosen}.")
    return chosen
