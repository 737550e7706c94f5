"""The same work on the CPU and on another device: what it is done on, and how the two results are compared.

A check is a function of one `Agreement`, registered by `check`. What the caller of a verb may rely on is looked at in
every check: the models that it passed and the random state are as they were, and results lie where they should.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerator_report import Clock, LeftOut, Report, attempt
from torch import Tensor, nn

import modeconn
from modeconn import Permutation, Recipe, data, models

TOLERANCE = 1e-4
"""How far two results may be apart, relative to their size or to 1, whichever is larger."""

CPU = torch.device("cpu")


# -- the register


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: What it is of.
        run: What it does; it raises, or notes what is wrong in the `Agreement`.
        seconds: What it takes at most, roughly, on a device worth the name.
        known: The fault of the package that makes it fail, until that is mended; it then does not count.
    """

    name: str
    run: Callable[[Agreement], None]
    seconds: float
    known: str | None


CHECKS: list[Check] = []


def check(
    name: str, *, seconds: float = 5.0, known: str | None = None
) -> Callable[[Callable[[Agreement], None]], Callable[[Agreement], None]]:
    """Register a function as the check called ``name``."""

    def register(run: Callable[[Agreement], None]) -> Callable[[Agreement], None]:
        CHECKS.append(Check(name, run, seconds, known))
        return run

    return register


def run_checks(report: Report, device: torch.device, clock: Clock, *, quick: bool, only: str, reserve: float) -> None:
    """Run the checks whose names hold ``only``, in their order, while more than ``reserve`` seconds are left."""
    with _strict(device):
        for one in CHECKS:
            if only not in one.name:
                continue
            if not quick and clock.left - reserve < one.seconds:
                report.leave_out("agreement", one.name, f"{clock.left:.0f} s are left, of which {reserve:.0f} are kept")
                continue
            agreement = Agreement(device, quick)
            result = attempt(partial(_checked, one, agreement))
            if "left out" in result:
                report.leave_out("agreement", one.name, result["left out"])
                continue
            result |= agreement.summary() | ({"known": one.known} if one.known else {})
            report.put("agreement", one.name, result)
            print(_line(one.name, result), flush=True)


def _checked(one: Check, agreement: Agreement) -> dict[str, Any]:
    one.run(agreement)
    if agreement.problems:
        raise AssertionError("; ".join(agreement.problems))
    return {}


def _line(name: str, result: dict[str, Any]) -> str:
    verdict = "ok" if result["ok"] else f"FAILED: {result['error'][:300]}"
    if "known" in result:
        verdict = "ok, though it was known to fail" if result["ok"] else f"fails, as is known: {result['known']}"
    difference = result.get("largest difference")
    shown = "" if difference is None else f"{difference:8.1e}"
    return f"  {name:<66} {shown:>8} {result['seconds']:6.1f} s  {verdict}"


@contextmanager
def _strict(device: torch.device) -> Iterator[None]:
    """Compute in full precision, by algorithms that give the same bits each time where there is a choice."""
    flags = (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")
    flags += (torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark")
    before = [getattr(where, name) for where, name in flags]
    for (where, name), value in zip(flags, (False, False, True, False), strict=True):
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name), value in zip(flags, before, strict=True):
            setattr(where, name, value)


# -- what the work is done on


class Residual(nn.Module):
    """A convolutional network with batch norm and a residual block, of 8x8 images; no model of the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = (x + self.bn2(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """Reads the rows of an image one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attending(nn.Module):
    """A transformer of one layer on the rows of an image, which makes a tensor of positions inside ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.places = nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.layer(self.embed(x) + places).mean(1))


class Turning(nn.Module):
    """A transformer of one layer with norms before its parts, whose residual stream may be rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))).mean(1))


_ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.mlp(64, (24, 24), 10), (64,)),
    "small": (lambda: models.mlp(64, (8, 8), 10), (64,)),
    "conv": (Residual, (1, 8, 8)),
    "recurrent": (Recurrent, (8, 8)),
    "attending": (Attending, (8, 8)),
    "turning": (Turning, (8, 8)),
}
_COUNTS = {"small": 8}
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)
_ADAM = partial(torch.optim.Adam, lr=3e-3)


@dataclass(frozen=True)
class Case:
    """Trained networks of one architecture in float64, with digits in batches, all on the CPU."""

    networks: list[nn.Module]
    train: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]


@cache
def case(name: str) -> Case:
    """Make a case, always the same."""
    build, shape = _ARCHITECTURES[name]
    train, test = (
        dataclasses.replace(loader, inputs=loader.inputs.double().reshape(-1, *shape), shuffle=False)
        for loader in data.load("digits")
    )
    train, test = train.subset(torch.arange(320)), test.subset(torch.arange(200)).with_(batch_size=100)
    recipe = Recipe(epochs=3, optimizer=_ADAM, weight_decay=0.0)
    networks = []
    for seed in range(_COUNTS.get(name, 3)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1)  # of the CPU alone
            networks.append(models.train(_lively(build().double()), list(train), recipe=recipe))
    return Case(networks, list(train), list(test))


def _lively(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # zeros and equal values hide mistakes
        nn.init.normal_(parameter, std=0.5 / max(1, parameter[0].numel()) ** 0.5) if parameter.dim() > 1 else None
    return model


@cache
def spec_of(name: str) -> modeconn.PermutationSpec:
    """Return the symmetries of a case, found on the CPU; data comes with them, as not every model has an example."""
    return modeconn.discover(case(name).networks[0], case(name).train[0][0])


class Place:
    """One of the two sides of a check: makes everything, and remembers what it gave away.

    Args:
        device: Where models are.
        folder: For files, its own.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self._given: list[tuple[nn.Module, dict[str, Any]]] = []

    def give(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model, on the device, that is looked at again in the end."""
        given = copy.deepcopy(model).to(self.device)
        self._given.append((given, _state_of(given)))
        return given

    def networks(self, name: str, count: int = 2, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
        """Return the first networks of a case."""
        return [self.give(copy.deepcopy(model).to(dtype)) for model in case(name).networks[:count]]

    def batches(self, name: str, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
        """Return training batches, on the CPU wherever the models are."""
        return [(x.to(dtype), y) for x, y in case(name).train]

    def test(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return test batches, on the CPU."""
        return case(name).test

    def loader(self, name: str) -> data.TensorLoader:
        """Return the training batches as a loader on the device."""
        x, y = (torch.cat(parts) for parts in zip(*case(name).train, strict=True))
        size = len(case(name).train[0][1])
        return data.TensorLoader(x.to(self.device), y.to(self.device), size, num_classes=10)

    def changed(self) -> list[str]:
        """Say which of the models given away are no longer as they were."""
        return [
            f"{kind} of a model passed in changed on {self.device}"
            for model, before in self._given
            for kind, value in _state_of(model).items()
            if not _same(value, before[kind])
        ]


def _state_of(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "devices": {name: str(tensor.device) for name, tensor in tensors.items()},
        "training flags": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
    }


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[key], y[key]) for key in x)
    if isinstance(x, Tensor):
        return x.device == y.device and torch.equal(x, y)
    return x == y


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator that a verb might draw from."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": str(np.random.get_state())}  # noqa: NPY002
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


# -- how results are compared


class Agreement:
    """What one check finds.

    Args:
        device: The device beside the CPU.
        quick: Whether sizes are to be tiny.

    Attributes:
        problems: What is wrong, a sentence each.
        notes: What else is worth knowing.
    """

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.problems: list[str] = []
        self.notes: dict[str, Any] = {}
        self._differences: dict[str, float] = {}

    def need_second_device(self) -> None:
        """Leave the check out where there is nothing beside the CPU."""
        if self.device.type == "cpu":
            raise LeftOut("it needs a second device")

    def both(self, work: Callable[[Place], Any], *, tolerance: float = TOLERANCE) -> tuple[Any, Any]:
        """Do the same on the CPU and on the device, compare, and return both results."""
        results = [self.once(work, device) for device in (CPU, self.device)]
        self.compare(*results, tolerance=tolerance)
        return results[0], results[1]

    def once(self, work: Callable[[Place], Any], device: torch.device | None = None) -> Any:
        """Do something on a device, by default that beside the CPU; what is the caller's must stay as it was."""
        with tempfile.TemporaryDirectory() as folder:
            place = Place(self.device if device is None else device, Path(folder))
            before = random_states(self.device)
            result = work(place)
            after = random_states(self.device)
        moved = [name for name, state in after.items() if not _same(state, before[name])]
        self.problems += [f"the caller's random state of {name} moved on {place.device}" for name in moved]
        self.problems += place.changed()
        self.problems += [f"{what} on {place.device}" for what in misplaced(result, place.device)]
        return result

    def compare(self, ours: Any, theirs: Any, *, tolerance: float = TOLERANCE) -> None:
        """Note where two results differ by more than the tolerance, and by how much at most."""
        left, right = numbers_of(ours), numbers_of(theirs)
        if left.keys() != right.keys():
            self.problems.append(f"results have other parts: {sorted(left.keys() ^ right.keys())}")
        moved = [name for name in left if isinstance(left[name], Permutation) and left[name] != right[name]]
        stems = [name.removesuffix("permutation") for name in moved]
        follow = tuple(stem + what for stem in stems for what in ("control points", "length", "merged"))
        for name in left.keys() & right.keys():
            if not isinstance(left[name], Permutation) and not name.startswith(follow):
                self.difference(name, left[name], right[name], tolerance)
        self._judge(moved, left)

    def _judge(self, moved: list[str], left: Mapping[str, Any]) -> None:
        """Accept relabellings that differ if an objective was compared beside them, which then agreed."""
        for name in moved:
            stem = name.removesuffix("permutation")
            goals = [key for key in left if key.startswith(stem) and ("history" in key or "correlation" in key)]
            self.notes[f"{name} differs; compared by"] = goals
            if not goals:
                self.problems.append(f"{name} differs, and there is no objective to compare it by")

    def difference(self, name: str, x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> None:
        """Note how far two tensors are apart."""
        x, y = (value.detach().double().cpu() for value in (x, y))
        if x.shape != y.shape:
            self.problems.append(f"{name} has the shapes {tuple(x.shape)} and {tuple(y.shape)}")
            return
        if not x.numel():
            return
        apart = ((x - y).abs() / x.abs().amax().clamp(min=1.0)).amax()
        found = float(apart) if bool(apart.isfinite()) else float("inf")
        if torch.equal(x.isnan(), y.isnan()) and bool(x.isnan().any()):
            found = 0.0 if bool(x.isnan().all()) else found
        limit = 0.02 if "accuracy" in name else tolerance  # an answer on the fence may turn
        if "accuracy" not in name:
            self._differences[name] = max(found, self._differences.get(name, 0.0))
        if not found <= limit:
            self.problems.append(f"{name} differs by {found:.2e}")

    def require(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)

    def summary(self) -> dict[str, Any]:
        """Return the largest difference, those above a tenth of the tolerance, and the notes."""
        found: dict[str, Any] = {}
        if self._differences:
            found["largest difference"] = max(self._differences.values())
            large = {name: value for name, value in self._differences.items() if value > TOLERANCE / 10}
            found |= {"differences": large} if large else {}
        return found | ({"notes": self.notes} if self.notes else {})


@singledispatch
def numbers_of(result: Any) -> dict[str, Any]:
    """Return the tensors and permutations of a result, by name."""
    if result is None or isinstance(result, str):
        return {}
    if isinstance(result, Mapping):
        return _named(result.items())
    if isinstance(result, (tuple, list)) and not all(isinstance(item, (int, float)) for item in result):
        return _named(enumerate(result))
    if dataclasses.is_dataclass(result):
        return _named((f.name, getattr(result, f.name)) for f in dataclasses.fields(result) if f.name != "spec")
    return {"": torch.as_tensor(result)}


def _named(items: Any) -> dict[str, Any]:
    return {f"{name} {inner}".strip(): value for name, item in items for inner, value in numbers_of(item).items()}


@numbers_of.register
def _(result: Tensor) -> dict[str, Any]:
    return {"": result}


@numbers_of.register
def _(result: Permutation) -> dict[str, Any]:
    return {"permutation": result}


@numbers_of.register
def _(result: nn.Module) -> dict[str, Any]:
    return {name: tensor for name, tensor in result.state_dict().items() if tensor.is_floating_point()}


@numbers_of.register
def _(result: modeconn.Alignment) -> dict[str, Any]:
    """Its objective beside the relabelling; the relabelled network follows from that."""
    found = {f"correlation {name}": torch.tensor(pair) for name, pair in result.correlation.items()}
    history = {"history": torch.tensor(result.history, dtype=torch.float64)} if result.history else {}
    return {"permutation": result.permutation, **found, **history}


@numbers_of.register
def _(result: modeconn.Merge) -> dict[str, Any]:
    history = {"history": torch.tensor([result.history[0], result.history[-1]], dtype=torch.float64)}
    return {**_named(enumerate(result.permutations)), **history, **_named([("merged", result.model)])}


@numbers_of.register
def _(result: modeconn.Connection) -> dict[str, Any]:
    found: dict[str, Any] = {"control points": result.control_points, "length": torch.tensor(result.length())}
    if result.permutation is not None:
        found["permutation"] = result.permutation
    if result.history is not None:
        found["history"] = torch.tensor(result.history.loss, dtype=torch.float64)
        found |= {f"turn {k} {n}": torch.tensor(turn[n]) for k, turn in enumerate(result.history.turns) for n in _TURN}
    return found


_TURN = ("loss_before", "loss_after", "num_accepted", "num_moved")


@numbers_of.register
def _(result: modeconn.Profile) -> dict[str, Any]:
    names = ("loss", "accuracy", "arc_length", "own_loss", "own_accuracy")
    return {name: getattr(result, name) for name in names if getattr(result, name) is not None}


@numbers_of.register
def _(result: modeconn.RobustProfile) -> dict[str, Any]:
    transfer = {f"transfer accuracy {row}": value for row, value in (result.transfer or {}).items()}
    rows = {f"accuracy {row}": value for row, value in result.accuracy.items()}
    return {f"loss {row}": value for row, value in result.loss.items()} | rows | transfer


@singledispatch
def misplaced(result: Any, device: torch.device) -> list[str]:
    """Say which tensors of a result are not where they are documented to be."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [problem for item in result for problem in misplaced(item, device)]
    return []


def _not_on(tensors: Mapping[str, Tensor | None], device: torch.device, what: str) -> list[str]:
    return [
        f"{name} of {what} is on {tensor.device}, not on {device.type}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device.type != device.type
    ]


@misplaced.register
def _(result: nn.Module, device: torch.device) -> list[str]:
    return _not_on(result.state_dict(), device, type(result).__name__)


@misplaced.register
def _(result: Permutation, device: torch.device) -> list[str]:
    return _not_on(result.perms, CPU, "a permutation")


@misplaced.register
def _(result: modeconn.Alignment, device: torch.device) -> list[str]:
    return misplaced(result.permutation, device) + misplaced(result.model_b, device)


@misplaced.register
def _(result: modeconn.Merge, device: torch.device) -> list[str]:
    return misplaced(list(result.permutations), device) + misplaced(result.model, device)


@misplaced.register
def _(result: modeconn.Connection, device: torch.device) -> list[str]:
    tensors = {"control points": result.control_points}
    for end, buffers in zip("ab", result.buffers, strict=True):
        tensors |= {f"buffer {name} of {end}": buffer for name, buffer in buffers.items()}
    return _not_on(tensors, device, "a connection")


@misplaced.register
def _(result: modeconn.Profile, device: torch.device) -> list[str]:
    return _not_on(_tensors_of(result), CPU, "a profile")


@misplaced.register
def _(result: modeconn.RobustProfile, device: torch.device) -> list[str]:
    rows = {f"{kind} {row}": value for kind in ("correct", "losses") for row, value in getattr(result, kind).items()}
    return _not_on({"t": result.t, **rows}, CPU, "a robust profile")


def _tensors_of(result: Any) -> dict[str, Tensor | None]:
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
