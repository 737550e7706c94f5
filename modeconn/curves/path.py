"""The networks along a curve: weights, buffers and statistics at every t."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.curves.curve import Curve
from modeconn.curves.line import Line
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import NUM_EXAMPLES, but_for, calibration_batches, check_limit, norm_layers
from modeconn.network.batch_norm import recalibrate as recalibrate_statistics
from modeconn.network.batches import num_examples
from modeconn.network.copies import copy_of
from modeconn.network.estimates import differing, mixed, settle, warn_of
from modeconn.network.loss import Forward, TrainingData
from modeconn.network.repair import Statistics, impose, measure, mix
from modeconn.network.shares import check_whole
from modeconn.network.weights import WeightSpace, load_buffers, named_buffers
from modeconn.tools.fingerprint import digest


class Path:
    """A curve through weight space with the networks on it.

    At t=0 it is network a and at t=1 network b, both bit for bit, weights and buffers; between them weights follow the
    curve, batch norm is recalibrated on training data, and of other buffers `modeconn.network.estimates` says what they
    are, with a warning if they differ between the ends.

    Args:
        template: A network of the architecture; it is copied, and its weights do not matter.
        curve: The curve.
        control_points: ``(K, P)``, in the weight space of ``template``.
        buffers: All buffers of both ends, by name.
        space: The weight space of ``template``, if known.
        training: Data and loss of the fit, if there was one.
        warns: Whether to warn of buffers that differ between the ends.

    Raises:
        ValueError: If the control points have another shape.
    """

    def __init__(
        self,
        template: nn.Module,
        curve: Curve,
        control_points: Tensor,
        buffers: tuple[dict[str, Tensor], dict[str, Tensor]],
        *,
        space: WeightSpace | None = None,
        training: TrainingData | None = None,
        warns: bool = True,
    ) -> None:
        self.space = space or WeightSpace(template)
        expected = (curve.num_control_points, self.space.num_parameters)
        if control_points.shape != expected:
            raise ValueError(f"control_points must have shape {expected}, got {tuple(control_points.shape)}.")
        self.curve, self.control_points, self.buffers = curve, control_points.detach(), buffers
        self.training = training or TrainingData()
        self.template = copy_of(template).eval()
        self._calibration: dict[int | None, Any] = {}
        self._differing = differing(self.template, buffers)
        if warns:
            warn_of(self._differing, buffers[0])

    def buffers_at(self, t: float) -> dict[str, Tensor]:
        """Return the buffers at ``t``: those of the end at an end, and between them what the rules say."""
        if t in (0, 1) or not self._differing:
            return self.buffers[1 if t == 1 else 0]
        return {**self.buffers[0], **mixed(self._differing, self.buffers, (1 - t, t))}

    @classmethod
    def straight_between(cls, model_a: nn.Module, model_b: nn.Module, training: TrainingData | None = None) -> Path:
        """Connect two networks by a straight line, as they are.

        Raises:
            ValueError: If they differ in architecture, dtype or device, or hold weights that are not finite.
        """
        space = WeightSpace(model_a)
        ends = torch.stack([space.flatten(model_a, name="a"), space.flatten(model_b, name="b")])
        buffers = named_buffers(model_a), named_buffers(model_b)
        return cls(model_a, Line(), ends, buffers, space=space, training=training)

    def straight(self) -> Path:
        """Return the straight line between the same ends."""
        ends = self.control_points[[0, -1]]
        return Path(self.template, Line(), ends, self.buffers, space=self.space, training=self.training, warns=False)

    def model_at(
        self,
        t: float,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        num_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        forward: Forward | None = None,
    ) -> nn.Module:
        """Return the network at ``t`` as a new model in eval mode; see `networks` for the other arguments.

        At the ends, which have statistics of their own, nothing is recalibrated unless there is ``recalibrate``.
        """
        if recalibrate is None and t in (0, 1) and not self.curve.frees(t):
            return Networks(self, [], None)(t)
        return self.networks(recalibrate, num_examples, repair, forward)(t)

    def facts(self) -> dict[str, str]:
        """Return what has to be the same in processes that share work along the path."""
        return {"the curve": repr(self.curve), "the digest of the control points": digest(self.control_points)}

    def arc_length(self, t: Sequence[float]) -> Tensor:
        """Return the length of the curve from 0 to each position, float64 ``(N,)``, in the Euclidean norm."""
        return self.curve.arc_length(self.control_points, torch.tensor(t, dtype=torch.float64, device="cpu"))

    def networks(
        self,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        num_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        forward: Forward | None = None,
    ) -> Networks:
        """Return the networks along the path, statistics set right in one way at all of them, the ends included.

        Args:
            recalibrate: Training data that batch norm is recalibrated on, or `AdversarialExamples` of it. Default: the
                fit's training loader.
            num_examples: How many examples of it to use, None for all.
            repair: Whether networks without batch norm have their pre-activations repaired, see `modeconn.repair`.
            forward: Runs the network on a batch of that data, ``forward(model, batch)``; default that of the fit, if it
                had one, else the batch's inputs go to the model.

        Raises:
            ValueError: If batch norm or repair needs training data that is neither remembered nor given.
        """
        data, forward = self.calibration_data(recalibrate, num_examples, repair), forward or self.training.forward
        return Networks(self, data, self._statistics_of_ends(data, forward) if repair else None, forward)

    def _statistics_of_ends(self, calibration: list[Any], forward: Forward | None) -> tuple[Statistics, ...] | None:
        """Return what repair takes from the ends; None for a model with batch norm, which recalibration repairs."""
        if norm_layers(self.template) or not calibration:
            return None
        ends = Networks(self, [], None)
        return tuple(measure(ends.as_it_came(end), calibration, forward=forward) for end in (0, 1))

    def calibration_data(
        self, loader: Iterable[Any] | AdversarialExamples | None, limit: int | None, repair: bool
    ) -> list[Any] | AdversarialExamples:
        """Return the batches to recalibrate or repair on; none for a model that needs neither."""
        device = self.space.device
        check_limit(limit)
        if not (repair or norm_layers(self.template)):
            return []
        if isinstance(loader, AdversarialExamples) and not norm_layers(self.template):
            raise ValueError("repair knows clean data alone: pass recalibrate= a plain loader.")
        if loader is not None:
            check_whole(loader, name="recalibrate")
            return calibration_batches(loader, device, limit=limit, name="recalibrate")
        if self.training.loader is None:
            raise ValueError(
                f"between two networks {'repair' if repair else 'batch norm'} needs statistics of training data, of "
                f"which none is known: a connection remembers the data it was fitted on, until it is saved. Pass "
                f"recalibrate=, a loader of such data."
            )
        if limit not in self._calibration:
            check_whole(self.training.loader, sharded=self.training.sharded, name="recalibrate")
            self._calibration[limit] = calibration_batches(self.training.loader, device, limit=limit)
        return self._calibration[limit]


class Networks:
    """One network that is moved along a path: calling it with ``t`` returns it as it is there, in eval mode.

    Args:
        path: The path.
        calibration: What batch norm is recalibrated on, or pre-activations repaired; empty for neither.
        ends: The statistics between which repair interpolates, or None.
        forward: Runs the network on a batch of the calibration data; None to hand its inputs to the model.
    """

    def __init__(
        self,
        path: Path,
        calibration: list[Any] | AdversarialExamples,
        ends: tuple[Statistics, ...] | None,
        forward: Forward | None = None,
    ) -> None:
        self._path, self._calibration, self._ends, self._forward = path, calibration, ends, forward
        self._model, self._theta = copy_of(path.template), torch.empty_like(path.control_points[0])
        self._missed: tuple[str, ...] | None = None  # of a network that was recalibrated

    @property
    def ends_have_their_own(self) -> bool:
        """Whether the ends came with other statistics than those they have here; trained ends have no others."""
        curve = self._path.curve
        return bool(self._calibration) and not (curve.frees(0) and curve.frees(1))

    @property
    def statistics(self) -> str:
        """Which statistics norm layers have, or pre-activations were given, empty for none."""
        if not self._calibration:
            return ""
        if self._ends is not None:
            return "pre-activations repaired between the ends"
        if self._missed is None:  # all points were measured before, or by other processes
            self(0.0)
        if isinstance(self._calibration, AdversarialExamples):
            on = "on each network's own adversarial examples"
            return f"norm layers recalibrated at every t, the ends included, {on}{but_for(self._missed)}"
        count = sum(map(num_examples, self._calibration))
        on = f"on {count:,} training examples"
        return f"norm layers recalibrated at every t, the ends included, {on}{but_for(self._missed)}"

    def __call__(self, t: float) -> nn.Module:
        """Return the network at ``t``, always the same module."""
        path, forward = self._path, self._forward
        model = self._place(path.curve.point(path.control_points, t, out=self._theta), t)
        if self._calibration:
            self._missed = recalibrate_statistics(model, self._calibration, forward=forward)
        if self._ends is not None and 0 < t < 1:
            impose(model, mix(self._ends, (1 - t, t)), self._calibration, forward=forward)
        return model

    def as_it_came(self, end: int) -> nn.Module:
        """Return the network at one end, 0 or 1, with its own statistics; a trained end has those that it has here."""
        if self._path.curve.frees(end):
            return self(float(end))
        return self._place(self._path.control_points[-end], end)

    def _place(self, theta: Tensor, t: float) -> nn.Module:
        self._path.space.load(theta, self._model)
        load_buffers(self._path.buffers_at(t), self._model)
        if t not in (0, 1) or self._path.curve.frees(t):
            settle(self._model)
        return self._model
