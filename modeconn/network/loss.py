"""What training and measuring lower: a loss of outputs and targets, or a function of model and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.network.batches import (
    described,
    example_at,
    examples_alone,
    inputs_and_targets,
    is_dense,
    num_examples,
    run,
)
from modeconn.network.scores import (
    Classes,
    auxiliary_scores,
    axes_of_probabilities,
    class_axes,
    classes_of,
    counts_nothing,
    is_integer,
    is_sum,
    knows_its_axis,
    no_heads,
    scores_of,
    weighs,
    weight_of,
)
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown
from modeconn.tools.warn import is_of_package, warn

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, targets) -> loss``, a mean over the examples of the batch."""

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch) -> loss``, a mean over the examples of the batch; one that a user gave may also return
``(loss, outputs, targets)``, from which other metrics are computed."""

AUXILIARY_WEIGHT = 0.3


def main_output(outputs: Any) -> Tensor:
    """Return the class scores among a model's outputs, see `modeconn.network.scores`.

    Raises:
        ValueError: If the model returns several things, none of which it calls ``logits``.
    """
    scores = scores_of(outputs)
    if scores is None:
        raise ValueError(
            f"the model returns {_described(outputs)}, and it is not known which part of that the scores are. Name it: "
            f"return a named tuple, data class or dict with 'logits'; or pass loss_fn=, which gets all that the model "
            f"returns, or forward=."
        )
    return scores


def _described(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a {type(outputs).__name__} of {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (tuple, list)):
        kinds = ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)
        return f"{len(outputs)} outputs ({kinds})"
    return f"a {type(outputs).__name__}"


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross entropy per target; auxiliary heads that a model names count 0.3 each. The default loss everywhere.

    What the scores are, and which axis the classes lie along, `modeconn.network.scores` says: axis 1, or another one if
    scores have the shape of the targets without that one alone.

    Args:
        outputs: Scores ``(N, C)``, ``(N, C, ...)`` or ``(N, ..., C)``; or a named tuple, data class or mapping with
            ``logits``, whose parts named ``aux...`` in the same shape are auxiliary heads, as those of GoogLeNet in
            train mode (Szegedy et al., 2015, https://arxiv.org/abs/1409.4842, section 5).
        targets: Classes, integers in ``[0, C)``, ``(N,)`` or ``(N, ...)``, of which -100 counts for nothing; or
            probabilities of classes in the shape of the scores.

    Returns:
        A scalar.

    Raises:
        ValueError: If it is not known which output the scores are, or which axis the classes lie along.
    """
    loss = _cross_entropy(main_output(outputs), targets)
    for auxiliary in auxiliary_scores(outputs):
        loss = loss + AUXILIARY_WEIGHT * _cross_entropy(auxiliary, targets)
    return loss


cross_entropy.is_mean_over_targets = True  # type: ignore[attr-defined]  # read by `modeconn.network.scores.weighted`


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    if is_integer(targets):
        targets = targets.long()  # torch takes some integers and not others
    if scores.ndim <= 2:
        return F.cross_entropy(scores, targets)
    axes = class_axes(scores, targets) if is_integer(targets) else axes_of_probabilities(tuple(scores.shape), targets)
    if len(axes) != 1:
        raise ValueError(
            f"classes may lie along {'none' if not axes else ' or '.join(map(str, axes))} of the axes of scores of "
            f"shape {tuple(scores.shape)} for targets of shape {tuple(targets.shape)}. Pass a loss_fn= that knows it, "
            f"such as torch.nn.CrossEntropyLoss() for classes along axis 1."
        )
    moved = targets if is_integer(targets) else targets.movedim(axes[0], 1)
    return F.cross_entropy(scores.movedim(axes[0], 1), moved)


def of_many(loss_fn: LossFn) -> LossFn:
    """Return the same loss for `torch.func.vmap`, in which targets of uint8 index nothing: it is called with int64."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        is_bytes = isinstance(targets, Tensor) and targets.dtype is torch.uint8
        return loss_fn(outputs, targets.long() if is_bytes else targets)

    return loss


def per_example(loss_fn: LossFn, outputs: Any, targets: Tensor) -> Tensor:
    """Return what ``loss_fn``, a mean over examples, is of each example alone, ``(N,)``.

    In one call where its parts are known, else in one vectorised call where it can be made; a loss that indexes by its
    targets or branches is called one by one. An example without a target that counts has the loss 0.
    """
    is_plain = loss_fn is cross_entropy or loss_fn is F.cross_entropy
    if is_plain and isinstance(outputs, Tensor) and outputs.ndim == 2 and is_integer(targets):
        return F.cross_entropy(outputs, targets.long(), reduction="none")
    losses = _each(loss_fn, outputs, targets)
    classes = classes_of(outputs, targets, loss_fn)
    if classes is None:
        return losses
    return torch.where(weighs(classes, loss_fn).reshape(len(targets), -1).any(1), losses, 0.0)


def _each(loss_fn: LossFn, outputs: Any, targets: Tensor) -> Tensor:
    size = len(targets)
    alone, target_alone = examples_alone(outputs, size), targets[:, None]
    try:
        losses = torch.func.vmap(loss_fn)(alone, target_alone)
    except Exception:  # vmap and losses raise many types of errors; all mean that the fast path is not possible
        losses = None
    if losses is not None and losses.shape == (size,):
        return losses
    rows = (example_at(alone, place, size) for place in range(size))
    each = [one_number(loss_fn, row, target).reshape(()) for row, target in zip(rows, target_alone, strict=True)]
    return torch.stack(each)


@dataclass(frozen=True)
class TrainingData(Shown):
    """What a fit knew of its data and loss, remembered in memory, never in files.

    Args:
        loader: Training data, or None.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        forward: ``forward(model, batch) -> loss`` in its place, or None.
        sharded: Whether the loader yields other examples in each of several processes.
    """

    loader: Iterable[Any] | None = None
    loss_fn: LossFn = cross_entropy
    forward: Forward | None = None
    sharded: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


def supervised(loss_fn: LossFn, *, check: bool = False) -> Forward:
    """Return ``forward(model, batch) -> loss`` for ``(inputs, targets)``.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        check: Whether to check that targets are classes of the model.
    """
    compare = checked(loss_fn) if check else partial(loss_of, loss_fn)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = inputs_and_targets(batch)
        return differentiable(compare(run(model, inputs), targets), "loss_fn=")

    forward.weight = partial(weight_in, loss_fn)  # type: ignore[attr-defined]
    forward.is_sum = is_sum(loss_fn)  # type: ignore[attr-defined]
    return forward


def weight_in(loss_fn: LossFn, batch: Any) -> Tensor | float:
    """Return how much a batch ``(inputs, targets)`` counts in the mean over batches."""
    return weight_of(loss_fn, inputs_and_targets(batch)[1], num_examples(batch))


def weight_by(forward: Forward, batch: Any) -> Tensor | float:
    """Return how much a batch counts in the mean over batches: as its loss says, where that is known, else by size."""
    found: Callable[[Any], Tensor | float] = getattr(forward, "weight", num_examples)
    return found(batch)


def checked(loss_fn: LossFn) -> LossFn:
    """Return the same loss with a look at its targets, see `check_targets`."""

    def looked_at(outputs: Any, targets: Any) -> Tensor:
        check_targets(outputs, targets, loss_fn)
        return one_number(loss_fn, outputs, targets)

    return looked_at


def differentiable(loss: Tensor, name: str) -> Tensor:
    """Return a loss; raise unless it has a gradient where one is wanted."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            f"{name} returns a loss without a gradient, so nothing can be learned from it. Compute it from the model's "
            f"outputs by operations that torch can differentiate."
        )
    return loss


def loss_of(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """Return a loss; 0, with a gradient of 0, where all classes of the targets weigh 0 in it."""
    return 0.0 * main_output(outputs).sum() if counts_nothing(loss_fn, targets) else loss_fn(outputs, targets)


def one_number(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """Return what a loss makes of outputs and targets.

    Raises:
        ValueError: If it cannot be called so, or does not return a tensor of one number.
    """
    with refused_by("loss_fn=", outputs, targets):
        loss = loss_of(loss_fn, outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn= must return the mean loss of a batch, a tensor of one number, got {what}.")
    if loss.is_complex():
        raise ValueError("loss_fn= must return the mean loss of a batch, a real number, got a complex one.")
    return loss


@contextmanager
def refused_by(name: str, outputs: Any, targets: Any) -> Iterator[None]:
    """Turn what a loss or metric raises on outputs and targets that it does not take into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        if isinstance(error, (ValueError, FloatingPointError)) and is_of_package(error):
            raise
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"{name} cannot compare the model's outputs, {described(outputs)}, with targets, {described(targets)}: "
            f"{type(error).__name__}: {lines[0] if lines else ''}"
        ) from error


def loss_alone(forward: Forward) -> Forward:
    """Return the same function without outputs and targets, if it returns them, and with errors that name it."""

    def alone(model: nn.Module, batch: Any) -> Tensor:
        return differentiable(answer_of(called(forward, model, batch))[0], "forward=")

    return alone


def called(forward: Forward, model: nn.Module, batch: Any) -> Any:
    """Return what a user's ``forward`` returns.

    Raises:
        ValueError: If it fails on the batch.
    """
    try:
        return forward(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        if isinstance(error, (ValueError, FloatingPointError)) and is_of_package(error):
            raise
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"forward= fails on a batch, {described(batch)}: {type(error).__name__}: {lines[0] if lines else ''}. A "
            f"connection remembers that of its fit; for batches of another kind pass another one, or loss_fn= for "
            f"(inputs, targets)."
        ) from error


def answer_of(found: Any) -> tuple[Tensor, tuple[Any, Any] | None]:
    """Return the loss that a user's ``forward`` returned, and outputs and targets if it did.

    Raises:
        ValueError: If it returned neither a loss nor ``(loss, outputs, targets)``.
    """
    loss, *rest = found if _is_with_outputs(found) else (found,)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"forward= must return the mean loss of a batch, a tensor of one number, or (loss, outputs, targets), got "
            f"{what}."
        )
    return loss.reshape(()), tuple(rest) if rest else None


def _is_with_outputs(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) == 3


def check_targets(outputs: Any, targets: Any, loss_fn: LossFn, *, name: str = "loader") -> None:
    """Raise unless a loss that is known makes sense of outputs and targets; one of the user's own is not judged.

    Raises:
        ValueError: If ``loss_fn`` is `cross_entropy`: where the model has but one output, of which it is 0 whatever
            that is, or targets are neither classes nor probabilities of classes. If it is one of torch's cross
            entropies too: with the first target that is no class; on an accelerator the loss would end the process.
    """
    is_default = loss_fn is cross_entropy
    if (is_default or knows_its_axis(loss_fn)) and isinstance(targets, Tensor) and not is_dense(targets):
        raise ValueError(f"targets of {name} must be a dense tensor, got {described(targets)}: call .to_dense() on it.")
    if is_default:
        _check_for_cross_entropy(main_output(outputs), targets, name)
        for part, tensor in no_heads(outputs).items():
            warn(
                f"the model's output {part!r}, of shape {tuple(tensor.shape)}, is left out of the loss: it is no "
                f"auxiliary head, whose scores have the shape of the logits. Pass a loss_fn=, which gets all that the "
                f"model returns, to count it."
            )
    classes = classes_of(outputs, targets, loss_fn) if is_default or knows_its_axis(loss_fn) else None
    if classes is not None:
        check_classes(classes, name=name)


def check_classes(classes: Classes, *, name: str = "loader") -> None:
    """Raise unless all targets that count are classes of the model.

    Raises:
        ValueError: With the first that is none.
    """
    outside = classes.outside()
    if outside.numel():
        num_classes = classes.scores.shape[1]
        raise ValueError(
            f"targets of {name} must lie in 0..{num_classes - 1}, the model's {num_classes} classes, got a target of "
            f"{outside[0].item()}; what is to be left out must be {classes.ignored}."
        )


def _check_for_cross_entropy(scores: Tensor, targets: object, name: str) -> None:
    if not isinstance(targets, Tensor):
        return
    way_out = "Pass loss_fn=, such as torch.nn.functional.mse_loss, or forward=."
    if scores.ndim < 2 or scores.shape[1] == 1:
        way_out = way_out.replace("mse_loss", "mse_loss or binary_cross_entropy_with_logits")
        raise ValueError(
            f"the model's outputs of shape {tuple(scores.shape)} are no scores of two or more classes, which cross "
            f"entropy, the default loss, compares. {way_out}"
        )
    if is_integer(targets):
        if scores.shape == targets.shape:
            raise ValueError(
                f"targets of {name} are integers in the shape of the model's outputs, {tuple(scores.shape)}. If they "
                f"are one-hot, pass targets.argmax(1), or targets.float(), which are probabilities of classes."
            )
        if not class_axes(scores, targets):
            raise ValueError(
                f"targets of {name} have the shape {tuple(targets.shape)}, which is not that of the model's outputs, "
                f"{tuple(scores.shape)}, without one of their axes: cross entropy, the default loss, cannot compare "
                f"them. {way_out}"
            )
    elif not axes_of_probabilities(tuple(scores.shape), targets):
        what = "truth values" if targets.dtype is torch.bool else "real numbers"
        raise ValueError(
            f"targets of {name} are {what}, of shape {tuple(targets.shape)}: neither classes nor probabilities "
            f"of classes, which cross entropy, the default loss, takes. {way_out}"
        )
