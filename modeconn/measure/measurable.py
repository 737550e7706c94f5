"""The verbs that measure what lies on a curve, for anything that has a network at every position."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from modeconn.measure.along import chosen_positions
from modeconn.measure.curvature import Curvature, Wrt, curvature_along
from modeconn.measure.explore import explorer, library
from modeconn.measure.meter import Meter, fetch
from modeconn.measure.metrics import AnyMetric, as_metrics
from modeconn.measure.predictions import Predictions, predictions_along
from modeconn.measure.profile import Networks, Profile, profile_along
from modeconn.measure.robust_profile import RobustProfile
from modeconn.measure.robustness import Attacks, robustness_along
from modeconn.network.attack import AdversarialExamples, Attack, is_attack
from modeconn.network.batch_norm import NUM_EXAMPLES
from modeconn.network.batches import check_loader, first_batch
from modeconn.network.loss import Forward, LossFn, TrainingData
from modeconn.network.shares import check_whole, facts_of
from modeconn.tools.callbacks import Callbacks
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import identify
from modeconn.tools.processes import joined, shared
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown


class NetworksByPosition(Protocol):
    """What is measured: a network at every t in [0, 1]."""

    def networks(self, recalibrate: Any, num_examples: int | None, repair: bool, forward: Forward | None) -> Networks:
        """Return one network that can be moved along, its statistics set right in one way at every position."""
        ...

    def facts(self) -> dict[str, str]:
        """Return what has to be the same in processes that share the measuring."""
        ...

    def arc_length(self, t: Sequence[float]) -> Tensor:
        """Return the length from 0 to each position, float64 ``(N,)``."""
        ...


class Measurable(Shown):
    """The verbs that measure what lies on a curve.

    Args:
        path: Where the networks are.
        training: Data and loss of the fit.
        device: Of the networks.
    """

    def __init__(self, path: NetworksByPosition, training: TrainingData, device: torch.device) -> None:
        self._path, self.training, self.device = path, training, device

    @shared
    @checked
    def evaluate(
        self,
        loader: Iterable[Any],
        *,
        t: Sequence[float] | None = None,
        num_points: int = 61,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        loss_fn: LossFn | None = None,
        forward: Forward | None = None,
        metrics: Mapping[str, AnyMetric] | None = None,
        callbacks: Sequence[Any] = (),
        progress: bool = False,
    ) -> Profile:
        """Measure loss, accuracy and other metrics along the curve.

        Batch norm is recalibrated at each point, also at the ends. Test data and the data for recalibration are read
        once. The caller's random state is left as it was. Of processes that are a group of `torch.distributed`, all
        must make this call, with the same data; each measures some of the points, and all get the whole profile.

        Args:
            loader: Data to measure on; it is never what batch norm is recalibrated on, unless you say so.
            t: Positions, rising. Default: ``num_points`` evenly spaced ones, both ends included.
            num_points: How many.
            recalibrate: Training data for batch norm, or `AdversarialExamples` of it; default the fit's training
                loader.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Whether to repair the networks between the ends where there is no batch norm, see `model_at`.
            loss_fn: Default that of the fit, or cross entropy.
            forward: ``forward(model, batch) -> loss`` for batches that are no ``(inputs, targets)``; default that of
                the fit, unless ``loss_fn`` is given. Metrics and accuracy need it to return ``(loss, outputs,
                targets)``.
            metrics: Other metrics by name: objects with ``update(outputs, targets)``, ``compute()`` and ``reset()``,
                such as those of torchmetrics; functions ``(outputs, targets) -> (sum, weight)`` of a batch, whose sums
                are divided at the end, so that batches may have any size; or those of `modeconn.metrics`, of which
                ``disagreement`` and ``cka`` compare every network with one end of the curve.
            callbacks: What is told of every point, see `modeconn.callbacks.Callback`.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If positions are wrong, the loader is empty, can be read only once or has targets outside the
                classes, training data is needed to recalibrate, or a metric is none, has the name of another quantity,
                or computes more than one number.
        """
        positions, named = chosen_positions(t, num_points), as_metrics(metrics)
        self._check_alike(
            loader,
            recalibrate,
            {
                "t": positions,
                "recalibration_examples": recalibration_examples,
                "repair": repair,
                "loss_fn": loss_fn,
                "forward": forward,
                "metrics": named,
            },
        )
        told = Callbacks(callbacks, self.device)
        if forward is None and loss_fn is None:
            forward = self.training.forward
        started = time.perf_counter()
        with seeded(0, self.device):
            check_loader(loader) if forward is None else first_batch(loader)
            networks = self._path.networks(recalibrate, recalibration_examples, repair, forward)
            meter = Meter(fetch(loader, self.device), loss_fn or self.training.loss_fn, forward, named)
            lengths = self._path.arc_length(positions)
            how = {"started": started, "device": self.device, "callbacks": told, "progress": progress}
            return profile_along(networks, meter, positions, lengths, **how)

    @shared
    @checked
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
        """Attack the network at each t: loss and accuracy, clean and under every attack.

        Batch norm is recalibrated at each point, also at the ends, as in `evaluate`.

        Every adversarial example is checked: it must be finite, in its ball and in the pixel range.

        Args:
            loader: Data to attack, inputs in [0, 1]; the normalisation belongs into the model.
            attacks: One or several attacks ``attack(model, x, y) -> x_adv``, such as `PGD` or those of
                `modeconn.attacks.build`; a dict gives them names.
            t: Positions, rising. Default: ``num_points`` evenly spaced ones, both ends included.
            num_points: How many.
            num_examples: Attack only so many examples, the first. None for all.
            recalibrate: Training data for batch norm; default the fit's training loader, clean. `AdversarialExamples`
                takes each network's own, as Tatro et al. (2020) do.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Without batch norm, give every pre-activation between the ends the interpolation of the ends' means
                and standard deviations, see `modeconn.repair`.
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
        positions = chosen_positions(t, num_points)
        self._check_alike(
            loader,
            recalibrate,
            {
                "t": positions,
                "attacks": attacks,
                "num_examples": num_examples,
                "recalibration_examples": recalibration_examples,
                "repair": repair,
                "transfer": transfer,
                "loss_fn": loss_fn,
                "seed": seed,
            },
        )
        networks = self._path.networks(recalibrate, recalibration_examples, repair, None)
        return robustness_along(
            networks,
            positions,
            loader,
            attacks,
            num_examples=num_examples,
            transfer=transfer,
            loss_fn=loss_fn or self.training.loss_fn,
            checkpoint=checkpoint,
            seed=seed,
            statistics=lambda: networks.statistics,
            progress=progress,
        )

    @shared
    @checked
    def curvature(
        self,
        loader: Iterable[Any],
        *,
        wrt: Wrt = "weights",
        t: Sequence[float] | None = None,
        num_points: int = 11,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        num_steps: int = 100,
        tolerance: float = 1e-3,
        loss_fn: LossFn | None = None,
        forward: Forward | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Curvature:
        """Measure the largest eigenvalue of the Hessian of the loss along the curve, by the method of Lanczos.

        Batch norm is recalibrated at each point, also at the ends, as in `evaluate`.

        Args:
            loader: Data whose loss is looked at.
            wrt: "weights", or "inputs", to which the robust loss is related, or "both": weights and the inputs of all
                examples together.
            t: Positions, rising. Default: ``num_points`` evenly spaced ones, both ends included.
            num_points: How many.
            recalibrate: Training data for batch norm, or `AdversarialExamples` of it; default the fit's training
                loader.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Without batch norm, give every pre-activation between the ends the interpolation of the ends' means
                and standard deviations, see `modeconn.repair`.
            num_steps: How many products with the Hessian at most, at each position.
            tolerance: How large the residual of the eigenvector may be, relative to the eigenvalue.
            loss_fn: Default that of the fit, or cross entropy.
            forward: ``forward(model, batch) -> loss`` in its place, for ``wrt="weights"``; default that of the fit,
                unless ``loss_fn`` is given.
            seed: Of the random vectors that the method begins with.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If a setting is out of range, or training data is needed to recalibrate.
        """
        positions = chosen_positions(t, num_points)
        self._check_alike(
            loader,
            recalibrate,
            {
                "t": positions,
                "wrt": wrt,
                "recalibration_examples": recalibration_examples,
                "repair": repair,
                "num_steps": num_steps,
                "tolerance": tolerance,
                "loss_fn": loss_fn,
                "forward": forward,
                "seed": seed,
            },
        )
        if forward is None and loss_fn is None:
            forward = self.training.forward
        networks = self._path.networks(recalibrate, recalibration_examples, repair, forward)
        return curvature_along(
            networks,
            positions,
            loader,
            wrt=wrt,
            statistics=lambda: networks.statistics,
            arc_length=self._path.arc_length(positions),
            num_steps=num_steps,
            tolerance=tolerance,
            loss_fn=loss_fn or self.training.loss_fn,
            forward=forward,
            seed=seed,
            progress=progress,
        )

    def explore(self, loader: Iterable[Any], *, quantity: str = "loss", num_points: int = 25, **settings: Any) -> Any:
        """Show the networks along the curve in a notebook: a slider over t, their values, a figure with a mark.

        Args:
            loader: Data to measure on.
            quantity: What the figure shows: "loss", "accuracy", "error" or the name of a metric.
            num_points: How many positions the slider has, both ends included; all are measured first.
            settings: Of `evaluate`, such as ``recalibrate`` or ``metrics``.

        Returns:
            A widget, which notebooks show.

        Raises:
            ImportError: If ipywidgets is not installed.
            ValueError: If there is no such quantity, and for all that `evaluate` raises one for.
        """
        library()  # before anything is measured
        return explorer(self.evaluate(loader, num_points=num_points, **settings), quantity)

    @shared
    @checked
    def predict(
        self,
        loader: Iterable[Any],
        *,
        t: Sequence[float] | None = None,
        num_points: int = 11,
        attack: Attack | None = None,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        seed: int = 0,
        progress: bool = False,
    ) -> Predictions:
        """Return the probabilities that the network at each t gives to each class, for every example.

        Batch norm is recalibrated at each point, also at the ends, as in `evaluate`.

        Args:
            loader: Inputs and classes.
            t: Positions, rising. Default: ``num_points`` evenly spaced ones, both ends included.
            num_points: How many.
            attack: What attacks the examples of each network anew, ``attack(model, x, y) -> x_adv``; inputs are then in
                [0, 1]. Default: none.
            recalibrate: Training data for batch norm, or `AdversarialExamples` of it; default the fit's training
                loader.
            recalibration_examples: How many examples of it to use, None for all.
            repair: Whether to repair the networks between the ends where there is no batch norm, see `model_at`.
            seed: Of the attack: the same random numbers at every t.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If outputs are no scores of classes, positions are wrong, or training data is needed to
                recalibrate.
        """
        positions = chosen_positions(t, num_points)
        if attack is not None and not is_attack(attack):
            raise ValueError(f"attack must be called as attack(model, x, y), such as PGD(...), got {attack!r:.80}.")
        settings = {"t": positions, "attack": attack, "recalibration_examples": recalibration_examples}
        self._check_alike(loader, recalibrate, {**settings, "repair": repair, "seed": seed})
        with seeded(0, self.device):
            check_loader(loader)
            networks = self._path.networks(recalibrate, recalibration_examples, repair, None)
            how = {"seed": seed, "device": self.device, "progress": progress}
            return predictions_along(networks, positions, fetch(loader, self.device), attack, **how)

    def _check_alike(self, loader: Iterable[Any], recalibrate: Any, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError unless all processes that share the measuring measure the same in the same way."""
        loss_fn = settings.get("loss_fn") or self.training.loss_fn
        check_alike(loader, recalibrate, {**settings, "loss_fn": loss_fn}, self._path.facts, self.device)


def check_alike(
    loader: Iterable[Any],
    recalibrate: Any,
    settings: Mapping[str, Any],
    facts: Callable[[], Mapping[str, str]],
    device: torch.device,
) -> None:
    """Raise a ValueError unless all processes that share the measuring measure the same in the same way.

    Args:
        loader: Data to measure on.
        recalibrate: Data on which batch norm is recalibrated, or None.
        settings: All others, by name.
        facts: Returns what tells what is measured from anything else, where there are several processes.
        device: Where random numbers are drawn.
    """
    them = joined()
    if them.size == 1:
        return
    check_whole(loader)
    with seeded(0, device):
        plain = recalibrate.loader if isinstance(recalibrate, AdversarialExamples) else recalibrate
        of_data = facts_of(loader, is_measured=True) | facts_of(plain, name="recalibrate", is_measured=True)
        texts = {
            name: identify(value) for name, value in {**settings, "adversary": _without_loader(recalibrate)}.items()
        }
        them.agree({**texts, **facts(), **of_data})


def _without_loader(recalibrate: Any) -> Any:
    """Return the adversary of what batch norm is recalibrated on, None for plain data."""
    return replace(recalibrate, loader=()) if isinstance(recalibrate, AdversarialExamples) else None
