"""The whole story on one data set: two networks, straight and curved, with and without alignment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from modeconn import Alignment, Connection, Plane, Profile, Recipe, align, fit_curve, models, plane, plot
from modeconn.cli.files import DEMO, demo_table
from modeconn.cli.options import save_figure
from modeconn.data import TensorLoader
from modeconn.learning.checkpoint import environment
from modeconn.network.loss import TrainingData
from modeconn.network.recipe import one_cycle
from modeconn.tools import provenance
from modeconn.tools.fingerprint import identify
from modeconn.tools.json_files import KIND, to_json

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """What the demo does on a kind of data, where the user does not say.

    Args:
        model: Name of the model.
        arguments: For its factory, besides what the data says.
        endpoints: How the two networks are trained.
        curve: How the curves are.
        num_points: At how many points they are measured.
        plane_points: How many columns and rows the plane through both networks and the relabelled one has.
        train_examples: How many examples are trained on, None for all.
        test_examples: How many are measured on, None for all.
        num_threads: On how many threads to compute, None for as many as torch takes.
    """

    model: str
    arguments: dict[str, Any]
    endpoints: Recipe
    curve: Recipe
    num_points: int
    plane_points: int
    train_examples: int | None = None
    test_examples: int | None = None
    num_threads: int | None = None

    def changed(self, **given: Any) -> Preset:
        """Return a preset with those settings that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON can hold them, recipes as text."""
        return {**vars(self), "endpoints": _describe_recipe(self.endpoints), "curve": _describe_recipe(self.curve)}


DIGITS = Preset(
    model="mlp",
    arguments={"hidden": (128, 128)},
    endpoints=models.DIGITS_RECIPE,
    curve=Recipe(15, partial(torch.optim.Adam, lr=1e-3), one_cycle),
    num_points=61,
    plane_points=21,
    num_threads=1,  # matrices this small wait for each other's threads longer than they compute
)
IMAGES = Preset(
    model="tinyten",
    arguments={},
    endpoints=Recipe(10, partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), one_cycle),
    curve=Recipe(10, partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True), one_cycle),
    num_points=25,
    plane_points=7,
    train_examples=10_000,
    test_examples=2_000,
)


@dataclass(frozen=True)
class Row:
    """One connection, what lies on it, and the seconds it took to find it."""

    name: str
    connection: Connection
    profile: Profile
    seconds: float

    def numbers(self) -> dict[str, float]:
        """Return what the table shows; accuracies as fractions."""
        loss, accuracy = self.profile.loss.tolist(), self.profile.accuracy.tolist()
        return {
            "loss t=0": loss[0],
            "loss t=1": loss[-1],
            "acc t=0": accuracy[0],
            "acc t=1": accuracy[-1],
            "min acc": self.profile.min_accuracy,
            "mean acc": self.profile.mean_accuracy,
            "arc mean": self.profile.arc_mean_accuracy,
            "barrier": self.profile.barrier,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Story:
    """Everything the demo found."""

    ends: tuple[nn.Module, nn.Module]
    alignment: Alignment
    rows: tuple[Row, ...]
    plane: Plane

    def table(self) -> str:
        """Return the one table."""
        return demo_table({row.name: row.numbers() for row in self.rows})


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """Compute on so many threads meanwhile; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tell(
    plan: Preset,
    make: Callable[[int], nn.Module],
    train: TensorLoader,
    test: TensorLoader,
    *,
    seeds: tuple[int, int],
    say: Callable[[str], None],
    progress: bool,
) -> Story:
    """Train two networks and connect them in four ways.

    Args:
        plan: Recipes and number of points; both curves are learned with the same seed.
        make: From a seed to an untrained network.
        train: Training data, for the ends, the alignment and the curves.
        test: What is measured.
        seeds: Of the two networks, for their weights and for the order of their data.
        say: Is told what is being done.
        progress: Whether to show progress bars.
    """
    say(f"training two networks from seeds {seeds[0]} and {seeds[1]}")
    a, b = (models.train(make(seed), train, recipe=plan.endpoints, seed=seed, progress=progress) for seed in seeds)
    say("aligning them by their activations")
    alignment, align_seconds = _timed(lambda: align(a, b, train))

    def fit(how: bool | Alignment) -> Connection:
        return fit_curve(a, b, train, align=how, recipe=plan.curve, progress=progress)

    def measure(name: str, connection: Connection, seconds: float) -> Row:
        return Row(name, connection, connection.evaluate(test, num_points=plan.num_points, progress=progress), seconds)

    say("learning a curve between them as they are, then one between them aligned")
    curved, curved_aligned = (_timed(lambda how=how: fit(how)) for how in (False, alignment))
    say(f"measuring {plan.num_points} networks on each connection")
    training = TrainingData(train)
    rows = (
        measure("straight line", Connection.straight_between(a, b, training=training), 0.0),
        measure("straight line, aligned", curved_aligned[0].straight(), align_seconds),
        measure("curve", *curved),
        measure("curve, aligned", curved_aligned[0], curved_aligned[1] + align_seconds),
    )
    say(f"measuring the plane through both networks and the relabelled one, {plan.plane_points} x {plan.plane_points}")
    through = {"a": a, "b": b, "b relabelled": alignment.model_b}
    found = plane(through, test, num_points=plan.plane_points, recalibrate=train, progress=progress)
    return Story((a, b), alignment, rows, found)


def write_results(story: Story, folder: Path, settings: dict[str, Any]) -> None:
    """Write networks, connections, numbers and figures into a folder."""
    for end, model in zip("ab", story.ends, strict=True):
        models.save(model, folder / f"{end}.safetensors")
    story.alignment.permutation.save(folder / "permutation.safetensors")
    for row in story.rows:
        row.connection.save(folder / f"{_file_name(row)}.safetensors")
        row.profile.to_json(folder / f"{_file_name(row)}.json")
    story.plane.save(folder / "plane.json")
    numbers = {
        KIND: DEMO,
        "settings": settings,
        "environment": environment(story.rows[0].connection.device),
        "table": {row.name: row.numbers() for row in story.rows},
        "files": {row.name: _file_name(row) for row in story.rows},
        "correlation": story.alignment.correlation,
        **provenance.entry(story.alignment),
    }
    to_json(numbers, folder / "results.json")
    _draw(story, folder)


def _draw(story: Story, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        names = [row.name for row in story.rows]
        plot.profile(*(row.profile for row in story.rows), labels=names, quantity=quantity, ax=ax)
    save_figure(figure, folder / "profiles.png")

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    plot.correlation(story.alignment, ax=figure.subplots())
    save_figure(figure, folder / "correlations.png")

    figure = Figure(figsize=(6.0, 4.4), layout="constrained")
    plot.plane(story.plane, ax=figure.subplots())
    save_figure(figure, folder / "plane.png")

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    learned = [row for row in story.rows if row.connection.history is not None]
    plot.history(*(row.connection for row in learned), labels=[row.name for row in learned], ax=figure.subplots())
    save_figure(figure, folder / "history.png")


def _describe_recipe(recipe: Recipe) -> dict[str, Any]:
    described = {
        "optimizer": identify(recipe.optimizer),
        "schedule": identify(recipe.schedule),
        "autocast": None if recipe.autocast is None else str(recipe.autocast),
    }
    return {**vars(recipe), **described}


def _file_name(row: Row) -> str:
    return row.name.replace(",", "").replace(" ", "-")


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start
