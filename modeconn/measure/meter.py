"""Loss, accuracy and other metrics of networks on the same data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.measure.metrics import Against, AnyMetric, choices, inner_of, on_device, value_of
from modeconn.network.batch_norm import warn_of_batch_statistics
from modeconn.network.batches import (
    batches,
    inputs_and_targets,
    joined,
    num_bytes,
    num_examples,
    part_of,
    run,
    tensors_of,
)
from modeconn.network.copies import copy_of
from modeconn.network.loss import Forward, LossFn, answer_of, called, check_targets, one_number, refused_by
from modeconn.network.scores import classes_of, is_integer, weighted
from modeconn.network.weights import device_of
from modeconn.tools.rng import preserved
from modeconn.tools.warn import warn

_KEPT_BYTES = 1 << 30
_NOT_A_MEAN = 1e-3  # relative difference above rounding in single precision, and that of matrices in TF32


def fetch(loader: Iterable[Any], device: torch.device, *, limit: int = _KEPT_BYTES) -> Iterable[Any]:
    """Read a loader once and keep its batches on ``device``, to be used for every point of a curve.

    More than ``limit`` bytes are not kept: the loader is then read anew for every point.
    """
    kept, size = [], 0
    for batch in batches(loader, device):
        kept.append(batch)
        size += num_bytes(batch)
        if size > limit:
            return _Reread(loader, device)
    return kept


@dataclass(frozen=True)
class _Reread:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Any:
        return batches(self.loader, self.device)


@dataclass(frozen=True)
class Measured:
    """What a `Meter` found, in the order in which networks were measured.

    Args:
        loss: Mean loss, float64 ``(M,)`` on the CPU, as all others.
        accuracy: Fraction of right answers, ``(M,)``, or None where it is not certain what a right one is.
        metrics: Values of metrics by name, ``(M,)`` each.
        num_examples: How many examples each network was measured on.
    """

    loss: Tensor
    accuracy: Tensor | None
    metrics: Mapping[str, Tensor]
    num_examples: int

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """Return one result of networks that were dealt out to several meters, one after the other.

        Raises:
            ValueError: If they had different numbers of examples.
        """
        counts = {part.num_examples for part in parts}
        if len(counts) > 1:
            raise ValueError(f"processes measured networks on different data: on {sorted(counts)} examples.")
        has_accuracy = all(part.accuracy is not None for part in parts)

        def dealt(values: list[Tensor]) -> Tensor:
            found = values[0].new_empty(sum(map(len, values)))
            for number, value in enumerate(values):
                found[number :: len(values)] = value
            return found

        return cls(
            dealt([part.loss for part in parts]),
            dealt([part.accuracy for part in parts]) if has_accuracy else None,  # type: ignore[misc]
            {name: dealt([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            counts.pop(),
        )


@dataclass
class _Answers:
    """What one network says to one batch."""

    loss: Tensor
    outputs: Any = None
    targets: Any = None
    of_layers: dict[str, Any] = field(default_factory=dict)

    def of(self, layer: str | None) -> Any:
        return self.outputs if layer is None else self.of_layers[layer]


class Meter:
    """Measures networks on the same data: mean loss, where it is certain accuracy, and other metrics.

    What is certain, and what each batch weighs, `modeconn.network.scores` decides. A loss of which that is not known is
    taken for a mean over examples; whether it is one is tried out on two parts of all batches, for the first network
    and until one says no. Results stay on the
    device until they are read, so that measuring many networks does not wait for each.

    Args:
        data: Batches on the device of the networks, from `fetch`.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch)`` in its place, for batches that are no ``(inputs, targets)``. It returns the
            loss, and there is no accuracy; or ``(loss, outputs, targets)``, which metrics need.
        metrics: Of outputs and targets, by name, from `metrics.as_metrics`.
    """

    def __init__(
        self,
        data: Iterable[Any],
        loss_fn: LossFn,
        forward: Forward | None = None,
        metrics: Mapping[str, AnyMetric] | None = None,
    ) -> None:
        self._data, self._loss_fn, self._forward, self.metrics = data, loss_fn, forward, metrics or {}
        self._checked = self._was_told = False
        self._number, self._places, self._single = -1, None, None  # of batches tried, targets of an example, a batch
        self._has_accuracy = True
        self._ends: dict[str, _End] = {}
        self._totals: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        self.num_examples = 0

    @property
    def ends(self) -> set[str]:
        """The ends of the curve, "a" and "b", that metrics compare networks with."""
        return {metric.end for metric in self.metrics.values() if isinstance(metric, Against)}

    def compare_with(self, end: str, model: nn.Module) -> None:
        """Have metrics compare with ``model``, a network that may be moved afterwards."""
        self._ends[end] = _End(copy_of(model))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> None:
        """Measure one network, in the mode it is in."""
        on_device(self.metrics, device_of(model))
        if not self._checked:
            warn_of_batch_statistics(model)
        updated = {name: inner_of(metric) for name, metric in self.metrics.items()}
        for metric in updated.values():
            metric.reset()
        totals: list[Tensor] = []
        before, self.num_examples = self.num_examples, 0
        with self._layers_heard(model) as heard:
            for number, batch in enumerate(self._data):
                size = num_examples(batch)
                answers = self._answers(model, batch, heard)
                totals.append(self._sums(answers, size, model, batch))
                self.num_examples += size
                for name, metric in updated.items():
                    with refused_by(
                        f"metric {name!r}", *(both := self._compared(self.metrics[name], answers, number, batch))
                    ):
                        metric.update(*both)
        if self._checked and self.num_examples != before:
            raise ValueError(
                f"loader yielded {self.num_examples} examples on this pass and {before} on the one before, so networks "
                f"would be measured on different data. Pass a loader whose passes are alike."
            )
        self._totals.append(torch.stack(totals).sum(0))
        for name, metric in updated.items():
            self._values[name].append(value_of(metric, name))
            metric.reset()
        self._checked = True

    def results(self) -> Measured:
        """Return what was found of all networks measured so far."""
        loss, weight, correct, counted = torch.stack(self._totals).cpu().unbind(1)
        if not weight.all():
            raise ValueError("no target of loader counts: the loss ignores them all, or their classes weigh 0.")
        metrics = {name: torch.stack([value.cpu() for value in values]) for name, values in self._values.items()}
        return Measured(loss / weight, correct / counted if self._has_accuracy else None, metrics, self.num_examples)

    def take(self) -> Measured:
        """Return what was found of the networks measured since the last call, and forget it."""
        found = self.results()
        self._totals, self._values = [], {name: [] for name in self.metrics}
        return found

    def _sums(self, answers: _Answers, size: int, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch times its weight, that weight, right answers, and how many there could be."""
        if self._forward is None:
            found = weighted(self._loss_fn, answers.loss, answers.outputs, answers.targets, size)
            total, weight, is_exact = found.total, found.weight, found.is_exact
        else:
            total, weight, is_exact = answers.loss.double() * size, float(size), False
        if not (is_exact or self._checked or self._was_told):
            self._try(model, batch, answers, size)
        loss_fn = None if self._forward is not None else self._loss_fn
        classes = classes_of(answers.outputs, answers.targets, loss_fn) if self._has_accuracy else None
        if classes is not None and not self._checked and classes.outside().numel():
            classes = None  # integers that are no classes of the model, such as counts
        self._has_accuracy = classes is not None
        right = (classes.correct.sum(), classes.counted.sum()) if classes is not None else (0.0, 0.0)
        parts = (x if isinstance(x, Tensor) else total.new_full((), x) for x in (total, weight, *right))
        return torch.stack([part.double() for part in parts])

    def _try(self, model: nn.Module, batch: Any, answers: _Answers, size: int) -> None:
        """Warn if a loss of which nothing is known is no mean over examples, as far as this batch shows it."""
        self._number += 1
        self._compare_places(batch, answers)
        before, self._single = self._single, batch if size == 1 else None
        if size > 1:
            # At another place in each batch: sorted examples may be as many of each class on both sides of one place.
            self._try_parts(model, batch, answers.loss, size, max(1, size * (1 + self._number % 3) // 4))
        elif before is not None and len(pair := joined(before, batch)) == 1:
            with preserved(device_of(model)):
                loss = self._answers(model, pair[0], {}).loss
            self._try_parts(model, pair[0], loss, 2, 1)

    def _compare_places(self, batch: Any, answers: _Answers) -> None:
        """Warn if examples have more targets in one batch than in another: the loss may be a mean over targets."""
        told = answers.targets if isinstance(answers.targets, Tensor) else None
        tensors = (
            [told]
            if told is not None
            else [x for x in tensors_of(batch) if is_integer(x) and x.ndim > 1 and x.dtype != torch.uint8]
        )
        places = max((x[0].numel() for x in tensors if x.ndim and len(x)), default=1)
        self._places = places if self._places is None else self._places
        if places != self._places and not self._was_told:
            self._was_told = True
            warn(
                f"examples have {self._places} targets in one batch and {places} in another, and it is not known "
                f"whether the loss is a mean over examples or over targets: batches are weighed by their examples. Use "
                f"modeconn.cross_entropy or a loss of torch, whose weights are known, or batches of one length."
            )

    def _try_parts(self, model: nn.Module, batch: Any, loss: Tensor, size: int, cut: int) -> None:
        """Warn if the loss of a batch is not the mean of those of its parts: it then depends on the batch size."""
        parts = [part_of(batch, slice(cut)), part_of(batch, slice(cut, None))]
        if self._was_told or [num_examples(part) for part in parts] != [cut, size - cut]:
            return  # a batch of objects that cannot be cut
        with preserved(device_of(model)):
            again, *found = (float(self._answers(model, part, {}).loss) for part in (batch, *parts))
        whole, mean = float(loss), (found[0] * cut + found[1] * (size - cut)) / size
        if math.isnan(whole):
            return  # as of a batch without a target that counts
        if not abs(again - whole) <= 16 * max(_eps(loss), 1e-7) * abs(whole):  # it draws random numbers
            self._was_told = True  # nothing can be said
            return
        if not is_mean(whole, mean, _eps(loss)):
            self._was_told = True
            warn_of_no_mean(
                f"{whole:.6g} of {size} examples, {found[0]:.6g} of the first {cut} and {found[1]:.6g} of the others"
            )

    def _answers(self, model: nn.Module, batch: Any, heard: dict[str, Any]) -> _Answers:
        heard.clear()
        if self._forward is None:
            inputs, targets = inputs_and_targets(batch)
            outputs = run(model, inputs)
            if not self._checked:
                check_targets(outputs, targets, self._loss_fn)
            loss = self._loss_fn(outputs, targets) if self._checked else one_number(self._loss_fn, outputs, targets)
            return _Answers(loss.reshape(()), outputs, targets, dict(heard))
        loss, said = answer_of(called(self._forward, model, batch))
        if said is None and self.metrics:
            raise ValueError(
                "metrics need outputs and targets: with metrics=, forward= must return (loss, outputs, targets), not "
                "the loss alone."
            )
        return _Answers(loss, *(said or (None, None)), of_layers=dict(heard))

    def _compared(self, metric: AnyMetric, answers: _Answers, number: int, batch: Any) -> tuple[Any, Any]:
        """Return what a metric is called with: outputs and targets, or outputs, or choices, of both networks."""
        if not isinstance(metric, Against):
            return answers.outputs, answers.targets
        end = self._ends[metric.end]
        theirs = end.kept.get(number)
        if theirs is None:
            with self._layers_heard(end.model) as heard:
                theirs = self._answers(end.model, batch, heard)
            # A loader that was not read into a list may change the order of its batches in the next pass.
            if isinstance(self._data, list):
                end.keep(number, theirs)
        if not metric.of_classes:
            return answers.of(metric.layer), theirs.of(metric.layer)
        loss_fn = None if self._forward is not None else self._loss_fn
        return choices(answers.outputs, answers.targets, loss_fn), choices(theirs.outputs, answers.targets, loss_fn)

    @contextmanager
    def _layers_heard(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give what layers returned in the last call of the model, by name, for those that metrics compare."""
        heard: dict[str, Any] = {}
        modules, handles = dict(model.named_modules()), []
        for metric in self.metrics.values():
            name = metric.layer if isinstance(metric, Against) else None
            if name is None:
                continue
            if name not in modules:
                raise ValueError(f"the model has no layer {name!r}; its layers are {', '.join(filter(None, modules))}.")
            handles.append(modules[name].register_forward_hook(_listener(heard, name)))
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()


def _eps(loss: Tensor) -> float:
    return torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0


def is_mean(whole: float, mean: float, eps: float = 0.0) -> bool:
    """Whether the loss of a batch is the mean of those of its parts, up to rounding with a precision of ``eps``."""
    rounding = max(_NOT_A_MEAN, 4 * eps)
    size = max(abs(whole), abs(mean), 1e-6) if math.isfinite(mean) else abs(whole)
    return abs(mean - whole) <= rounding * size


def warn_of_no_mean(what: str) -> None:
    """Warn of a loss that depends on the batch size, of which ``what`` says how large it is of which examples."""
    warn(
        f"the loss is no mean over the examples of a batch: it is {what}. So it depends on the batch size, here and in "
        f"training. Divide by the number of examples, or use a loss of torch, whose weights are known."
    )


class _End:
    """One end of the curve, and what it said to batches as far as there is room."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[int, _Answers] = {}
        self._room = _KEPT_BYTES

    def keep(self, number: int, answers: _Answers) -> None:
        self._room -= num_bytes([answers.outputs, answers.of_layers])
        if self._room >= 0:
            self.kept[number] = answers


def _listener(heard: dict[str, Any], name: str) -> Any:
    def listen(module: nn.Module, arguments: Any, output: Any) -> None:
        # Cloned, because a layer behind it may work in place.
        heard[name] = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    return listen
