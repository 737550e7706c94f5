"""Many ways to match on the same pairs of networks, in one table."""

from __future__ import annotations

import html
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from modeconn import plot
from modeconn.connection import Connection
from modeconn.curves import Bezier, Curve
from modeconn.fit import fit_curve
from modeconn.matching import Match, Method, match_units
from modeconn.matching.alignment import Symmetry, find_spec
from modeconn.matching.method import check_method
from modeconn.measure.meter import Meter, fetch
from modeconn.measure.metrics import TemperedLoss
from modeconn.measure.profile import Profile
from modeconn.network.batch_norm import norm_layers
from modeconn.network.batches import check_loader, first_batch, inputs_and_targets, num_examples, run, tensors_of
from modeconn.network.copies import copy_of
from modeconn.network.ensemble import Ensemble
from modeconn.network.loss import Forward, LossFn, TrainingData, cross_entropy
from modeconn.network.recipe import Recipe
from modeconn.network.scores import IGNORED, axis_of_classes, setting_of
from modeconn.network.shares import check_whole
from modeconn.network.weights import WeightSpace, device_of, load_buffers
from modeconn.symmetry import PermutationSpec
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.tools import provenance
from modeconn.tools.door import checked, shortened
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.json_files import KIND, JsonFile, from_json, numbers, taken_as, to_json
from modeconn.tools.measurements import Records
from modeconn.tools.measurements import key as record_key
from modeconn.tools.memory import peak_memory
from modeconn.tools.processes import joined, shared
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded
from modeconn.tools.table import csv_table, html_table, table
from modeconn.tools.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES = ("identity", "random")
"""The rows that are always there."""
REFERENCES = ("random direction", "ensemble")
"""The rows of ``references=True``, which match nothing."""

_QUADRATIC = Bezier(2)
_Record = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(JsonFile):
    r"""What each method made of each pair of networks.

    Columns are "line", "repaired" and "curve", the barrier of the loss (see `Profile.barrier`) on the straight line as
    it is, on the straight line repaired, and on a fitted curve; the same with " accuracy lost" for
    `Profile.accuracy_drop`, a fraction; "length" and "curve length" in weight space, in the Euclidean norm; "seconds"
    and "peak bytes" of the matching alone, "curve seconds" of the fit. "Tempered" is the barrier of the straight line
    if each network on it has its best temperature, see `modeconn.metrics.TemperedLoss`. Columns that were not measured
    are absent.

    Args:
        values: By row and column one value for each pair; rows are "identity", "random", the methods and the
            references, see `compare`. What a reference does not have is NaN.
        num_points: At how many points of each connection the barriers were measured.
        num_examples: On how many examples.
        statistics: What the line had in layers that keep running statistics, as batch norm does: "interpolated"; empty
            for networks without such layers. None where that is not known, as of files of older versions.

    Example:
        >>> halved = {"identity": {"line": [1.0, 2.0, 3.0]}, "weights": {"line": [0.5, 1.0, 1.5]}}
        >>> Comparison(halved, num_points=25, num_examples=500).ratio("weights")
        (0.5, 0.5, 0.5)
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    values: dict[str, dict[str, list[float]]]
    num_points: int
    num_examples: int
    statistics: str | None = None

    @property
    def num_pairs(self) -> int:
        """How many pairs of networks were compared."""
        return len(self.values[BASELINES[0]]["line"])

    @property
    def columns(self) -> list[str]:
        """What was measured."""
        return list(self.values[BASELINES[0]])

    @property
    def headline(self) -> str:
        """The column that says most of the line: "repaired" where running statistics spoil the other, else "line"."""
        return "repaired" if self.statistics and "repaired" in self.columns else "line"

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return mean, median and maximum over pairs by row and column, of two pairs or more with "std" and "sem".

        "std" is the standard deviation over pairs (with n - 1), "sem" the standard error of the mean: "std" over the
        root of the number of pairs. One pair tells nothing of either, so it has neither.
        """
        return {
            row: {column: _moments(cells) for column, cells in columns.items()} for row, columns in self.values.items()
        }

    def ratio(
        self,
        row: str,
        baseline: str = "identity",
        *,
        column: str | None = None,
        num_resamples: int = 10_000,
        seed: int = 0,
    ) -> tuple[float, float, float]:
        r"""Return how much of a baseline's value a method leaves, with a 95% interval.

        .. math:: \sum_i v_i / \sum_i w_i

        over pairs of networks, a ratio of means: single barriers may be almost 0. The interval is that of a bootstrap
        that draws pairs of networks, method and baseline together.

        Args:
            row: The method.
            baseline: Another row.
            column: What to compare; default `headline`.
            num_resamples: How many times the bootstrap draws all pairs anew.
            seed: Of the bootstrap.

        Returns:
            ``(ratio, low, high)``; of one pair there is no interval, and low and high are NaN.

        Raises:
            ValueError: If there is no such row or column, or the baseline has no barrier.
        """
        column = self.headline if column is None else column
        ours, theirs = self._cells(row, column), self._cells(baseline, column)
        if not theirs.mean() > 0:
            raise ValueError(
                f"the {column!r} of {baseline!r} is {theirs.mean().item()} in the mean, so no ratio to it."
            )
        if len(ours) < 2:
            return float(ours / theirs), math.nan, math.nan
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(ours), (num_resamples, len(ours)), generator=generator)
        ratios = ours[drawn].mean(1) / theirs[drawn].mean(1)
        quantiles = ratios.new_tensor([0.025, 0.975])
        # A resample whose baseline is 0 has no ratio (0 / 0 is NaN) and is left out.
        low, high = ratios.nanquantile(quantiles, interpolation="nearest").tolist()
        return float(ours.mean() / theirs.mean()), low, high

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all values and, for readers, the summary as JSON; also write it to ``path`` if given."""
        record = {KIND: "Comparison", **asdict(self), "summary": self.summary(), **provenance.entry(self)}
        return to_json(record, path)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Invert `to_json`.

        Raises:
            ValueError: If the text is no comparison.
        """
        record = from_json(text, "comparison")
        if record.get(KIND, "Comparison") != "Comparison":  # files of older versions do not say it
            raise ValueError(f"this is a {shortened(record[KIND], 60)}, no comparison.")
        with taken_as("comparison"):
            rows = record["values"].items()
            values = {row: {_renamed(name): numbers(one) for name, one in columns.items()} for row, columns in rows}
            found = cls(values, record["num_points"], record["num_examples"], record.get("statistics"))
            if len({(*columns, *map(len, columns.values())) for columns in values.values()}) != 1:
                raise ValueError("its rows have other columns, or other numbers of pairs")
            repr(found)  # a comparison that cannot be shown holds something else than was written
        provenance.keep(found, record.get(provenance.ATTRIBUTE))
        return found

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line for each pair and row, as comma-separated values; also write it to ``path`` if given."""
        rows = [
            [pair, row, *(columns[column][pair] for column in self.columns)]
            for pair in range(self.num_pairs)
            for row, columns in self.values.items()
        ]
        return write_text(csv_table(["pair", "row", *self.columns], rows), path)

    def plot(self, *, column: str | None = None, rows: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
        """Draw one column, default `headline`, of all rows or of some; see `modeconn.plot.comparison`."""
        return plot.comparison(self, column=column, rows=rows, ax=ax)

    def __repr__(self) -> str:
        return "\n".join([f"Comparison({self._extent()})", table(*self._table()), self._legend()])

    def _repr_html_(self) -> str:
        return f"<p>{self._extent()}</p>{html_table(*self._table())}<p>{html.escape(self._legend())}</p>"

    def _extent(self) -> str:
        pairs = f"{self.num_pairs} pair{'s' * (self.num_pairs != 1)}"
        return f"{pairs}, {self.num_points} points, {self.num_examples} examples"

    def _legend(self) -> str:
        """Return what the columns are, in sentences."""
        meanings = {
            None: ("the straight line", "with statistics recalibrated, or units rescaled"),
            "": ("the straight line as it is", "with its units rescaled"),
            "interpolated": ("the straight line, running statistics interpolated", "with its statistics recalibrated"),
        }
        line, repaired = meanings.get(self.statistics, meanings[None])
        told = {"line": line, "repaired": repaired, "curve": "the fitted curve"}
        means = "; ".join(f"{column}: {text}" for column, text in told.items() if column in self.columns)
        over = "" if self.num_pairs == 1 else ", mean ± standard deviation; seconds are medians, bytes the most"
        return f"Barriers are those of the loss{over}. {means[:1].upper()}{means[1:]}."

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows; barriers as mean and deviation, accuracies in percent, median seconds, the largest peak."""
        rows = [
            [row, *(_cell(column, found) for column, found in columns.items())]
            for row, columns in self.summary().items()
        ]
        return ["", *self.columns], rows

    def _cells(self, row: str, column: str) -> Tensor:
        if row not in self.values:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(self.values)}.")
        if column not in self.columns:
            raise ValueError(f"there is no column {column!r}; there are {', '.join(self.columns)}.")
        return torch.tensor(self.values[row][column], dtype=torch.float64, device="cpu")


@shared
@checked
def compare(
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    methods: Mapping[str, Method] | Sequence[Method],
    loader: Iterable[Any],
    test: Iterable[Any],
    *,
    num_points: int = 25,
    repair: bool = True,
    recipe: Recipe | None = None,
    curve: Curve = _QUADRATIC,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    symmetries: str = "permutation",
    untie: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    references: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Match pairs of networks by each of several methods and measure the barriers that are left.

    Two rows are always there: "identity", b as it is, which can win once repaired, and "random", b relabelled at
    random. Of processes that are a group of `torch.distributed`, all must make this call, with the same data, and share
    the pairs and rows; all get the table. "Repaired" stands for recalibration where there is batch norm, whose running
    statistics are otherwise interpolated like the weights, and for `modeconn.repair` where there is none.

    Args:
        pairs: Networks ``(a, b)`` of one architecture, which is discovered and proved once.
        methods: Method objects by the names of their rows, or a list of them, named by their classes.
        loader: Training data, for matching, repair and curves.
        test: What is measured on.
        num_points: At how many points of each connection, both ends included.
        repair: Whether to measure the repaired line too, which some layers do not allow, see `modeconn.repair`.
        recipe: How a curve is fitted between each matched pair. None: no curve.
        curve: The family of curves.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples, of measuring and of curves.
        forward: ``forward(model, batch) -> loss`` in its place, or ``-> (loss, outputs, targets)``, which has an
            accuracy too. Methods that learn through the loss are given one of their own.
        spec: Symmetries of the architecture, if known.
        example_input: For discovery; default the first inputs of ``loader``.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`. Where groups rotate, gains are folded first, also for the
            rows that match nothing.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        checkpoint: A file of finished measurements, one line of JSON each. What is in it is not measured again, also
            if pairs or methods have been added meanwhile. Networks, methods, settings, symmetries, all that is measured
            on, and the first batch and the number of batches of ``loader`` tell measurements apart.
        references: Whether to add what a low barrier has to be held against: the column "tempered", and two rows.
            "Random direction" goes from the nearer end as far as the straight line goes, but anywhere; "ensemble" is
            the loss, and the accuracy lost, of the mean of both ends' probabilities, less the mean of the ends: mostly
            negative. Without classes that can be told from outputs and targets, "random direction" alone.
        seed: Of the random relabellings (each pair has its own), the random directions, the order of data and the
            curves.
        progress: Whether to show a progress bar.

    Returns:
        The table, which keeps the values of every pair. "Peak bytes" are those a matching needs beyond what was in use
        when it began, see `modeconn.tools.memory.peak_memory`; small needs met by memory that the process holds free
        do not show, so the table prints the largest over pairs.

    Raises:
        ValueError: If there is no pair, networks differ in architecture or hold NaN, data is missing, or two rows have
            one name.

    Example:
        >>> from modeconn import WeightMatching, data, models
        >>> train, test = data.load("digits")
        >>> networks = [models.mlp(64, (8,), 10, seed=seed) for seed in range(2)]
        >>> compare([networks], {"weights": WeightMatching()}, train, test, num_points=3, repair=False).columns
        ['line', 'line accuracy lost', 'length', 'seconds', 'peak bytes']
    """
    if not isinstance(num_points, int) or num_points < 2:
        raise ValueError(f"num_points must be an integer of at least 2, got num_points={num_points!r}.")
    pairs, named, them = list(pairs), _named(methods), joined()
    for name, data in {"loader": loader, "test": test}.items():
        check_whole(data, name=name)
    space = _check_pairs(pairs)
    with seeded(seed, space.device):
        spec = find_spec(
            pairs[0][0], loader, Symmetry(spec, example_input, outputs, symmetries=symmetries, untie=untie)
        )
    for model in (model for pair in pairs for model in pair):
        spec.check_model(model)
    # Seeded anew, so that the first batch does not depend on whether the spec is known.
    with seeded(seed, space.device):
        check_loader(test) if forward is None else first_batch(test)
        measured = fetch(test, space.device)
        about = [forward or loss_fn, curve, recipe, num_points, repair, seed, _num_batches(loader), "with lengths"]
        about += [[(group.name, group.parents, group.places) for group in spec.groups]]
        about += [
            digest(tensors_of(check_loader(loader) if forward is None else first_batch(loader))),
            digest(one for batch in measured for one in tensors_of(batch)),
        ]
        # Taken before a method changes its own settings.
        names = {row: identify(method) for row, method in named.items()}
        axis = _axis_of_classes(pairs[0][0], measured, loss_fn) if references and forward is None else None
        about += [f"tempered along {axis}"] if axis is not None else []
    if them.size > 1:
        models = "".join(digest(model) for pair in pairs for model in pair)
        them.agree({"the digest of all pairs": models, "methods": names, "settings and data": record_key(*about)})
    data = TrainingData(loader, loss_fn, forward)
    trial = _Matching(spec, data, measured, num_points, repair, recipe, curve, seed, axis)
    extra = list(REFERENCES[: 1 + (axis is not None)]) if references else []
    match_units(torch.eye(2))  # imported now, so that no method pays time and memory for one-time imports
    with Records(checkpoint) as known:
        records: dict[str, list[_Record]] = {row: [] for row in (*BASELINES, *named, *extra)}
        bar = progress_bar(total=len(pairs) * len(records), show=progress, desc="compare", unit="match")
        tasks: list[tuple[str, Callable[[], _Record]]] = []
        reads: list[tuple[str, str, Callable[[_Record], _Record]]] = []
        for number, pair in enumerate(pairs):
            digests = [digest(spec.prepared(model) if spec.prepares else model) for model in pair]
            baselines: dict[str, Method] = {"identity": _Identity(), "random": _Random(seed + number)}
            for row, method in {**baselines, **named}.items():
                key = record_key(*about, names.get(row, method), *digests)
                tasks.append((key, partial(trial.run, method, *pair)))
                reads.append((row, key, trial.columns))
            for row in extra:
                key = record_key(*about, row, number if row == REFERENCES[0] else "", *digests)
                tasks.append((key, partial(trial.refer, row, *pair, seed + number)))
                reads.append((row, key, trial.columns_of_reference))
        known.measure(tasks, bar.update)
        for row, key, read in reads:
            records[row].append(known.get(key, read))
    kept = "interpolated" if norm_layers(pairs[0][0]) else ""
    return Comparison(_values(records), num_points, sum(num_examples(batch) for batch in measured), kept)


@torch.no_grad()
def _axis_of_classes(model: nn.Module, test: Iterable[Any], loss_fn: LossFn) -> int | None:
    """Return along which axis of the outputs classes lie, None where nobody knows."""
    inputs, targets = inputs_and_targets(next(iter(test)))
    outputs = run(copy_of(model).eval(), inputs)
    if not isinstance(outputs, Tensor) and loss_fn is not cross_entropy:
        return None  # a loss that takes apart what this model returns cannot read an ensemble's scores
    return axis_of_classes(outputs, targets, loss_fn)


def _num_batches(loader: Iterable[Any]) -> int | None:
    return len(loader) if isinstance(loader, Sized) else None


@dataclass(frozen=True)
class _Matching:
    """What is done with every pair and method."""

    spec: PermutationSpec
    training: TrainingData
    test: Iterable[Any]
    num_points: int
    repair: bool
    recipe: Recipe | None
    curve: Curve
    seed: int
    axis: int | None  # of the classes, if lines are to be measured with temperatures too

    def columns(self, record: _Record) -> _Record:
        """Return the numbers of a record, by column; raise unless they are those of this comparison."""
        kinds = ["line", *["repaired"] * self.repair, *["curve"] * (self.recipe is not None)]
        found = {name: numbers(value) for name, value in record.items()}
        if not {"seconds", "length", *kinds} <= found.keys():
            raise ValueError(f"columns are missing, there are {list(found)}")
        return found

    def run(self, method: Method, model_a: nn.Module, model_b: nn.Module) -> _Record:
        """Return the numbers of one row for one pair, by column."""
        model_a, model_b = self._prepared(model_a), self._prepared(model_b)
        permutation, cost = self._match(method, model_a, model_b)
        line = Connection.straight_between(model_a, permutation.apply(model_b), training=self.training)
        record = self._of_line(self._measure_as_it_is(line), line.length())
        if self.repair:
            record |= _barriers("repaired", line.evaluate(self.test, num_points=self.num_points, repair=True))
        if self.recipe is not None:
            begin = time.perf_counter()
            fitted = fit_curve(
                model_a,
                model_b,
                self.training.loader,
                align=permutation,
                curve=self.curve,
                recipe=self.recipe,
                loss_fn=self.training.loss_fn,
                forward=self.training.forward,
                seed=self.seed,
            )
            record |= {"curve length": fitted.length(), "curve seconds": time.perf_counter() - begin}
            record |= _barriers("curve", fitted.evaluate(self.test, num_points=self.num_points))
        return record | cost

    def columns_of_reference(self, record: _Record) -> _Record:
        """Return the numbers of a record of a reference, by column."""
        found = {name: numbers(value) for name, value in record.items()}
        if "line" not in found:
            raise ValueError(f"columns are missing, there are {list(found)}")
        return found

    def refer(self, row: str, model_a: nn.Module, model_b: nn.Module, seed: int) -> _Record:
        """Return the numbers of a reference for one pair, by column."""
        model_a, model_b = self._prepared(model_a), self._prepared(model_b)
        line = Connection.straight_between(model_a, model_b, training=self.training)
        if row == REFERENCES[0]:
            generator = torch.Generator().manual_seed(seed)
            step = torch.randn(line.space.num_parameters, generator=generator, dtype=torch.float64)
            step = (step * line.length() / step.norm()).to(line.device, line.space.dtype)
            return self._of_line(self._measure_as_it_is(line, step), line.length())
        meter = self._meter()
        for model in (model_a, model_b, Ensemble([model_a, model_b], axis=self.axis or 1)):
            meter.measure(copy_of(model).eval())
        found = meter.results()
        of_loss = {"line": float(found.loss[2] - found.loss[:2].mean())}
        if found.accuracy is None:
            return of_loss
        return {**of_loss, "line accuracy lost": float(found.accuracy[:2].mean() - found.accuracy[2])}

    def _prepared(self, model: nn.Module) -> nn.Module:
        return self.spec.prepared(model) if self.spec.prepares else model

    def _of_line(self, profile: Profile, length: float) -> _Record:
        tempered = {name: profile.barrier_of(name) for name in profile.metrics}
        return _barriers("line", profile) | tempered | {"length": length}

    def _meter(self) -> Meter:
        metrics = {} if self.axis is None else {"tempered": self._tempered()}
        return Meter(self.test, self.training.loss_fn, self.training.forward, metrics)

    def _tempered(self) -> TemperedLoss:
        ignored = setting_of(self.training.loss_fn, "ignore_index", IGNORED)
        return TemperedLoss(ignored, axis=self.axis)

    def _match(self, method: Method, model_a: nn.Module, model_b: nn.Module) -> tuple[Relabelling, _Record]:
        device = device_of(model_a)
        with seeded(self.seed, device), peak_memory(device) as peak:
            begin = time.perf_counter()
            permutation = method.match(self.spec, model_a, model_b, self.training.loader).permutation
            seconds = time.perf_counter() - begin  # relabellings are on the CPU, so an accelerator has finished too
        return permutation, {"seconds": seconds, **({} if peak.num_bytes is None else {"peak bytes": peak.num_bytes})}

    def _measure_as_it_is(self, line: Connection, step: Tensor | None = None) -> Profile:
        """Measure a straight line with running statistics of batch norm on the straight line too.

        With a ``step`` ``(P,)``, as long as the line, networks lie in that direction from the nearer end, as far from
        it as those of the line, whose statistics they have.
        """
        model, (at_a, at_b) = line.model_at(0), line.buffers
        running = {
            f"{layer}.{kind}".lstrip(".") for layer in norm_layers(model) for kind in ("running_mean", "running_var")
        }
        meter = self._meter()
        t = torch.linspace(0, 1, self.num_points, dtype=torch.float64)
        for position in t.tolist():
            weights = line.weights_at(position)
            if step is not None:
                weights = line.weights_at(round(position)) + min(position, 1 - position) * step
            line.space.load(weights, model)
            mixed = {name: torch.lerp(at_a[name], at_b[name], position) for name in running}
            load_buffers({**(at_b if position == 1 else at_a), **mixed}, model)
            meter.measure(model)
        found = meter.results()
        worse = dict.fromkeys(found.metrics, False)
        length = t * line.length()
        return Profile(t, found.loss, found.accuracy, length, metrics=found.metrics, higher_is_better=worse)


@dataclass(frozen=True)
class _Identity:
    """Leaves b as it is."""

    def match(self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Any) -> Match:
        return Match(spec.identity())


@dataclass(frozen=True)
class _Random:
    """Relabels b at random."""

    seed: int

    def match(self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Any) -> Match:
        return Match(spec.random(torch.Generator().manual_seed(self.seed)))


def _named(methods: Mapping[str, Method] | Sequence[Method]) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        methods_by_name = list(methods.items())
    else:
        methods_by_name = [(type(method).__name__, method) for method in methods]
    for _, method in methods_by_name:
        check_method(method, name="methods")
    names = [*BASELINES, *REFERENCES, *(name for name, _ in methods_by_name)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two rows have the name {name!r}; pass methods as a dict, none of them named {BASELINES + REFERENCES}."
            )
    return dict(methods_by_name)


def _check_pairs(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> WeightSpace:
    if not pairs:
        raise ValueError("pairs is empty: there are no networks to compare methods on.")
    space = WeightSpace(pairs[0][0])
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"pairs must hold two networks each, but pair {number} has {len(pair)}.")
        for end, model in zip("ab", pair, strict=True):
            space.check(model, name=f"{end} of pair {number}", reference="a of pair 0")
    return space


def _renamed(column: str) -> str:
    """Return the name of a column that files of older versions call by what is lost."""
    return f"{column} lost" if column.endswith(" accuracy") else column


def _barriers(column: str, profile: Profile) -> _Record:
    drop = profile.accuracy_drop
    return {column: profile.barrier, **({} if drop is None else {f"{column} accuracy lost": drop})}


def _values(records: Mapping[str, Sequence[_Record]]) -> dict[str, dict[str, list[float]]]:
    """Return the records by row and column, with the columns that all of them have; of references NaN for others."""
    everything = [record for row, found in records.items() if row not in REFERENCES for record in found]
    columns = [column for column in everything[0] if all(column in record for record in everything)]
    return {
        row: {column: [one.get(column, math.nan) for one in found] for column in columns}
        for row, found in records.items()
    }


def _moments(cells: Sequence[float]) -> dict[str, float]:
    if any(map(math.isnan, cells)):  # of which the standard library has no deviation
        return dict.fromkeys(("mean", "median", "max", "std", "sem")[: 5 if len(cells) > 1 else 3], math.nan)
    found = {"mean": statistics.fmean(cells), "median": statistics.median(cells), "max": max(cells)}
    if len(cells) < 2:
        return found
    deviation = statistics.stdev(cells)
    return {**found, "std": deviation, "sem": deviation / len(cells) ** 0.5}


def _cell(column: str, found: Mapping[str, float]) -> str:
    if math.isnan(found["mean"]):
        return ""
    if column == "peak bytes":
        return f"{found['max'] / 1e6:.1f} MB" if found["max"] >= 1e5 else f"{found['max'] / 1e3:.1f} kB"
    if column.endswith("seconds"):
        return f"{found['median']:.3g}"
    if column.endswith("length"):
        return f"{found['mean']:.4g}"
    scale, form, unit = (100, ".2f", " %") if column.endswith("accuracy lost") else (1, ".4f", "")
    spread = f" ± {scale * found['std']:{form}}" if "std" in found else ""
    return f"{scale * found['mean']:{form}}{spread}{unit}"
