"""Endpoints and curves of TinyTen on CIFAR-10, as far as the time reaches; what is finished is kept in a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerator_report import Clock, LeftOut, Report, attempt
from profiles import numbers_of
from torch import Tensor, nn

import modeconn
from modeconn import PAM, Bezier, Connection, Line, Recipe, data, models
from modeconn.network.recipe import one_cycle

PAIRS = ((1, 2), (3, 4), (5, 6))
_PROBED = 10  # steps whose time says what an epoch takes
_EVALUATION = 10.0  # seconds, more than a profile takes
_REFINEMENT = 40.0  # seconds of a turn of PAM, in which nothing looks at the clock


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Args:
        device: Where.
        folder: For endpoints, curves and numbers.
        epochs: Of an endpoint.
        curve_epochs: Of a curve, the same with `PAM`.
        points: Of a profile.
        pairs: Seeds of endpoints, two by two.
        clock: How long.
        refinement: How `PAM` refines.
        limited: Whether what does not fit into the time is left out.
    """

    device: torch.device
    folder: Path
    epochs: int
    curve_epochs: int
    points: int
    pairs: tuple[tuple[int, int], ...]
    clock: Clock
    refinement: PAM
    limited: bool

    def recipe(self, epochs: int, rate: float) -> Recipe:
        """Return SGD along one cycle, in bfloat16 on a GPU."""
        optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True, fused=True)
        autocast = torch.bfloat16 if self.device.type == "cuda" else None
        return Recipe(epochs, optimizer, one_cycle, weight_decay=5e-4, autocast=autocast)

    def need(self, seconds: float, what: str) -> None:
        """Raise unless there is time for something."""
        if self.limited and self.clock.left < seconds:
            raise LeftOut(f"{what} takes about {seconds:.0f} s, {max(self.clock.left, 0):.0f} s are left")


def run_training(report: Report, plan: Plan, root: Path | None, batch_size: int, *, quick: bool) -> None:
    """Train and measure pair after pair; every finished row goes into the report, also one of an earlier call."""
    if root is None and not quick:
        report.leave_out("training", "all of it", "there is no --data DIR with CIFAR-10, and nothing is downloaded")
        return
    train, test = synthetic(plan.device) if root is None else real(root, plan.device, batch_size)
    kind = "synthetic" if root is None else "cifar10"
    about = {"data": kind, "train": train.num_examples, "epochs": plan.epochs, "curve epochs": plan.curve_epochs}
    report.put("training", "settings", {**about, "batch size": train.batch_size, "precision": str(plan.recipe(1, 1))})
    plan.folder.mkdir(parents=True, exist_ok=True)
    print(f"  {kind}, {train.num_examples} images; {'row':<28} ends %   min %  mean %  barrier  minutes")
    for a, b in plan.pairs:
        pair = Pair(plan, a, b, train, test)
        for name, work in pair.rows():
            result = attempt(partial(_kept, plan, f"{kind}-{a}-{b}-{name}", work))
            if "left out" in result:
                report.leave_out("training", f"{a}-{b}: {name}", result["left out"])
                continue
            report.put("training", f"{a}-{b}: {name}", result)
            print(_line(f"{a}-{b}: {name}", result), flush=True)


def _kept(plan: Plan, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what an earlier call has found, or find and keep it."""
    path = plan.folder / f"{name.replace(' ', '-')}.json"
    if path.exists():
        return json.loads(path.read_text()) | {"from an earlier call": True}
    found = work()
    path.write_text(json.dumps(found))
    return found


def _line(name: str, result: dict[str, Any]) -> str:
    if not result["ok"]:
        return f"  {name}: FAILED: {result['error'][:300]}"
    shares = (100 * result[key] for key in ("end accuracy", "min accuracy", "mean accuracy"))
    numbers = "  ".join(f"{share:6.2f}" for share in shares)
    return f"  {name:<48} {numbers}  {result['barrier']:7.3f}  {result['minutes']:7.2f}"


# -- data


def real(root: Path, device: torch.device, batch_size: int) -> tuple[data.TensorLoader, data.TensorLoader]:
    """Read CIFAR-10 onto the device."""
    train, test = data.load("cifar10", root, batch_size=batch_size, device=device)
    return train, test.with_(batch_size=1000)


def synthetic(device: torch.device, *, size: int = 12) -> tuple[data.TensorLoader, data.TensorLoader]:
    """Make images of ten random prototypes and noise."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 3, size, size, generator=generator)

    def part(count: int) -> tuple[Tensor, Tensor]:
        targets = torch.arange(count) % 10
        noise = 0.2 * torch.randn(count, 3, size, size, generator=generator)
        return (255 * (prototypes[targets] + noise).clamp(0, 1)).to(torch.uint8), targets

    train, test = (data.TensorLoader(*part(count), batch_size=20, num_classes=10) for count in (80, 40))
    return train.with_(shuffle=True, augment=(data.Flip(), data.Crop(1))).to(device), test.to(device)


class UntilTime:
    """A loader that breaks off when the time is over, between two batches; the checkpoint of a fit then goes on."""

    def __init__(self, loader: data.TensorLoader, plan: Plan) -> None:
        self._loader, self._plan = loader, plan

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._plan.limited and self._plan.clock.left < _EVALUATION:
                raise LeftOut("the time is over; the next call with the same --work goes on from the checkpoint")
            yield batch


# -- one pair


class Pair:
    """Two endpoints and the connections between them.

    Args:
        plan: What is done.
        a: Seed of the first.
        b: Seed of the second.
        train: Training data on the device.
        test: Test data on the device.
    """

    def __init__(self, plan: Plan, a: int, b: int, train: data.TensorLoader, test: data.TensorLoader) -> None:
        self._plan, self._seeds, self._train, self._test = plan, (a, b), train, test

    def rows(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yield the connections in their order, with what makes and measures each."""
        yield "straight", partial(self._connect, Line(), is_aligned=False)
        yield "aligned", partial(self._connect, Line(), is_aligned=True)
        yield "curve", partial(self._connect, Bezier(2), is_aligned=False)
        yield "curve aligned", partial(self._connect, Bezier(2), is_aligned=True)
        yield "PAM on curve", partial(self._connect, Bezier(2), is_aligned=False, refine=self._plan.refinement)

    @cached_property
    def _ends(self) -> list[nn.Module]:
        return [self._endpoint(seed) for seed in self._seeds]

    @cached_property
    def _alignment(self) -> modeconn.Alignment:
        return modeconn.align(*self._ends, self._train)

    def _endpoint(self, seed: int) -> nn.Module:
        path = self._plan.folder / f"endpoint-{self._train.input_shape[-1]}-{seed}.safetensors"
        template = self._untrained(seed)
        if not path.exists():
            seconds = self._seconds_of_an_epoch * self._plan.epochs
            self._plan.need(1.1 * seconds + _EVALUATION, f"endpoint {seed}")
            recipe = self._plan.recipe(self._plan.epochs, 0.002 * self._train.batch_size**0.8)
            models.save(models.train(template, self._train, recipe=recipe, seed=seed), path)
        return models.load(path, template)

    def _untrained(self, seed: int) -> nn.Module:
        shape, moments = self._train.input_shape, (self._train.mean().tolist(), self._train.std().tolist())
        model = models.tinyten(10, image_size=shape[-1], mean=moments[0], std=moments[1], seed=seed)
        return model.to(self._plan.device, memory_format=torch.channels_last)

    @cached_property
    def _seconds_of_an_epoch(self) -> float:
        """Time some steps, the second time they are made."""
        few = self._train.subset(torch.arange(min(_PROBED * self._train.batch_size, self._train.num_examples)))
        for _ in range(2):
            start = time.perf_counter()
            models.train(self._untrained(0), few, recipe=self._plan.recipe(1, 1e-3))
            seconds = time.perf_counter() - start
        return seconds / len(few) * len(self._train)

    def _connect(self, curve: Any, *, is_aligned: bool, refine: PAM | None = None) -> dict[str, Any]:
        ends, plan = self._ends, self._plan
        start = time.perf_counter()
        chosen = self._alignment if is_aligned else False
        aligned = time.perf_counter()
        if isinstance(curve, Line):
            b = self._alignment.model_b if is_aligned else ends[1]
            connection = Connection.straight_between(ends[0], b)
        else:
            connection = self._fit(curve, chosen, refine)
        fitted = time.perf_counter()
        plan.need(_EVALUATION, "a profile")
        profile = connection.evaluate(self._test, num_points=plan.points, recalibrate=self._train)
        return {**numbers_of(profile), "seconds to align": aligned - start, "minutes": (fitted - start) / 60}

    def _fit(self, curve: Any, align: Any, refine: PAM | None) -> Connection:
        plan = self._plan
        name = "-".join(map(str, (*self._seeds, "aligned" if align else "plain", "PAM" if refine else "curve")))
        checkpoint = plan.folder / f"{name}.checkpoint"
        if refine or not checkpoint.exists():
            turn = _REFINEMENT if refine else 0.0
            plan.need(3 * self._seconds_of_an_epoch + _EVALUATION + turn, "to begin a curve")
        connection = modeconn.fit_curve(
            *self._ends,
            UntilTime(self._train, plan),
            align=align,
            spec=self._alignment.spec,
            curve=curve,
            refine=refine,
            recipe=plan.recipe(plan.curve_epochs, 0.001 * self._train.batch_size**0.8),
            seed=self._seeds[0],
            checkpoint=checkpoint,
        )
        connection.save(plan.folder / f"{name}.safetensors")
        return connection
