"""What attacks leave of the networks along a curve."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modeconn import plot
from modeconn.measure.along import AlongCurve, Quantity
from modeconn.tools.door import shortened
from modeconn.tools.table import csv_table
from modeconn.tools.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAN, WORST = "clean", "worst"

_DEVIATES = 1.959964  # the quantile of a normal distribution for two-sided 95% intervals
_STANDARD_ERRORS = 2.0
_STRENGTHS = ("eps", "max_epsilon", "steps", "num_steps", "num_iter_set", "n_queries", "num_restarts", "n_restarts")
# Step sizes scale with eps, so they may differ between attacks that are compared for strength.
_FREE = ("step_size", "alpha")


@dataclass(frozen=True, eq=False, repr=False)
class RobustProfile(AlongCurve):
    r"""Right answers and losses of every example along a curve, clean and under each attack.

    Dicts by row have the row "clean", one for each attack, and "worst": an example counts as right if the network is
    right on it and on all its adversarial examples; its loss is the largest.

    An attack that stops at the first wrong answer (APGD, FAB, Square, AutoAttack) leaves other examples as they were,
    so its loss is only a lower bound; PGD goes on.

    Args:
        t: Positions, rising, float64 ``(N,)``.
        correct: By row but "worst", whether each example is answered right, bool ``(N, M)``, M examples.
        losses: By row but "worst", the loss of each example, float32 ``(N, M)``.
        attacks: By attack its "settings", "kind", "eps", "norm" and whether it is a "black_box", None if in part.
        data: A digest of the examples.
        transfer: By attack the accuracy at each t (column) on adversarial examples made at each t (row), ``(N, N)``;
            None if it was not measured.
        seconds: How long all that took.
        statistics: With which statistics of norm layers networks were measured; empty for networks that have none.
        weights: How much the loss of each example counts in the mean, float32 ``(M,)``, as a loss with class weights
            says; None for all alike.

    Example:
        >>> t, right = torch.tensor([0.0, 1.0]), torch.ones(2, 100, dtype=torch.bool)
        >>> profile = RobustProfile(t, {"clean": right}, {"clean": torch.zeros(2, 100)})
        >>> [round(bound, 3) for bound in profile.interval["clean"][0].tolist()]
        [0.963, 1.0]
    """

    t: Tensor
    correct: Mapping[str, Tensor]
    losses: Mapping[str, Tensor]
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str = ""
    transfer: Mapping[str, Tensor] | None = None
    seconds: float = 0.0
    statistics: str = ""
    weights: Tensor | None = None

    @property
    def num_examples(self) -> int:
        """How many examples were attacked at each point."""
        return self.correct[CLEAN].shape[1]

    @property
    def values(self) -> dict[str, Tensor]:
        """Accuracies and losses as "clean accuracy", "clean loss" and so on for every row, ``(N,)`` each."""
        found = {f"{row} accuracy": accuracy for row, accuracy in self.accuracy.items()}
        return found | {f"{row} loss": loss for row, loss in self.loss.items()}

    def quantity(self, name: str) -> Quantity:
        """Return how a quantity is written, and which way it gets worse."""
        if name.endswith(" accuracy"):
            return Quantity("{:.2%}", higher_is_better=True, unit="%")
        return Quantity("{:.4f}", higher_is_better=False, unit="mean per example")

    @cached_property
    def accuracy(self) -> dict[str, Tensor]:
        """Fraction of right answers by row, float64 ``(N,)``."""
        return {row: right.double().mean(1) for row, right in self._correct().items()}

    @cached_property
    def loss(self) -> dict[str, Tensor]:
        """Mean loss by row, float64 ``(N,)``."""
        worst = torch.stack(list(self.losses.values())).amax(0)
        weights = worst.new_ones(self.num_examples) if self.weights is None else self.weights
        share = weights.double() / weights.double().sum()
        return {row: losses.double() @ share for row, losses in {**self.losses, WORST: worst}.items()}

    @cached_property
    def interval(self) -> dict[str, Tensor]:
        """95% intervals of the accuracy by row, ``(N, 2)``: Wilson's, of a binomial distribution over examples."""
        return {row: _wilson(accuracy, self.num_examples) for row, accuracy in self.accuracy.items()}

    @property
    def barrier(self) -> dict[str, float]:
        """The barrier of the loss by row, see `Profile.barrier`; NaN unless both ends were measured."""
        return {row: self.barrier_of(f"{row} loss") for row in self.loss}

    @property
    def accuracy_drop(self) -> dict[str, float]:
        """The barrier of the accuracy by row, see `Profile.accuracy_drop`; NaN unless both ends were measured."""
        return {row: self.barrier_of(f"{row} accuracy") for row in self.accuracy}

    def best_t(self, row: str = WORST) -> float:
        """Return the position of the highest accuracy, of equal ones that of the lowest loss.

        What it reaches there is too high an estimate: report it on other examples, see `chosen_by`.

        Raises:
            ValueError: If there is no such row.
        """
        self._check_row(row)
        return min(
            zip(self.t.tolist(), self.accuracy[row].tolist(), self.loss[row].tolist(), strict=True),
            key=lambda point: (-point[1], point[2]),
        )[0]

    def chosen_by(self, validation: RobustProfile, row: str = WORST) -> RobustProfile:
        """Return this profile at the one point that is the best of a profile on other examples.

        Args:
            validation: The same attacks on the networks along the same curve, on a validation set.
            row: What the point is to be best in.

        Raises:
            ValueError: If both have the same examples, the attacks differ, or this one does not hold the point.
        """
        if validation.data == self.data:
            raise ValueError(
                "a point must be chosen on other examples than it is reported on; both profiles have the same."
            )
        for name in sorted(self.attacks.keys() | validation.attacks.keys() if row == WORST else {row} - {CLEAN}):
            if self.attacks.get(name) != validation.attacks.get(name):
                raise ValueError(
                    f"a point must be chosen under the attacks that it is reported under, but {name!r} differs: "
                    f"{_described(validation.attacks.get(name))} there, {_described(self.attacks.get(name))} here."
                )
        best = validation.best_t(row)
        place = (self.t == best).nonzero().flatten()
        if not len(place):
            raise ValueError(f"the best point is t={best:g}, which was not measured here. Pass t=[{best!r}].")
        one = {
            name: {row: values[place] for row, values in getattr(self, name).items()} for name in ("correct", "losses")
        }
        return replace(self, t=self.t[place], correct=one["correct"], losses=one["losses"], transfer=None)

    @property
    def warnings(self) -> list[str]:
        """What speaks against the attacks, each doubt a sentence; empty is no proof that they are strong.

        An attack that leaves more right answers than another with a smaller ball or fewer steps, but otherwise the same
        settings, is weak, and so is one that leaves more than clean examples do. A black-box attack that leaves fewer
        than all attacks by gradients in its ball or a larger one together is a sign of masked gradients. At one point a
        difference counts from 2 paired standard errors on; at several, from so many that chance makes one of them as
        likely. A ball in the norm "linf" of radius 1 or more holds every image.
        """
        pairs = [(one, other) for one in self.attacks for other in self.attacks]
        found = [self._weakness(one, other) for one, other in pairs if _is_stronger(*self._facts(one, other))]
        found += [self._weakness(one, CLEAN) for one in self.attacks]
        found += [
            f"{row} may reach every image: eps={facts['eps']:g} in the norm linf, of pixels in [0, 1]. Was it meant "
            f"in units of 1/255?"
            for row, facts in self.attacks.items()
            if facts["norm"] == "linf" and (facts["eps"] or 0) >= 1
        ]
        for black in (row for row, facts in self.attacks.items() if facts["black_box"]):
            rivals = [row for row in self.attacks if _is_white_box_for(*self._facts(row, black))]
            found += [self._masking(black, rivals)] if rivals else []
        return [doubt for doubt in found if doubt is not None]

    def _facts(self, *rows: str) -> list[Mapping[str, Any]]:
        return [self.attacks[row] for row in rows]

    def _weakness(self, strong: str, weak: str) -> str | None:
        place = self._significant(self.correct[strong], self.correct[weak])
        if place is None:
            return None
        more, fewer = (self.accuracy[row][place] for row in (strong, weak))
        return (
            f"{strong} is a weak attack: at t={self.t[place]:g} it leaves {more:.2%} right, "
            f"{weak}, with less to spend, {fewer:.2%}."
        )

    def _masking(self, black: str, rivals: list[str]) -> str | None:
        together = torch.stack([self.correct[row] for row in rivals]).all(0)
        place = self._significant(together, self.correct[black])
        if place is None:
            return None
        more, fewer = together[place].double().mean(), self.accuracy[black][place]
        return (
            f"gradients may be masked: at t={self.t[place]:g} {black}, which sees none, leaves {fewer:.2%} right, "
            f"{' and '.join(rivals)} {more:.2%}."
        )

    def _record(self) -> dict[str, Any]:
        """What belongs to single examples is written in base64, right answers as bits."""
        return {
            "t": self.t,
            "num_examples": self.num_examples,
            "attacks": self.attacks,
            "data": self.data,
            "transfer": self.transfer,
            "seconds": self.seconds,
            "statistics": self.statistics,
            "correct": {row: pack_bits(right) for row, right in self.correct.items()},
            "losses": {row: pack_floats(losses) for row, losses in self.losses.items()},
            "weights": None if self.weights is None else pack_floats(self.weights),
        }

    @classmethod
    def _restored(cls, record: Mapping[str, Any]) -> RobustProfile:
        t, transfer = torch.tensor(record["t"], dtype=torch.float64, device="cpu"), record["transfer"]
        shape = (len(t), record["num_examples"])
        if transfer is not None:
            transfer = {row: torch.tensor(cells, dtype=torch.float64, device="cpu") for row, cells in transfer.items()}
        return cls(
            t,
            {row: unpack_bits(bits, shape) for row, bits in record["correct"].items()},
            {row: unpack_floats(floats, shape) for row, floats in record["losses"].items()},
            record["attacks"],
            record["data"],
            transfer,
            record["seconds"],
            record.get("statistics", ""),
            None if record.get("weights") is None else unpack_floats(record["weights"], shape[1:]),
        )

    def _check(self) -> None:
        super()._check()
        shapes = {tuple(one.shape) for rows in (self.correct, self.losses) for one in rows.values()}
        rows = self.correct.keys()
        if len(shapes) != 1 or rows != self.losses.keys() or not {CLEAN, *self.attacks} <= rows:
            raise ValueError(
                f"each row must say of each example at each point whether it is answered right, and its loss, got rows "
                f"{list(self.correct)} and {list(self.losses)} of shapes {sorted(shapes)}."
            )

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line for each point and row, as comma-separated values; also write it to ``path`` if given."""
        rows = [
            [t, row, *map(float, (self.loss[row][place], self.accuracy[row][place], *self.interval[row][place]))]
            for place, t in enumerate(self.t.tolist())
            for row in self.accuracy
        ]
        return write_text(csv_table(["t", "attack", "loss", "accuracy", "low", "high"], rows), path)

    def _arrays(self) -> Mapping[str, Tensor]:
        """Return what has a value at each position, by name, with the ends of intervals."""
        ends = ({f"{row} low": bounds[:, 0], f"{row} high": bounds[:, 1]} for row, bounds in self.interval.items())
        return {**self.values} | {name: value for pair in ends for name, value in pair.items()}

    def plot(self, *, quantity: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw accuracy, "loss" or "error" by row with matplotlib; see `modeconn.plot.robust_profile`."""
        return plot.robust_profile(self, quantity=quantity or "accuracy", ax=ax)

    def _remarks(self) -> list[str]:
        attacks = [f"{row}: {_in_short(facts)}" for row, facts in self.attacks.items()]
        return [*super()._remarks(), *attacks, *(f"warning: {sentence}" for sentence in self.warnings)]

    def _for_readers(self) -> dict[str, Any]:
        return {"summary": self._summary(), "warnings": self.warnings}

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header, and a row of accuracies and one of losses for each row of results."""
        if len(self.t) == 1:
            return self._table_of_one_point()
        ends = (f"t={self.t[place]:g}" for place in (0, -1))
        header = ["", *ends, "worst point", "95% interval", "at t", "mean", "barrier"]
        rows = []
        for row, accuracy in self.accuracy.items():
            place = int(accuracy.argmin())
            low, high = self.interval[row][place].tolist()
            where = [f"{low:.2%} to {high:.2%}", f"{self.t[place]:g}"]
            rows.append(self._row(f"{row} accuracy", accuracy, place, where, self.accuracy_drop[row], "{:.2%}"))
        for row, loss in self.loss.items():
            place = int(loss.argmax())
            where = ["", f"{self.t[place]:g}"]
            rows.append(self._row(f"{row} loss", loss, place, where, self.barrier[row], "{:.4f}"))
        return header, rows

    def _table_of_one_point(self) -> tuple[list[str], list[list[str]]]:
        accuracies = [
            [f"{row} accuracy", f"{float(accuracy):.2%}", "{:.2%} to {:.2%}".format(*self.interval[row][0].tolist())]
            for row, accuracy in self.accuracy.items()
        ]
        losses = [[f"{row} loss", f"{float(loss):.4f}", ""] for row, loss in self.loss.items()]
        return ["", f"t={self.t[0]:g}", "95% interval"], accuracies + losses

    def _row(self, name: str, values: Tensor, place: int, where: list[str], barrier: float, form: str) -> list[str]:
        ends = (form.format(float(values[place])) for place in (0, -1, place))
        return [
            name,
            *ends,
            *where,
            form.format(self.mean(values)),
            "" if math.isnan(barrier) else form.format(barrier),
        ]

    def _summary(self) -> dict[str, dict[str, Any]]:
        return {
            row: {
                "accuracy": self.accuracy[row].tolist(),
                "interval": self.interval[row].tolist(),
                "loss": self.loss[row].tolist(),
                "barrier": self.barrier[row],
                "accuracy_drop": self.accuracy_drop[row],
            }
            for row in self.accuracy
        }

    def _correct(self) -> dict[str, Tensor]:
        return {**self.correct, WORST: torch.stack(list(self.correct.values())).all(0)}

    def _significant(self, more: Tensor, fewer: Tensor) -> int | None:
        """Return where ``more (N, M)`` is above ``fewer`` by most standard errors, if by enough of them."""
        difference = more.double() - fewer.double()
        mean = difference.mean(1)
        errors = mean / (difference.std(1) / self.num_examples**0.5).clamp(min=torch.finfo(torch.float64).tiny)
        place = int(errors.nan_to_num(0).argmax())  # one example has no standard deviation, so NaN
        by_chance = NormalDist().cdf(-_STANDARD_ERRORS) / len(errors)
        return place if errors[place] > -NormalDist().inv_cdf(by_chance) else None

    def _check_row(self, row: str) -> None:
        if row not in self.accuracy:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(self.accuracy)}.")


def _in_short(facts: Mapping[str, Any]) -> str:
    """Return what an attack is and how much it may spend, for below a table."""
    if not isinstance(facts["eps"], int | float):  # of a user's own attack it may be anything
        settings = ", ".join(f"{name}={value}" for name, value in facts["settings"].items())
        return shortened(f"{facts['kind']}({settings})" if settings else facts["kind"], 200)
    units = 255 * facts["eps"]
    is_of_pixels = facts["norm"] == "linf" and 1 <= round(units) <= 64 and abs(units - round(units)) < 1e-6
    pixels = f" ({units:.0f}/255)" if is_of_pixels else ""
    spent = [
        f"{name}={value}" if isinstance(value, int) else f"{name}={value:.4g}"
        for name, value in facts["settings"].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "eps"
    ]
    ball = [*[f"norm {facts['norm']}"] * (facts["norm"] is not None), f"eps={facts['eps']:.4g}{pixels}"]
    return shortened(", ".join([facts["kind"], *ball, *spent]), 200)


def _described(facts: Mapping[str, Any] | None) -> str:
    return "none" if facts is None else f"{facts['kind']} {facts['settings']}"


def _wilson(share: Tensor, count: int) -> Tensor:
    spread = _DEVIATES**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _DEVIATES / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)).sqrt()
    return torch.stack([centre - half, centre + half], 1).clamp(0, 1)


def _is_stronger(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two attacks differ only in what the first has more of."""
    ours, theirs = one["settings"], other["settings"]
    if one["kind"] != other["kind"] or ours.keys() != theirs.keys():
        return False
    differing = {name for name in ours if ours[name] != theirs[name]}
    strengths = {name for name in differing if name.rpartition(".")[2] in _STRENGTHS}
    others = {name for name in differing - strengths if name.rpartition(".")[2] not in _FREE}
    return bool(strengths) and not others and all(ours[name] > theirs[name] for name in strengths)


def _is_white_box_for(one: Mapping[str, Any], black: Mapping[str, Any]) -> bool:
    """Whether an attack has nothing but gradients, and may go at least as far as a black-box one."""
    if one["black_box"] is not False or None in (one["eps"], black["eps"]):
        return False
    return bool(one["norm"] == black["norm"] and one["eps"] >= black["eps"])


def pack_bits(right: Tensor) -> str:
    """Return bools of any shape as base64, eight to a byte."""
    return base64.b64encode(np.packbits(right.cpu().numpy()).tobytes()).decode()


def unpack_bits(text: str, shape: tuple[int, ...]) -> Tensor:
    """Invert `pack_bits`."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    count = math.prod(shape)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes hold no {count} bits")
    bits = np.unpackbits(packed, count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def pack_floats(values: Tensor) -> str:
    """Return values as base64 of little-endian float32."""
    return base64.b64encode(values.cpu().numpy().astype("<f4").tobytes()).decode()


def unpack_floats(text: str, shape: tuple[int, ...]) -> Tensor:
    """Invert `pack_floats`."""
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    ).reshape(shape)
