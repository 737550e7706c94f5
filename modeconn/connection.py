"""The result of connecting two networks: a curve with its control points, and the networks on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.curves import Curve, Line, PolyChain
from modeconn.curves import describe as describe_curve
from modeconn.curves import rebuild as rebuild_curve
from modeconn.curves.path import Path
from modeconn.learning.history import History
from modeconn.measure.measurable import Measurable
from modeconn.network.attack import AdversarialExamples
from modeconn.network.batch_norm import NUM_EXAMPLES
from modeconn.network.copies import copy_of
from modeconn.network.estimates import differing
from modeconn.network.loss import Forward, TrainingData
from modeconn.network.registry import describe, rebuild
from modeconn.network.weights import WeightSpace, are_finite, named_buffers
from modeconn.symmetry.relabelling import MOVED, Relabelling, pack, unpack
from modeconn.tools import files, provenance
from modeconn.tools.door import checked, looked_at

_KIND = "connection"
_FORMAT = 1


class Connection(Measurable):
    """A curve between two networks of one architecture.

    At t=0 it is network a and at t=1 the relabelled network b, both bit for bit, weights and buffers; between them
    weights follow the curve, batch norm is recalibrated on training data, and of other buffers that differ those of
    real numbers are mixed, with a warning, and all else is a's.

    Made by `modeconn.fit_curve`, `straight_between` and `load`.

    Args:
        path: The curve with the networks on it.
        permutation: How b was relabelled, or None if it was not.
        history: What happened in the fit, or None if nothing was learned.

    Attributes:
        space: The weight space, which names the parts of each control point.
        curve: The curve.
        control_points: Its control points, ``(K, P)``.
        buffers: All buffers of both ends, by name.
        training: Data and loss of the fit, remembered in memory.
        device: Where the control points are.
    """

    made_by: Mapping[str, Any] | None = None
    """How it came about: call or command, versions, data."""

    @looked_at
    def __init__(self, path: Path, *, permutation: Relabelling | None = None, history: History | None = None) -> None:
        super().__init__(path, path.training, path.space.device)
        self.space, self.curve, self.control_points = path.space, path.curve, path.control_points
        self.buffers = path.buffers
        self.permutation, self.history = permutation, history

    @classmethod
    @checked
    def straight_between(
        cls, model_a: nn.Module, model_b: nn.Module, *, training: TrainingData | None = None
    ) -> Connection:
        """Connect two networks by a straight line, as they are.

        Args:
            model_a: The network at t=0.
            model_b: The network at t=1.
            training: Data and loss, as a fit would remember them: what batch norm is recalibrated on by default.

        Raises:
            ValueError: If they differ in architecture, dtype or device, or hold weights that are not finite.
        """
        return cls(Path.straight_between(model_a, model_b, training))

    @classmethod
    @checked
    def through(cls, networks: Sequence[nn.Module], *, training: TrainingData | None = None) -> Connection:
        """Connect many networks of one architecture, such as checkpoints of a run, by a chain of straight lines.

        Network k of K is at t = k / (K - 1). Batch norm is recalibrated wherever it is measured, and at the networks
        between the ends as well.

        Args:
            networks: Two or more, in their order.
            training: Data and loss, as a fit would remember them: what batch norm is recalibrated on by default.

        Raises:
            ValueError: If they differ in architecture, dtype or device, hold weights that are not finite, are fewer
                than two, or, of more than two, differ in buffers that are not estimated anew.
        """
        if isinstance(networks, nn.Module):
            raise ValueError(f"networks must be a list of networks, got one {type(networks).__name__}.")
        if len(networks) < 2:
            raise ValueError(f"a connection goes through two networks or more, got {len(networks)}.")
        space = WeightSpace(networks[0])
        points = torch.stack([space.flatten(one, name=f"network {number}") for number, one in enumerate(networks)])
        every = [named_buffers(one) for one in networks]
        lost = differing(networks[0], every) if len(networks) > 2 else []
        if lost:
            raise ValueError(
                f"these networks differ in buffers that nothing estimates anew, such as {lost[0]!r}, and a chain holds "
                f"those of its ends alone. Connect them two by two, with Connection.straight_between."
            )
        buffers = every[0], every[-1]
        curve = PolyChain(len(networks) - 1) if len(networks) > 2 else Line()
        return cls(Path(networks[0], curve, points, buffers, space=space, training=training))

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

    def _facts(self) -> dict[str, str]:
        found = {
            "curve": repr(self.curve),
            "weights": f"{self.space.num_parameters:,}",
            "length": f"{self.length():.4g}",
            "b": "as it was" if self.permutation is None else "relabelled",
        }
        if self.history is not None and self.history.loss:
            found["learned for"] = f"{len(self.history.loss)} epochs"
            found["training loss"] = f"{self.history.loss[-1]:.4g}"
        return found

    @checked
    def weights_at(self, t: float) -> Tensor:
        """Return the weights at ``t`` as a new vector ``(P,)``; ``space.unflatten`` names them."""
        return self.curve.point(self.control_points, t)

    @checked
    def model_at(
        self,
        t: float,
        *,
        recalibrate: Iterable[Any] | AdversarialExamples | None = None,
        recalibration_examples: int | None = NUM_EXAMPLES,
        repair: bool = False,
        forward: Forward | None = None,
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
            forward: Runs the network on a batch of that data, ``forward(model, batch)``; default that of the fit, if it
                had one, else the batch's inputs go to the model.

        Raises:
            ValueError: If t is outside [0, 1], or batch norm or repair needs training data that is neither remembered
                nor given.
        """
        return self._path.model_at(t, recalibrate, recalibration_examples, repair, forward)

    def straight(self) -> Connection:
        """Return the straight connection of the same ends."""
        return Connection(self._path.straight(), permutation=self.permutation)

    def length(self) -> float:
        """Return the length of the curve in weight space, in the Euclidean norm."""
        return self.curve.length(self.control_points)

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the connection to a safetensors file: all but training data and loss.

        Raises:
            OSError: If the file cannot be written.
        """
        tensors = {"control_points": torch.stack([self.space.to_canonical(row) for row in self.control_points])}
        for end, buffers in zip("ab", self.buffers, strict=True):
            tensors |= {f"buffers.{end}.{name}": buffer for name, buffer in buffers.items()}
        moved, relabelled_by = pack(self.permutation, MOVED)
        about = {
            "format": _FORMAT,
            "curve": describe_curve(self.curve),
            "parameters": self.space.shapes,
            "model": describe(self._path.template),
            **relabelled_by,
            "history": None if self.history is None else asdict(self.history),
            **provenance.entry(self),
        }
        files.write(path, _KIND, tensors | moved, about)

    @classmethod
    @checked
    def load(
        cls,
        path: str | os.PathLike[str],
        template: nn.Module | None = None,
        *,
        curve: type[Curve] | None = None,
        device: torch.device | str | None = None,
    ) -> Connection:
        """Read a connection.

        Args:
            path: A file that `save` wrote.
            template: A model of the same architecture, whose memory format the connection takes; needed unless the
                networks came from `modeconn.models`.
            curve: The class of the curve, if it is one of your own; files hold its name and settings alone.
            device: Where the connection is to be; default: where ``template`` is, else the CPU.

        Raises:
            ValueError: If the file is no connection, the template differs from it (the first name that differs is
                named), or the class of the curve is missing or another one.
        """
        with files.opened(path, _KIND) as (tensors, about):
            points = tensors.pop("control_points")
            _check_points(points, about["parameters"], path)
            template = _rebuild(about, points.dtype, path) if template is None else template
            if device is not None:
                template = copy_of(template).to(device)  # copied, because `to` would move the caller's template
            buffers = tuple(
                {name.removeprefix(start): buffer for name, buffer in tensors.items() if name.startswith(start)}
                for start in ("buffers.a.", "buffers.b.")
            )
            space = WeightSpace(template)
            _check_template(about["parameters"], space.shapes)
            for side in buffers:
                _check_template(_shapes(side), _shapes(dict(template.named_buffers())))
            if points.dtype != space.dtype:
                raise ValueError(f"the file holds {points.dtype} weights, template has {space.dtype}.")
            between = Path(
                template,
                rebuild_curve(*about["curve"], curve),
                torch.stack([space.from_canonical(row) for row in points]),
                tuple({name: buffer.to(space.device) for name, buffer in side.items()} for side in buffers),
                space=space,
            )
            history = None if about["history"] is None else History(**about["history"])
            found = cls(between, permutation=unpack(tensors, about, MOVED), history=history)
        provenance.keep(found, about.get(provenance.ATTRIBUTE))
        return found


def _check_points(points: Tensor, shapes: Mapping[str, Sequence[int]], path: str | os.PathLike[str]) -> None:
    """Raise unless control points hold all parameters, each a finite number, before memory is taken for them."""
    count = sum(math.prod(shape) for shape in shapes.values())
    if points.ndim != 2 or len(points) < 2 or points.shape[1] != count or not points.is_floating_point():
        what = f"control points of shape {tuple(points.shape)}, {points.dtype}, for {count:,} parameters"
        raise files.damaged(path, ValueError(what))
    if not are_finite(points):
        raise ValueError(f"{os.fspath(path)!r} holds control points that are not finite: the run behind it failed.")


def _rebuild(about: Mapping[str, Any], dtype: torch.dtype, path: str | os.PathLike[str]) -> nn.Module:
    if about["model"] is None:
        raise ValueError(
            f"{os.fspath(path)!r} connects networks that are not of modeconn.models. "
            f"Pass template=, a model of the same architecture."
        )
    try:
        return rebuild(about["model"], about["parameters"], dtype)
    except (TypeError, ValueError) as error:
        raise files.damaged(path, error) from error


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_template(saved: dict[str, Any], template: dict[str, tuple[int, ...]]) -> None:
    for name in [*saved, *template]:
        sides = [tuple(shapes[name]) if name in shapes else "missing" for shapes in (saved, template)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"template is of another architecture: {name!r} is {sides[0]} in the file, {sides[1]} in it."
            )
