"""What outputs and targets mean: which output holds class scores, along which axis, which targets count, how much.

Everything that computes a loss or an accuracy asks this module, and nothing else guesses. The rules:

- *Scores.* A tensor is the scores. Of a named tuple, data class or mapping it is what the model calls ``logits``; what
  it calls ``aux...`` and gives the same shape are auxiliary heads. Several outputs without names say nothing.
- *Classes* lie along axis 1 for torch's own cross entropies, which say so. Otherwise they lie along the one axis
  without which scores have the shape of the targets; where two axes would do, nobody knows.
- *Counted* are all targets but those of the loss's ``ignore_index``, by torch's default -100.
- With a loss of the user's own, nothing is refused. Where the rules find no classes there is no accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label that torch's cross entropies leave out unless they are told another one."""

_FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)
"""Integers that torch can store and index with, and hardly more."""

_ALONG_AXIS_1 = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_CROSS_ENTROPIES = (nn.CrossEntropyLoss, F.cross_entropy)
_SETTINGS: dict[str, Any] = {"weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0}
_OVER_ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.GaussianNLLLoss, nn.SoftMarginLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.gaussian_nll_loss),
)
"""Losses of torch that are means over all elements of the outputs."""


def named_part(outputs: Any, name: str) -> Any:
    """Return what a model itself calls by a name among its outputs, None if nothing."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    has_names = hasattr(outputs, "_fields") or hasattr(outputs, "__dataclass_fields__")
    return getattr(outputs, name, None) if has_names else None


def scores_of(outputs: Any) -> Tensor | None:
    """Return the scores among a model's outputs; None if nobody knows which they are."""
    found = outputs if isinstance(outputs, Tensor) else named_part(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def auxiliary_scores(outputs: Any) -> list[Tensor]:
    """Return the scores of auxiliary heads: outputs that the model calls ``aux...``, in the shape of its scores."""
    scores = scores_of(outputs)
    return [part for part in _auxiliaries(outputs).values() if scores is not None and part.shape == scores.shape]


def no_heads(outputs: Any) -> dict[str, Tensor]:
    """Return what the model calls ``aux...`` and what is no head, since it has another shape than the scores."""
    scores = scores_of(outputs)
    return {name: x for name, x in _auxiliaries(outputs).items() if scores is None or x.shape != scores.shape}


def _auxiliaries(outputs: Any) -> dict[str, Tensor]:
    names = outputs if isinstance(outputs, Mapping) else getattr(outputs, "_fields", ())
    if hasattr(outputs, "__dataclass_fields__") and not isinstance(outputs, Mapping):
        names = outputs.__dataclass_fields__
    parts = {str(name): named_part(outputs, name) for name in names if str(name).startswith("aux")}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def class_axes(scores: Tensor, targets: Tensor) -> list[int]:
    """Return the axes along which classes may lie: those without which scores have the shape of the targets."""
    shape = tuple(scores.shape)
    return [axis for axis in range(1, len(shape)) if (*shape[:axis], *shape[axis + 1 :]) == tuple(targets.shape)]


def comparable(targets: Any) -> Any:
    """Return targets as integers that torch can compare: those of few operations as int64, others as they are."""
    return targets.long() if isinstance(targets, Tensor) and targets.dtype in _FEW_OPERATIONS else targets


def is_integer(targets: Any) -> bool:
    """Whether targets are whole numbers in a dense tensor, as class indices are."""
    return (
        isinstance(targets, Tensor)
        and targets.layout is torch.strided
        and not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    )


def setting_of(loss_fn: Any, name: str, default: Any) -> Any:
    """Return a setting of a loss, such as "ignore_index": its attribute, or an argument of a `functools.partial`."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name, setting_of(loss_fn.func, name, default))
    return getattr(loss_fn, name, default) if isinstance(loss_fn, nn.Module) else default


def is_one_of(loss_fn: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a loss computes what one of these classes or functions does, also with some of its arguments set."""
    loss_fn = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    return any(_computes(loss_fn, kind) if isinstance(kind, type) else loss_fn is kind for kind in kinds)


def _computes(loss_fn: Any, kind: type) -> bool:
    """Whether a loss is of a class, or of one below it that leaves its forward as it is."""
    return isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward  # type: ignore[attr-defined]


def _is_of_torch(loss_fn: Any) -> bool:
    """Whether a loss is one of torch, whose ``reduction`` is what it says."""
    function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    forward = getattr(type(function), "forward", function) if isinstance(function, nn.Module) else function
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.")


def knows_its_axis(loss_fn: Any) -> bool:
    """Whether a loss is one of torch's, for which classes always lie along axis 1."""
    return is_one_of(loss_fn, _ALONG_AXIS_1)


@dataclass(frozen=True)
class Classes:
    """Scores of classes and targets that are classes.

    Args:
        scores: ``(N, C, ...)``.
        targets: Integers ``(N, ...)``.
        ignored: The label that counts for nothing.
    """

    scores: Tensor
    targets: Tensor
    ignored: int

    @property
    def counted(self) -> Tensor:
        """Which targets count, bool ``(N, ...)``."""
        return self.targets != self.ignored

    @property
    def correct(self) -> Tensor:
        """Which targets have the highest score, bool ``(N, ...)``; none that does not count."""
        return (self.scores.argmax(1) == self.targets) & self.counted

    def outside(self) -> Tensor:
        """Return the targets that count and are no class, ``(K,)``."""
        is_class = (self.targets >= 0) & (self.targets < self.scores.shape[1])
        return self.targets[~is_class & self.counted]


def classes_of(outputs: Any, targets: Any, loss_fn: Any = None) -> Classes | None:
    """Return scores and targets as classes; None if they are none, or nobody knows along which axis they lie.

    Args:
        outputs: What the model returned.
        targets: What the batch says.
        loss_fn: The loss, where there is one: torch's own say what axis and which label they ignore.
    """
    scores, axis = scores_of(outputs), axis_of_classes(outputs, targets, loss_fn)
    if scores is None or axis is None:
        return None
    return Classes(scores.movedim(axis, 1), comparable(targets), setting_of(loss_fn, "ignore_index", IGNORED))


def axis_of_classes(outputs: Any, targets: Any, loss_fn: Any = None) -> int | None:
    """Return along which axis of the scores classes lie, None if there are none or nobody knows."""
    scores = scores_of(outputs)
    if scores is None or not is_integer(targets):
        return None
    axes = class_axes(scores, targets)
    if 1 in axes and knows_its_axis(loss_fn):
        axes = [1]
    return axes[0] if len(axes) == 1 and scores.shape[axes[0]] >= 2 else None


def weighs(classes: Classes, loss_fn: Any) -> Tensor:
    """Return which targets count for anything in a loss: not those it ignores, nor those of a class of weight 0."""
    by_class = setting_of(loss_fn, "weight", None) if knows_its_axis(loss_fn) else None
    if by_class is None:
        return classes.counted
    targets = torch.where(classes.counted, classes.targets, 0).long()
    return classes.counted & (by_class.to(targets.device)[targets] != 0)


def counts_nothing(loss_fn: Any, targets: Any) -> bool:
    """Whether all targets of a batch are of classes that weigh 0 in a loss of torch, whose gradient is then 0/0."""
    by_class = setting_of(loss_fn, "weight", None) if knows_its_axis(loss_fn) and is_integer(targets) else None
    if by_class is None or bool((by_class != 0).all()):
        return False
    return not bool(torch.as_tensor(weight_of(loss_fn, targets, len(targets))).any())


@dataclass(frozen=True)
class Weighted:
    """The loss of a batch as a sum and what it was divided by, so that batches of any size combine exactly.

    Args:
        total: A scalar.
        weight: A scalar or number; its unit is the loss's own: examples, targets that count, class weights.
        is_exact: Whether it is known how the loss weighs its parts; else it is taken for a mean over examples.
    """

    total: Tensor
    weight: Tensor | float
    is_exact: bool


def weighted(loss_fn: Callable[..., Any], loss: Tensor, outputs: Any, targets: Any, num_examples: int) -> Weighted:
    """Return the sum and the weight of a batch's loss.

    Args:
        loss_fn: What computed it.
        loss: Its value, a scalar.
        outputs: What the model returned.
        targets: What the batch says.
        num_examples: The batch size.
    """
    loss = loss.double()
    if is_sum(loss_fn):
        return Weighted(loss, float(num_examples), True)
    if smooths_weightless(loss_fn) and is_integer(targets):
        return Weighted(_summed(loss_fn, outputs, targets), weight_of(loss_fn, targets, num_examples), True)
    weight, is_exact = weight_of(loss_fn, targets, num_examples), False
    if _is_mean_over_targets(loss_fn):
        is_exact = True
    elif is_one_of(loss_fn, _OVER_ELEMENTS) and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        is_exact = outputs.shape == targets.shape  # else one of them is spread out over the other
    return Weighted(loss * weight if isinstance(weight, float) else _product(loss, weight), weight, is_exact)


def smooths_weightless(loss_fn: Any) -> bool:
    """Whether a loss of torch has classes of weight 0 and smooths labels: their targets then add to it all the same."""
    by_class = setting_of(loss_fn, "weight", None) if is_one_of(loss_fn, _CROSS_ENTROPIES) else None
    smoothing = setting_of(loss_fn, "label_smoothing", 0.0)
    return by_class is not None and bool(smoothing) and not bool((by_class != 0).all())


def _summed(loss_fn: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what a cross entropy of torch divides by the weights of the targets."""
    settings = {name: setting_of(loss_fn, name, default) for name, default in _SETTINGS.items()}
    return F.cross_entropy(outputs.double(), targets, reduction="sum", **_in_double(settings))


def _in_double(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in settings.items()}


def _product(loss: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, loss * weight, 0.0)  # of no target that counts the loss is NaN, or 0


def _is_mean_over_targets(loss_fn: Any) -> bool:
    return knows_its_axis(loss_fn) or getattr(loss_fn, "is_mean_over_targets", False)


def is_sum(loss_fn: Any) -> bool:
    """Whether a loss is one of torch that sums over examples; its mean over batches is one over examples."""
    return setting_of(loss_fn, "reduction", "mean") == "sum" and _is_of_torch(loss_fn)


def axes_of_probabilities(shape: tuple[int, ...], targets: Any) -> list[int]:
    """Return the axes along which targets in the shape of the scores may be probabilities of classes."""
    if not isinstance(targets, Tensor) or tuple(targets.shape) != tuple(shape) or not targets.is_floating_point():
        return []
    is_positive = bool(targets.min() >= 0)
    return [axis for axis in range(1, len(shape)) if is_positive and _sums_to_one(targets, axis)]


def _sums_to_one(targets: Tensor, axis: int) -> bool:
    """Whether sums along an axis are 1, as far as the precision tells."""
    off = (targets.float().sum(axis) - 1).abs().max()
    return float(off) < 1e-3 + targets.shape[axis] * torch.finfo(targets.dtype).eps


def _num_places(loss_fn: Any, targets: Tensor) -> int | None:
    """Return how many distributions over classes there are; None if it is not known along which axis."""
    axes = [1] if knows_its_axis(loss_fn) else axes_of_probabilities(tuple(targets.shape), targets)
    return targets.numel() // targets.shape[axes[0]] if len(axes) == 1 else None


def weight_of(loss_fn: Any, targets: Any, num_examples: int) -> Tensor | float:
    """Return how much the loss of a batch counts in the mean over batches: examples, targets that count, class weights.

    Args:
        loss_fn: The loss; of one that is not known, batches count as they have examples.
        targets: What the batch says.
        num_examples: The batch size.
    """
    if _is_mean_over_targets(loss_fn) and is_integer(targets):
        counted, by_class = targets != setting_of(loss_fn, "ignore_index", IGNORED), setting_of(loss_fn, "weight", None)
        if by_class is None:
            return counted.sum().double()
        return by_class.double().to(targets.device)[targets.long()[counted]].sum()
    if _is_mean_over_targets(loss_fn) and isinstance(targets, Tensor) and targets.ndim > 2:
        return float(_num_places(loss_fn, targets) or num_examples)
    if is_one_of(loss_fn, _OVER_ELEMENTS) and isinstance(targets, Tensor):
        return float(targets.numel())
    return float(num_examples)
