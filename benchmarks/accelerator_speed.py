"""What the package costs on a device, each time in one interleaved run beside the plain torch that it stands for."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerator_report import Clock, LeftOut, Report, attempt
from evaluate import passes
from match import bound, planted
from timing import interleaved, quartiles, synchronised
from torch import Tensor, nn

import modeconn
from modeconn import PGD, ActivationMatching, Bezier, Connection, Recipe, WeightMatching, WeightSpace, fit_curve, models
from modeconn.curves.step import CurveStep, stratified_positions
from modeconn.network.loss import cross_entropy, supervised
from modeconn.network.recipe import constant
from modeconn.network.weights import Workspace
from modeconn.tools.memory import peak_memory

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True)
Batch = tuple[Tensor, Tensor]
Rivals = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Scale:
    """How large the measurements are.

    Args:
        device: Where.
        quick: Whether only to show that they run.
    """

    device: torch.device
    quick: bool

    def of(self, full: int, quick: int) -> int:
        """Return the size that is asked for."""
        return quick if self.quick else full

    def batch(self, size: int) -> Batch:
        """Return random images and classes."""
        generator = torch.Generator().manual_seed(size)
        x, y = torch.rand(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)
        return x.to(self.device), y.to(self.device)

    def networks(self, name: str, layout: torch.memory_format = torch.contiguous_format) -> list[nn.Module]:
        """Return two networks of the zoo."""
        return [models.build(name, seed=s).to(self.device, memory_format=layout) for s in (1, 2)]


def run_speed(report: Report, device: torch.device, clock: Clock, *, quick: bool, only: str, reserve: float) -> None:
    """Make all measurements whose names hold ``only``, while more than ``reserve`` seconds are left."""
    scale = Scale(device, quick)
    print(f"  {'':<66} {'ratio':>7} {'quartiles':>15} {'ours, ms':>10} {'plain, ms':>10} {'peak MB':>15}")
    for name, seconds, work in measurements(scale):
        if only not in name:
            continue
        if not quick and clock.left - reserve < seconds:
            report.leave_out("speed", name, f"{clock.left:.0f} s are left, of which {reserve:.0f} are kept")
            continue
        result = attempt(work)
        if "left out" in result:
            report.leave_out("speed", name, result["left out"])
            continue
        report.put("speed", name, result)
        print(f"  {name:<66} {_line(result)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _line(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return f"FAILED: {result['error'][:300]}"
    low, high = result["quartiles"]
    megabytes = " / ".join("?" if b is None else f"{b / 1e6:.0f}" for b in result["peak bytes"].values())
    ours, theirs = result["milliseconds"].values()
    return f"{result['ratio']:7.3f} {f'{low:.3f} to {high:.3f}':>15} {ours:10.2f} {theirs:10.2f} {megabytes:>15}"


def measurements(scale: Scale) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
    """Yield the name, the seconds it may take and the work of every measurement, the most important first."""
    for batch, precisions, layouts in _step_settings(scale):
        for model in ("tinyten", "resnet20"):
            for precision in precisions:
                for layout in layouts:
                    text = f"curve step: {model}, batch {batch}, {precision}, {str(layout).removeprefix('torch.')}"
                    yield text, 8, partial(curve_step, scale, model, batch, precision, layout)
    yield "evaluate: 25 points and their recalibration, TinyTen", 15, partial(evaluation, scale)
    yield "align by activations: two forward passes, ResNet20", 12, partial(alignment, scale)
    yield "PGD-10: ten passes to the inputs, TinyTen", 8, partial(attack, scale, "tinyten")
    yield "PGD-10: ten passes to the inputs, ResNet20", 10, partial(attack, scale, "resnet20")
    yield "models.train: a plain loop, TinyTen", 10, partial(training, scale)
    yield "fit_curve: a plain loop, TinyTen", 10, partial(curve_fit, scale)
    yield "match weights: MLP 784-512-512-512-10", 15, partial(matching, scale, "mlp")
    yield "match weights: ResNet20 x4", 25, partial(matching, scale, "resnet20")
    for precision in ("float32", "bfloat16"):
        work = partial(
            curve_step, scale, "tinyten", scale.of(128, 4), precision, torch.contiguous_format, compiled=True
        )
        yield f"curve step: TinyTen, batch 128, {precision}, compiled", 60, work


def _step_settings(scale: Scale) -> list[tuple[int, tuple[str, ...], tuple[torch.memory_format, ...]]]:
    """Return batch sizes with the precisions and layouts to try at each."""
    plain, last = torch.contiguous_format, torch.channels_last
    if scale.quick:
        return [(4, ("float32", "bfloat16"), (plain,)), (2, ("float32",), (last,))]
    if scale.device.type == "cuda":
        return [(size, ("float32", "tf32", "bfloat16"), (plain, last)) for size in (128, 512)]
    return [(128, ("float32", "bfloat16"), (plain, last))]


# -- how one measurement is made


def compared(scale: Scale, ours: str, rivals: Rivals, rounds: int) -> dict[str, Any]:
    """Time rivals in turn; return ours against the fastest of the others, and the peak of memory of both."""
    seconds = interleaved(rivals, rounds, scale.device)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    plain = min((name for name in rivals if name != ours), key=median.__getitem__)
    return _result(ours, plain, seconds) | {"peak bytes": {name: _peak(scale, rivals[name]) for name in (ours, plain)}}


def _result(ours: str, plain: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    low, middle, high = quartiles([x / y for x, y in zip(seconds[ours], seconds[plain], strict=True)])
    milliseconds = {name: 1e3 * statistics.median(seconds[name]) for name in (ours, plain)}
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "rounds": len(seconds[ours]),
        "milliseconds": milliseconds,
        "best milliseconds": {name: 1e3 * min(seconds[name]) for name in (ours, plain)},
    }


def _peak(scale: Scale, run: Callable[[], object]) -> int | None:
    synchronised(scale.device)
    with peak_memory(scale.device) as peak:
        run()
        synchronised(scale.device)
    return peak.num_bytes


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow the short mantissa in products of matrices and in convolutions, or forbid it."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


# -- a step of a curve


def curve_step(
    scale: Scale,
    model: str,
    batch_size: int,
    precision: str,
    layout: torch.memory_format,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """A training step of a Bezier curve against the fastest ordinary step of ``torch.optim.SGD``."""
    if compiled and scale.quick:
        raise LeftOut("the compiler takes too long for --quick")
    model_a, model_b = scale.networks(model, layout)
    batch = scale.batch(batch_size)
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    kinds = ("fused",) if compiled else ("foreach", "fused")
    rivals: Rivals = {
        f"SGD, {kind}": ordinary_step(model_a, batch, autocast, compiled=compiled, **{kind: True}) for kind in kinds
    }
    rivals["curve"] = our_step(model_a, model_b, batch, autocast, compiled=compiled)
    with tf32(precision == "tf32"):
        return compared(scale, "curve", rivals, scale.of(30, 2))


def ordinary_step(
    model: nn.Module, batch: Batch, autocast: torch.dtype | None, *, compiled: bool, **kwargs: bool
) -> Callable[[], object]:
    """Return a step of SGD, written out by hand."""
    model = copy.deepcopy(model).train()
    optimizer = SGD(model.parameters(), weight_decay=5e-4, **kwargs)
    runner = torch.compile(model) if compiled else model
    device = batch[0].device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(runner(batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return step


def our_step(
    model_a: nn.Module, model_b: nn.Module, batch: Batch, autocast: torch.dtype | None, *, compiled: bool
) -> Callable[[], object]:
    """Return a step of the curve, as `modeconn.fit_curve` takes it."""
    space, curve = WeightSpace(model_a), Bezier(2)
    points = curve.initial_control_points(space.flatten(model_a), space.flatten(model_b))
    recipe = Recipe(optimizer=partial(SGD, fused=True), autocast=autocast, compile=compiled)
    step = CurveStep(Workspace(model_a, space), curve, points, recipe)
    weights = iter(curve.basis(torch.cat([stratified_positions(0, block) for block in range(16)])).tolist())
    forward = supervised(cross_entropy)
    return lambda: step(batch, next(weights), forward)


# -- passes over data


def evaluation(scale: Scale) -> dict[str, Any]:
    """`Connection.evaluate` against the passes that it cannot do without."""
    model_a, model_b = scale.networks("tinyten")
    points, size = scale.of(25, 3), scale.of(256, 8)
    train, test = ([scale.batch(size) for _ in range(scale.of(8, 1))] for _ in range(2))
    line = Connection.straight_between(model_a, model_b)
    rivals: Rivals = {
        "passes": passes(model_a, train, test, points),
        "evaluate": lambda: line.evaluate(test, num_points=points, recalibrate=train),
    }
    return compared(scale, "evaluate", rivals, scale.of(5, 2))


def alignment(scale: Scale) -> dict[str, Any]:
    """`align` by activations against a forward pass of each network."""
    name = "tinyten" if scale.quick else "resnet20"
    networks = [model.eval() for model in scale.networks(name)]
    batches = [scale.batch(scale.of(500, 8)) for _ in range(scale.of(20, 1))]
    spec, method = modeconn.discover(networks[0]), ActivationMatching(num_examples=None)

    @torch.no_grad()
    def forward() -> None:
        for model in networks:
            for x, _ in batches:
                model(x)

    rivals: Rivals = {
        "two passes": forward,
        "align": lambda: modeconn.align(*networks, batches, method=method, spec=spec),
    }
    return compared(scale, "align", rivals, scale.of(5, 2))


def attack(scale: Scale, name: str) -> dict[str, Any]:
    """`PGD` against as many passes forward and back to the inputs."""
    model = scale.networks(name)[0].eval()
    x, y = scale.batch(scale.of(128, 2))
    fixed, inputs = copy.deepcopy(model).requires_grad_(False), x.clone().requires_grad_()
    steps = scale.of(10, 2)
    pgd = PGD(8 / 255, 2 / 255, steps)

    def plain() -> None:
        for _ in range(steps):
            torch.autograd.grad(F.cross_entropy(fixed(inputs), y), inputs)

    return compared(scale, "PGD", {"passes": plain, "PGD": lambda: pgd(model, x, y)}, scale.of(15, 2))


# -- training


def training(scale: Scale) -> dict[str, Any]:
    """An epoch of `models.train` against a loop."""
    model, batches, recipe = _epoch(scale)
    rivals: Rivals = {
        "loop": partial(_loop, model, batches),
        "models.train": lambda: models.train(model, batches, recipe=recipe),
    }
    return compared(scale, "models.train", rivals, scale.of(5, 2))


def curve_fit(scale: Scale) -> dict[str, Any]:
    """An epoch of `fit_curve`, everything in it, against a loop that trains one network."""
    model, batches, recipe = _epoch(scale)
    other = scale.networks("tinyten")[1]
    rivals: Rivals = {
        "loop": partial(_loop, model, batches),
        "fit_curve": lambda: fit_curve(model, other, batches, align=False, recipe=recipe),
    }
    return compared(scale, "fit_curve", rivals, scale.of(5, 2))


def _epoch(scale: Scale) -> tuple[nn.Module, list[Batch], Recipe]:
    batches = [scale.batch(scale.of(128, 4))] * scale.of(100, 2)
    return scale.networks("tinyten")[0], batches, Recipe(1, partial(SGD, fused=True), constant)


def _loop(model: nn.Module, batches: list[Batch]) -> None:
    model = copy.deepcopy(model).train()
    optimizer = SGD(model.parameters(), weight_decay=5e-4, fused=True)
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# -- matching of weights


def matching(scale: Scale, name: str) -> dict[str, Any]:
    """`WeightMatching` against the products of weights and the assignments that its steps consist of."""
    a = _wide(name, quick=scale.quick)
    spec = modeconn.discover(a)
    b = planted(spec, a)
    a, b = a.to(scale.device), b.to(scale.device)
    now = partial(synchronised, scale.device)
    WeightMatching().match(spec, a, b)  # imports, and memory that is then at hand
    seconds: dict[str, list[float]] = {"match": [], "products and assignments": []}
    for _ in range(scale.of(5, 2)):
        start = now()
        WeightMatching().match(spec, a, b)
        seconds["match"].append(now() - start)
        seconds["products and assignments"].append(bound(spec, a, b, now).seconds)
    peak = {"match": _peak(scale, lambda: WeightMatching().match(spec, a, b)), "products and assignments": None}
    return _result("match", "products and assignments", seconds) | {"peak bytes": peak}


def _wide(name: str, *, quick: bool) -> nn.Module:
    if name == "mlp":
        return models.mlp(784, (32, 32) if quick else (512, 512, 512), 10, seed=1)
    return models.resnet20(width=0.5 if quick else 4, seed=1)
