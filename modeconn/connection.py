"""The result of connecting two networks: a curve with its control points, and the networks on it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modeconn.curves import CURVES, Curve, Line
from modeconn.measure.profile import Meter, Objective, Profile, fetch
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import NUM_EXAMPLES, calibration_batches, norm_layers
from modeconn.network.batch_norm import recalibrate as recalibrate_statistics
from modeconn.network.batches import check_loader, first_batch
from modeconn.network.copies import copy_of
from modeconn.network.loss import LossFn, cross_entropy
from modeconn.network.repair import Statistics, impose, measure, mix
from modeconn.network.weights import WeightSpace, load_buffers, named_buffers
from modeconn.symmetry import Permutation, PermutationSpec
from modeconn.tools import files as checkpoint
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded

if TYPE_CHECKING:
    from modeconn.measure.curvature import Curvature
    from modeconn.measure.robust_profile import RobustProfile
    from modeconn.measure.robustness import Attacks

_KIND = "connection"
_FORMAT = 1


@dataclass(frozen=True)
class History:
    """What happened while a curve was learned.

    Args:
        loss: Mean training loss of each epoch, without the weight penalty.
        loss_by_t: The same for ten equal bins of t, one list of ten an epoch; None where no batch fell into a bin.
        seconds: Time of training alone, over all parts of an interrupted run.
        turns: What each step of `PAM` in the permutation did.
    """

    loss: list[float] = field(default_factory=list)
    loss_by_t: list[list[float | None]] = field(default_factory=list)
    seconds: float = 0.0
    turns: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingData:
    """What a fit knew of its data and loss, remembered in memory, never in files."""

    loader: Iterable[Any] | None = None
    loss_fn: LossFn = cross_entropy
    forward: Objective | None = None


class Connection:
    """A curve between two networks of one architecture.

    At t=0 it is network a and at t=1 the relabelled network b, both bit for bit, weights and buffers; between them
    weights follow the curve, batch norm is recalibrated on training data, and other buffers are a's.

    Args:
        template: A network of the architecture; it is copied, and its weights do not matter.
        curve: The curve.
        control_points: ``(K, P)``, in the weight space of ``template``.
        buffers: All buffers of both ends, by name.
        permutation: How b was relabelled, or None if it was not.
        history: What happened in the fit, or None if nothing was learned.
        training: Data and loss of the fit.

    Attributes:
        space: The weight space, which names the parts of each control point.
    """

    def __init__(
        self,
        template: nn.Module,
        curve: Curve,
        control_points: Tensor,
        buffers: tuple[dict[str, Tensor], dict[str, Tensor]],
        *,
        permutation: Permutation | None = None,
        history: History | None = None,
        training: TrainingData | None = None,
    ) -> None:
        self.space = WeightSpace(template)
        expected = (curve.num_control_points, self.space.num_parameters)
        if control_points.shape != expected:
            raise ValueError(f"control_points must have shape {expected}, got {tuple(control_points.shape)}.")
        self.curve = curve
        self.control_points = control_points.detach()
        self.buffers = buffers
        self.permutation = permutation
        self.history = history
        self.training = training or TrainingData()
        self._template = copy_of(template).eval()
        self._calibration: dict[int | None, Any] = {}

    @classmethod
    def straight_between(cls, model_a: nn.Module, model_b: nn.Module, **kwargs: Any) -> Connection:
        """Connect two networks by a straight line, as they are.

        Raises:
            ValueError: If they differ in architecture, dtype or device, or hold weights that are not finite.
        """
        space = WeightSpace(model_a)
        ends = torch.stack([space.flatten(model_a, name="a"), space.flatten(model_b, name="b")])
        return cls(model_a, Line(), ends, (named_buffers(model_a), named_buffers(model_b)), **kwargs)

    def __repr__(self) -> str:
        parts = [
            repr(self.curve),
            f"{self.space.num_parameters} weights",
            f"length {self.length():.4g}",
            "b as it was" if self.permutation is None else "b relabelled",
        ]
        if self.history is not None and self.history.loss:
            parts.append(f"{len(self.history.loss)} epochs, training loss {self.history.loss[-1]:.4g}")
        return f"Connection({', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        """Where the control points are."""
        return self.control_points.device

    def weights_at(self, t: float) -> Tensor:
        """Return the weights at ``t`` as a new vector ``(P,)``; ``space.unflatten`` names them."""
        return self.curve.point(self.control_points, t)

    def model_at(
        self,
        t: float,
        *,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
    ) -> nn.Module:
        """Return the network at ``t`` as a new model in eval mode.

        Args:
            t: Position in [0, 1].
            recalibrate: Training data that batch norm is recalibrated on, or `AdversarialExamples` of it. Default:
                between the ends, the fit's training loader; at the ends, which have statistics of their own, nothing
                is recalibrated.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Without batch norm, give every pre-activation between the ends the interpolation of their means and
                standard deviations on that data, see `modeconn.repair`. With batch norm, recalibration does.

        Raises:
            ValueError: If t is outside [0, 1], or batch norm or repair needs training data that is neither remembered
                nor given.
        """
        model, theta = copy_of(self._template), self.weights_at(t)
        keeps_own = recalibrate is None and t in (0, 1) and not self.curve.free_ends
        data = [] if keeps_own else self._calibration_data(recalibrate, recalibration_examples, repair)
        self._place(model, t, theta, data, self._statistics_of_ends(data) if repair else None)
        return model

    def evaluate(
        self,
        loader: Iterable[Any],
        *,
        num_points: int = 61,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        loss_fn: LossFn | None = None,
        forward: Objective | None = None,
        progress: bool = False,
    ) -> Profile:
        """Measure loss and accuracy at points evenly spaced in t, batch norm recalibrated at each, ends included.

        Test data and the data for recalibration are read once. The caller's random state is left as it was.

        Args:
            loader: Data to measure on; it is never what batch norm is recalibrated on, unless you say so.
            num_points: How many points, both ends included.
            recalibrate: Training data for batch norm, or `AdversarialExamples` of it; default the fit's training
                loader.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Whether to repair the networks between the ends where there is no batch norm, see `model_at`.
            loss_fn: Default that of the fit, or cross entropy.
            forward: ``forward(model, batch) -> loss`` for batches that are no ``(inputs, targets)``; default that of
                the fit, unless ``loss_fn`` is given.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If the loader is empty, can be read only once or has targets outside the classes, or training
                data is needed to recalibrate.
        """
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, to hold both ends, got num_points={num_points}.")
        if forward is None and loss_fn is None:
            forward = self.training.forward
        start = time.perf_counter()
        with seeded(0, self.device):
            check_loader(loader) if forward is None else first_batch(loader)
            calibration = self._calibration_data(recalibrate, recalibration_examples, repair)
            ends = self._statistics_of_ends(calibration) if repair else None
            meter = Meter(fetch(loader, self.device), loss_fn or self.training.loss_fn, forward)
            t = torch.linspace(0, 1, num_points, dtype=torch.float64)
            own = self._measure(meter, t, calibration, ends, progress=progress)
        loss, accuracy = meter.results()
        return Profile(
            t=t,
            loss=loss[:num_points],
            accuracy=None if accuracy is None else accuracy[:num_points],
            arc_length=self.curve.arc_length(self.control_points, t),
            own_loss=loss[own],
            own_accuracy=None if accuracy is None else accuracy[own],
            num_examples=meter.num_examples,
            seconds=time.perf_counter() - start,
        )

    def robustness(
        self,
        loader: Iterable[Any],
        attacks: Attacks,
        *,
        t: Sequence[float] | None = None,
        num_points: int = 11,
        num_examples: int | None = None,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        transfer: bool = False,
        loss_fn: LossFn | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> RobustProfile:
        """Attack the network at each t, as `model_at` returns it: loss and accuracy, clean and under every attack.

        Every adversarial example is checked: it must be finite, in its ball and in the pixel range.

        Args:
            loader: Data to attack, inputs in [0, 1]; the normalisation belongs into the model.
            attacks: One or several attacks ``attack(model, x, y) -> x_adv``, such as `PGD` or those of
                `modeconn.attacks.build`; a dict gives them names.
            t: Positions, rising. Default: ``num_points`` evenly spaced ones, both ends included.
            num_points: How many.
            num_examples: Attack only so many examples, the first. None for all.
            recalibrate: What batch norm is recalibrated on. Default: between the ends, the fit's training data, clean,
                while the ends keep the statistics they came with. A loader recalibrates the ends too;
                `AdversarialExamples` takes each network's own, as Tatro et al. (2020) do.
            recalibration_examples: How many examples of it to use, None for all.
            repair: See `model_at`.
            transfer: Whether to evaluate what an attack finds at each t at all others too, which keeps the networks at
                all t in memory. Once a position is added, everything is attacked again.
            loss_fn: Default that of the fit, or cross entropy.
            checkpoint: A file of finished measurements, a line for each t, attack and batch. What is in it is not
                measured again, also if attacks or positions have been added meanwhile (positions not with transfer).
            seed: Of the attacks: the same random numbers at every t.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If inputs are outside [0, 1], positions are wrong, training data is needed to recalibrate, or an
                attack leaves its ball or the pixel range.
            FloatingPointError: If an attack returns NaN.
        """
        from modeconn.measure.robustness import along

        return along(
            lambda position: self.model_at(
                position, recalibrate=recalibrate, recalibration_examples=recalibration_examples, repair=repair
            ),
            positions(t, num_points),
            loader,
            attacks,
            num_examples=num_examples,
            transfer=transfer,
            loss_fn=loss_fn or self.training.loss_fn,
            checkpoint=checkpoint,
            seed=seed,
            progress=progress,
        )

    def curvature(
        self,
        loader: Iterable[Any],
        *,
        wrt: Literal["weights", "inputs"] = "weights",
        t: Sequence[float] | None = None,
        num_points: int = 11,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        num_steps: int = 100,
        tolerance: float = 1e-3,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Curvature:
        """Measure the largest eigenvalue of the Hessian of the loss along the curve.

        Args:
            loader: Data whose loss is looked at.
            wrt: "weights", or "inputs", to which the robust loss is related.
            t: See `robustness`, as for ``num_points``, ``recalibrate``, ``recalibration_examples`` and ``repair``.
            num_points: Likewise.
            recalibrate: Likewise.
            recalibration_examples: Likewise.
            repair: Likewise.
            num_steps: See `modeconn.measure.curvature.largest_eigenvalue`, as for ``tolerance`` and ``seed``.
            tolerance: Likewise.
            loss_fn: Default that of the fit, or cross entropy.
            seed: Likewise.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If a setting is out of range, or training data is needed to recalibrate.
        """
        from modeconn.measure.curvature import Curvature, largest_eigenvalue

        chosen, found = positions(t, num_points), []
        for position in progress_bar(chosen, show=progress, desc="curvature"):
            model = self.model_at(
                position, recalibrate=recalibrate, recalibration_examples=recalibration_examples, repair=repair
            )
            value, num_examples = largest_eigenvalue(
                model,
                loader,
                wrt=wrt,
                num_steps=num_steps,
                tolerance=tolerance,
                loss_fn=loss_fn or self.training.loss_fn,
                seed=seed,
            )
            found.append(value)
        return Curvature(
            torch.tensor(chosen, dtype=torch.float64), torch.tensor(found, dtype=torch.float64), wrt, num_examples
        )

    def straight(self) -> Connection:
        """Return the straight connection of the same ends."""
        return Connection(
            self._template,
            Line(),
            self.control_points[[0, -1]],
            self.buffers,
            permutation=self.permutation,
            training=self.training,
        )

    def length(self) -> float:
        """Return the length of the curve in weight space, in the Euclidean norm."""
        return self.curve.length(self.control_points)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the connection to a safetensors file: all but training data and loss.

        Raises:
            OSError: If the file cannot be written.
        """
        from modeconn import models

        if type(self.curve).__name__ not in CURVES:
            raise ValueError(f"only {', '.join(CURVES)} can be saved, got {self.curve!r}.")
        tensors = {"control_points": torch.stack([self.space.to_canonical(row) for row in self.control_points])}
        for end, buffers in zip("ab", self.buffers, strict=True):
            tensors |= {f"buffers.{end}.{name}": buffer for name, buffer in buffers.items()}
        tensors |= permutation_tensors(self.permutation)
        about = {
            "format": _FORMAT,
            "curve": [type(self.curve).__name__, asdict(self.curve)],
            "parameters": self.space.shapes,
            "model": models.describe(self._template),
            "permutation": None if self.permutation is None else self.permutation.spec.to_json(),
            "history": None if self.history is None else asdict(self.history),
        }
        checkpoint.write(path, _KIND, tensors, about)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        template: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Connection:
        """Read a connection.

        Args:
            path: A file that `save` wrote.
            template: A model of the same architecture, whose memory format the connection takes; needed unless the
                networks came from `modeconn.models`.
            device: Where the connection is to be; default: where ``template`` is, else the CPU.

        Raises:
            ValueError: If the file is no connection, or the template differs from it: the first name that differs.
        """
        tensors, about = checkpoint.read(path, _KIND)
        points = tensors.pop("control_points")
        template = _rebuild(about["model"], points.dtype, path) if template is None else template
        if device is not None:
            template = copy_of(template).to(device)  # a copy: `to` moves the caller's own
        buffers = tuple(
            {name.removeprefix(start): buffer for name, buffer in tensors.items() if name.startswith(start)}
            for start in ("buffers.a.", "buffers.b.")
        )
        space = WeightSpace(template)
        _check_template(about["parameters"], space.shapes)
        _check_template(_shapes(buffers[0]), _shapes(dict(template.named_buffers())))
        if points.dtype != space.dtype:
            raise ValueError(f"the file holds {points.dtype} weights, template has {space.dtype}.")
        name, arguments = about["curve"]
        return cls(
            template,
            CURVES[name](**arguments),
            torch.stack([space.from_canonical(row) for row in points]),
            tuple({name: buffer.to(space.device) for name, buffer in side.items()} for side in buffers),
            permutation=saved_permutation(tensors, about["permutation"]),
            history=None if about["history"] is None else History(**about["history"]),
        )

    def _measure(
        self,
        meter: Meter,
        t: Tensor,
        calibration: list[Any] | AdversarialExamples,
        ends: tuple[Statistics, ...] | None,
        *,
        progress: bool,
    ) -> list[int]:
        """Measure the points ``t``, then both ends as they came; return where among the results the latter are."""
        model, theta = copy_of(self._template), torch.empty_like(self.control_points[0])
        for position in progress_bar(t.tolist(), show=progress, desc="evaluate"):
            self._place(model, position, self.curve.point(self.control_points, position, out=theta), calibration, ends)
            meter.measure(model)
        if not calibration or self.curve.free_ends:  # trained ends have no statistics but the recalibrated ones
            return [0, len(t) - 1]
        for end in (0, 1):
            self._place(model, end, self.control_points[-end], [])
            meter.measure(model)
        return [len(t), len(t) + 1]

    def _place(
        self,
        model: nn.Module,
        t: float,
        theta: Tensor,
        calibration: list[Any] | AdversarialExamples,
        ends: tuple[Statistics, ...] | None = None,
    ) -> None:
        """Make ``model`` the network at ``t``, of weights ``theta``."""
        self.space.load(theta, model)
        load_buffers(self.buffers[1 if t == 1 else 0], model)
        if calibration:
            recalibrate_statistics(model, calibration, forward=self.training.forward)
        if ends is not None and 0 < t < 1:
            impose(model, mix(ends, (1 - t, t)), calibration, forward=self.training.forward)

    def _statistics_of_ends(self, calibration: list[Any]) -> tuple[Statistics, ...] | None:
        """Return what repair takes from the ends; None for a model with batch norm, which recalibration repairs."""
        if norm_layers(self._template) or not calibration:
            return None
        model, found = copy_of(self._template), []
        for end in (0, 1):
            self._place(model, end, self.control_points[-end], [])
            found.append(measure(model, calibration, forward=self.training.forward))
        return tuple(found)

    def _calibration_data(
        self, loader: Iterable[Any] | AdversarialExamples | None, limit: int | None, repair: bool
    ) -> list[Any] | AdversarialExamples:
        """Return the batches to recalibrate or repair on; none for a model that needs neither."""
        if not (repair or norm_layers(self._template)):
            return []
        if isinstance(loader, AdversarialExamples) and not norm_layers(self._template):
            raise ValueError("repair knows clean data alone: pass recalibrate= a plain loader.")
        if loader is not None:
            return calibration_batches(loader, self.device, limit=limit, name="recalibrate")
        if self.training.loader is None:
            raise ValueError(
                f"between the ends of a connection {'repair' if repair else 'batch norm'} needs statistics of training "
                "data, but this connection remembers none: it was loaded, or made without a loader. Pass recalibrate=, "
                "a loader of such data."
            )
        if limit not in self._calibration:
            self._calibration[limit] = calibration_batches(self.training.loader, self.device, limit=limit)
        return self._calibration[limit]


def positions(t: Sequence[float] | None, num_points: int) -> list[float]:
    """Return the positions to look at: those given, or evenly spaced ones.

    Raises:
        ValueError: If those given do not rise, or there are fewer than both ends.
    """
    if t is None:
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, to hold both ends, got num_points={num_points}.")
        return torch.linspace(0, 1, num_points, dtype=torch.float64).tolist()
    chosen = [float(position) for position in t]
    if not chosen or any(not 0 <= position <= 1 for position in chosen) or chosen != sorted(set(chosen)):
        raise ValueError(f"t must hold rising positions in [0, 1], got t={chosen}.")
    return chosen


_PERMUTATION = "permutation."


def permutation_tensors(permutation: Permutation | None) -> dict[str, Tensor]:
    """Return the tensors by which a file holds a permutation; its spec goes into the description."""
    return {} if permutation is None else {f"{_PERMUTATION}{name}": perm for name, perm in permutation.perms.items()}


def saved_permutation(tensors: dict[str, Tensor], spec: Any) -> Permutation | None:
    """Invert `permutation_tensors`, with the spec as JSON; None if there is none."""
    if spec is None:
        return None
    perms = {name.removeprefix(_PERMUTATION): perm for name, perm in tensors.items() if name.startswith(_PERMUTATION)}
    return Permutation(PermutationSpec.from_json(spec), perms)


def warn_about_buffers(model_a: nn.Module, model_b: nn.Module) -> None:
    """Warn of floating-point buffers that differ between the ends and that nothing re-estimates between them."""
    layers = norm_layers(model_a).values()
    estimated = {id(buffer) for layer in layers for buffer in (layer.running_mean, layer.running_var)}
    others = dict(model_b.named_buffers())
    differ = [
        name
        for name, buffer in model_a.named_buffers()
        if id(buffer) not in estimated and buffer.is_floating_point() and not torch.equal(buffer, others[name])
    ]
    if differ:
        warnings.warn(
            f"buffers {', '.join(map(repr, differ))} differ between the networks and are no batch-norm statistics; "
            f"networks between them take those of the first.",
            stacklevel=3,
        )


def _rebuild(described: list[Any] | None, dtype: torch.dtype, path: str | os.PathLike[str]) -> nn.Module:
    if described is None:
        raise ValueError(
            f"{os.fspath(path)!r} connects networks that are not of modeconn.models. "
            f"Pass template=, a model of the same architecture."
        )
    from modeconn import models

    name, arguments = described
    return models.build(name, **arguments).to(dtype)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_template(saved: dict[str, Any], template: dict[str, tuple[int, ...]]) -> None:
    for name in [*saved, *template]:
        sides = [tuple(shapes[name]) if name in shapes else "missing" for shapes in (saved, template)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"template is of another architecture: {name!r} is {sides[0]} in the file, {sides[1]} in it."
            )
