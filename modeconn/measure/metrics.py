"""Metrics of networks along a curve: what `Connection.evaluate` takes as ``metrics=``, and those that come with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.network.batches import described
from modeconn.network.loss import main_output
from modeconn.network.scores import IGNORED, Classes, classes_of, scores_of
from modeconn.tools.door import check_settings, looked_at

MetricFunction = Callable[[Any, Any], tuple[Any, Any]]
"""``metric(outputs, targets) -> (sum, weight)`` of a batch; the value is the quotient of both over all batches."""

_MOST_FEATURES = 8192  # Most features of a layer compared by CKA: its sums hold their square, 512 MiB each.
_NAMES_TAKEN = ("t", "arc_length", "loss", "accuracy", "error")


@runtime_checkable
class Metric(Protocol):
    """What a metric can be: metrics of torchmetrics are, and classes of your own with these three methods.

    An attribute ``higher_is_better``, True or False, lets the metric have a barrier.
    """

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch."""
        ...

    def compute(self) -> Any:
        """Return the value over all batches since `reset`, one number."""
        ...

    def reset(self) -> None:
        """Forget all batches."""
        ...


@dataclass(frozen=True)
class Against:
    """A metric of a network and one end of its curve: the end's outputs take the place of the targets.

    Args:
        end: "a" for the network at t=0, "b" for that at t=1, with the statistics they have among the points measured.
        metric: Any metric or function, called with the outputs of the network and those of the end.
        layer: Name of a layer whose outputs are compared in place of the network's.
        of_classes: Whether the metric compares which classes networks choose: it is then called with two `Classes`,
            whose axis and whose targets that count are those of loss and accuracy.

    Raises:
        ValueError: If ``end`` is neither.
    """

    end: Literal["a", "b"]
    metric: Metric | MetricFunction
    layer: str | None = None
    of_classes: bool = False

    def __post_init__(self) -> None:
        if self.end not in ("a", "b"):
            raise ValueError(f"end must be 'a' (t=0) or 'b' (t=1), got end={self.end!r}.")
        check_settings(self)


AnyMetric = Metric | MetricFunction | Against


class Quotient:
    """A function of a batch made a metric: the quotient of its sums and weights.

    Args:
        function: ``function(outputs, targets) -> (sum, weight)``.
        name: For what is said of it.
        higher_is_better: Whether high values are good; default what the function says of itself.
    """

    @looked_at
    def __init__(self, function: MetricFunction, name: str = "metric", higher_is_better: bool | None = None) -> None:
        self._function, self._name = function, name
        own = getattr(function, "higher_is_better", None)
        self.higher_is_better = own if higher_is_better is None else higher_is_better
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sum: Any = 0.0
        self._weight: Any = 0.0

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch."""
        found = self._function(outputs, targets)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                f"metric {self._name!r} is a function, so it must return (sum, weight) of a batch, got {found!r:.80}."
            )
        total, weight = (self._number(one) for one in found)
        self._sum, self._weight = self._sum + total, self._weight + weight

    def _number(self, value: Any) -> Tensor:
        """Return a sum or a weight, which may be on any device, without waiting for it."""
        found = torch.as_tensor(value)
        if found.numel() != 1 or found.is_complex():
            kind = "complex " * found.is_complex()
            raise ValueError(
                f"metric {self._name!r} must return (sum, weight), two real numbers, got a {kind}tensor of shape "
                f"{tuple(found.shape)} among them: sum over the batch."
            )
        return found.double().reshape(())

    def compute(self) -> Any:
        """Return the quotient over all batches; NaN if their weights have the sum 0."""
        return self._sum / self._weight


# -- metrics of outputs and targets


@looked_at
def top_k(k: int, *, axis: int = 1, ignore_index: int = IGNORED) -> Metric:
    """Return the fraction of targets that are among the ``k`` highest scores.

    Args:
        k: From 1 to the number of classes.
        axis: Of the classes in the outputs: 1 for ``(N, C, ...)``, as torch has it, -1 for ``(N, ..., C)``.
        ignore_index: A target that does not count.

    Raises:
        ValueError: If ``k`` is below 1; later, if the model has fewer classes.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got k={k}.")

    def right(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = _classes_last(outputs, targets, axis)
        if k > scores.shape[-1]:
            raise ValueError(f"k must be at most the number of classes, {scores.shape[-1]}, got k={k}.")
        counted = targets != ignore_index
        return ((scores.topk(k, -1).indices == targets[..., None]).any(-1) & counted).sum(), counted.sum()

    return Quotient(right, f"top_k({k})", higher_is_better=True)


class _CrossEntropies:
    """Sums of the cross entropy of all targets, at each of some temperatures that scores are divided by."""

    higher_is_better = False
    log_temperatures: ClassVar[Sequence[float]] = (0.0,)

    @looked_at
    def __init__(self, ignore_index: int = IGNORED, *, axis: int = 1) -> None:
        self._ignored, self._axis = ignore_index, axis
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sums: Any = 0.0
        self._count: Any = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch: scores of classes and targets of as many places."""
        scores, flat = _classes_last(outputs, targets, self._axis).flatten(0, -2).double(), targets.flatten().long()
        divided = (scores * math.exp(-step) for step in self.log_temperatures)
        self._sums = self._sums + torch.stack(
            [F.cross_entropy(one, flat, ignore_index=self._ignored, reduction="sum") for one in divided]
        )
        self._count = self._count + (flat != self._ignored).sum()

    def _means(self) -> Tensor:
        return self._sums / self._count


class Perplexity(_CrossEntropies):
    """The exponential of the mean cross entropy of all targets.

    Args:
        ignore_index: A target that does not count.
        axis: Of the classes in the outputs: 1 for ``(N, C, ...)``, as torch has it, -1 for ``(N, ..., C)``.
    """

    def compute(self) -> Tensor:
        """Return the perplexity over all batches."""
        return self._means()[0].exp()


class TemperedLoss(_CrossEntropies):
    r"""The least mean cross entropy of all targets over temperatures that scores are divided by, nearly.

    .. math:: \min_T \; \frac1N \sum_{i=1}^N -\log \operatorname{softmax}(z_i / T)_{y_i}

    Of networks on a curve it tells what of a barrier is wrong confidence, which one number mends (Guo et al., 2017).
    The temperature is each network's own, the best on the data that are measured on, from 1/7 to 7: 65 of them are
    tried, and the least of the parabola through the best three is taken, which is right to some 1e-5.

    Args:
        ignore_index: A target that does not count.
        axis: Of the classes in the outputs: 1 for ``(N, C, ...)``, as torch has it, -1 for ``(N, ..., C)``.

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """

    log_temperatures = tuple(step / 16 for step in range(-32, 33))

    def compute(self) -> Tensor:
        """Return the loss at the best temperature over all batches."""
        means = self._means()
        best = means.argmin().clamp(1, len(means) - 2)
        before, here, after = means[best - 1], means[best], means[best + 1]
        bend = before - 2 * here + after
        vertex = here - (before - after) ** 2 / (8 * bend)
        return torch.where((here <= before) & (here <= after) & (bend > 0), vertex, means.min())


# -- metrics of a network and one end of the curve


def disagreement(end: Literal["a", "b"]) -> Against:
    """Return the fraction of targets for which a network and one end of the curve choose different classes.

    Along which axis classes lie, and which targets count, is decided as for the accuracy. For networks of another kind
    say what they choose: ``Against(end, function)``, called with the outputs of both.

    Args:
        end: "a" for the network at t=0, "b" for that at t=1.
    """

    def different(ours: Classes, theirs: Classes) -> tuple[Tensor, Tensor]:
        differ = ours.scores.argmax(1) != theirs.scores.argmax(1)
        return (differ & ours.counted).sum(), ours.counted.sum()

    return Against(end, Quotient(different, "disagreement", higher_is_better=False), of_classes=True)


def choices(outputs: Any, targets: Any, loss_fn: Any) -> Classes:
    """Return the scores of classes among a network's outputs, for metrics of what it chooses.

    Raises:
        ValueError: If there are none, or nobody knows along which axis they lie.
    """
    classes = classes_of(outputs, targets, loss_fn)
    if classes is not None:
        return classes
    scores = scores_of(outputs)
    if scores is not None and scores.ndim == 2 and scores.shape[1] > 1:  # there is but one axis for classes
        return Classes(scores, scores.new_zeros(len(scores), dtype=torch.int64), IGNORED)
    raise ValueError(
        f"it is not known which classes a network chooses whose outputs are {described(outputs)} for targets "
        f"{described(targets)}. Pass Against(end, function), with a function that says it."
    )


def cka(end: Literal["a", "b"], *, layer: str | None = None) -> Against:
    r"""Return linear centred kernel alignment with one end of the curve, 1 for representations alike up to rotation.

    .. math:: \lVert X^\top Y \rVert_F^2 \,/\, (\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F)

    with the centred features X and Y of all examples, from sums over batches, so that it does not depend on their size.

    Args:
        end: "a" for the network at t=0, "b" for that at t=1.
        layer: Name of the layer whose outputs are compared, ``(N, ...)``, flattened; default the network's outputs.

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414
    """
    return Against(end, _LinearCKA(), layer)


class _LinearCKA:
    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._count = 0
        # Centred at the first batch's mean, because products of small numbers lose less to rounding.
        self._means: tuple[Tensor, Tensor] | None = None
        self._sums: list[Any] = [0.0, 0.0]
        self._products: list[Any] = [0.0, 0.0, 0.0]

    def update(self, outputs: Tensor, others: Tensor) -> None:
        x, y = (_representation(one).flatten(1).double() for one in (outputs, others))
        if max(x.shape[1], y.shape[1]) > _MOST_FEATURES:
            raise ValueError(
                f"CKA of {x.shape[1]} features would need the square of it in memory. Choose a layer with at most "
                f"{_MOST_FEATURES}."
            )
        self._means = self._means or (x.mean(0), y.mean(0))
        x, y = x - self._means[0], y - self._means[1]
        self._count += len(x)
        self._sums = [total + one.sum(0) for total, one in zip(self._sums, (x, y), strict=True)]
        pairs = ((x, y), (x, x), (y, y))
        self._products = [total + one.T @ two for total, (one, two) in zip(self._products, pairs, strict=True)]

    def compute(self) -> Tensor:
        (x, y), count = self._sums, self._count
        pairs = ((x, y), (x, x), (y, y))
        xy, xx, yy = (
            torch.linalg.matrix_norm(product - torch.outer(one, two) / count)
            for product, (one, two) in zip(self._products, pairs, strict=True)
        )
        return xy**2 / (xx * yy)


# -- for those who measure


def as_metrics(metrics: Mapping[str, AnyMetric] | None) -> dict[str, AnyMetric]:
    """Return metrics by name, functions made metrics.

    Raises:
        ValueError: If a name is taken, or something is no metric.
    """
    found = {}
    for name, metric in (metrics or {}).items():
        if name in _NAMES_TAKEN:
            raise ValueError(f"metrics must not be named {', '.join(_NAMES_TAKEN)}, got {name!r}.")
        if isinstance(metric, Against):
            found[name] = replace(metric, metric=_as_metric(metric.metric, name))
        else:
            found[name] = _as_metric(metric, name)
    held = [inner_of(metric) for metric in found.values()]
    for name, one in zip(found, held, strict=True):
        if sum(one is other for other in held) > 1:
            raise ValueError(
                f"metric {name!r} is one object under several names, which would mix their batches. Pass an object for "
                f"each name."
            )
    return found


def inner_of(metric: AnyMetric) -> Any:
    """Return what takes in batches: the metric itself, or that which compares with an end."""
    return metric.metric if isinstance(metric, Against) else metric


def _as_metric(metric: Any, name: str) -> Metric:
    if isinstance(metric, type):
        raise ValueError(f"metric {name!r} is a class; pass an object of it, {metric.__name__}(...).")
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise ValueError(
            f"metric {name!r} must have update, compute and reset, or be a function (outputs, targets) -> "
            f"(sum, weight), got {metric!r:.80}."
        )
    return Quotient(metric, name)


def value_of(metric: Metric, name: str) -> Tensor:
    """Return what a metric computes, a tensor of one number, where it is.

    Raises:
        ValueError: If it computes anything else.
    """
    value = metric.compute()
    if isinstance(value, bool | int | float | np.number | np.ndarray) and np.size(value) == 1:
        return torch.tensor(float(np.asarray(value).item()), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"metric {name!r} must compute one number, got {value!r:.80}.")
    return value.detach().double().reshape(())


def on_device(metrics: Mapping[str, AnyMetric], device: torch.device) -> None:
    """Move the state of metrics that are modules, as those of torchmetrics are, to the device of the networks."""
    for metric in metrics.values():
        if isinstance(inner_of(metric), nn.Module):
            inner_of(metric).to(device)


def higher_is_better(metrics: Mapping[str, AnyMetric]) -> dict[str, bool]:
    """Return which way metrics get worse, for those that say it."""
    said = {name: getattr(inner_of(metric), "higher_is_better", None) for name, metric in metrics.items()}
    return {name: bool(way) for name, way in said.items() if way is not None}


def _representation(outputs: Any) -> Tensor:
    """Return what a layer makes; of a tuple, as of a recurrent layer, the first part."""
    return outputs[0] if isinstance(outputs, tuple | list) else main_output(outputs)


def _classes_last(outputs: Any, targets: Tensor, axis: int) -> Tensor:
    given = main_output(outputs)
    scores = given.movedim(axis, -1)
    if scores.shape[:-1] != targets.shape:
        raise ValueError(
            f"with classes in axis {axis}, outputs of shape {tuple(given.shape)} do not fit targets of shape "
            f"{tuple(targets.shape)}. Pass axis=, 1 for outputs (N, C, ...) and -1 for (N, ..., C)."
        )
    return scores
