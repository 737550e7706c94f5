"""How sharply the loss bends along a curve: the largest eigenvalue of its Hessian, by products with it alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from modeconn.measure.along import AlongCurve, Quantity
from modeconn.measure.meter import Meter
from modeconn.network.attack import under_attack
from modeconn.network.batches import (
    batches,
    check_loader,
    described,
    first_batch,
    inputs_and_targets,
    is_dense,
    num_examples,
    run,
)
from modeconn.network.loss import (
    Forward,
    LossFn,
    answer_of,
    called,
    cross_entropy,
    differentiable,
    loss_of,
    per_example,
)
from modeconn.network.scores import Weighted, classes_of, weighs, weighted
from modeconn.network.weights import WeightSpace, check_eval_mode, device_of
from modeconn.tools.door import checked
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded
from modeconn.tools.warn import warn

# Steps before the first check: a random vector may hide the largest eigenvalue behind many close ones.
_LOOK_EVERY = 10
_ASYMMETRY = 0.05  # far above rounding in single precision, and far below what wrong derivatives are off by
_ROUNDING = 10.0  # relative to the machine precision

Wrt = Literal["weights", "inputs", "both"]
"""What a Hessian is taken with respect to."""
_WRITTEN = {"both": "weights and inputs"}  # in tables and figures

_Product = Callable[[Tensor], Tensor]
"""Vectors ``(R, D)`` to what R symmetric matrices make of them, ``(R, D)``."""


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(AlongCurve):
    """The largest eigenvalue of the Hessian of the loss at points of a curve.

    Args:
        t: Positions, rising, float64 ``(N,)``.
        eigenvalue: The largest eigenvalue at each, float64 ``(N,)``; with respect to inputs, the mean over examples of
            what each has by itself.
        wrt: "weights", "inputs" or "both", of which the table writes "weights and inputs".
        num_examples: How many examples the loss is a mean over.
        arc_length: Length of the curve from 0 to each position, ``(N,)``, in the norm of weight space; None if unknown.
        seconds: How long that took.
        statistics: With which statistics of norm layers networks were measured; empty for networks that have none.
    """

    t: Tensor
    eigenvalue: Tensor
    wrt: str
    num_examples: int
    arc_length: Tensor | None = None
    seconds: float = 0.0
    statistics: str = ""

    @property
    def values(self) -> dict[str, Tensor]:
        """The eigenvalue by its name in tables and figures, ``(N,)``."""
        return {f"largest eigenvalue, {_WRITTEN.get(self.wrt, self.wrt)}": self.eigenvalue}

    def quantity(self, name: str) -> Quantity:
        """Return how the eigenvalue is written; it has no better and no worse."""
        return Quantity("{:.4g}")


def curvature_along(
    model_at: Callable[[float], nn.Module],
    t: Sequence[float],
    loader: Iterable[Any],
    *,
    wrt: Wrt = "weights",
    arc_length: Tensor | None = None,
    statistics: Callable[[], str] = str,
    progress: bool = False,
    **settings: Any,
) -> Curvature:
    """Return the largest eigenvalue at every t; ``settings`` are those of `largest_eigenvalue`.

    ``statistics`` is asked at the end which statistics norm layers had.
    """
    started, them = time.perf_counter(), joined()

    def mine() -> list[tuple[float, int]]:
        bar = progress_bar(them.mine(t), show=progress, desc="curvature")
        return [largest_eigenvalue(model_at(position), loader, wrt=wrt, **settings) for position in bar]

    found = them.in_order(them.each(mine))
    return Curvature(
        t=torch.tensor(t, dtype=torch.float64),
        eigenvalue=torch.tensor([value for value, _ in found], dtype=torch.float64),
        wrt=wrt,
        num_examples=found[0][1],
        arc_length=arc_length,
        seconds=time.perf_counter() - started,
        statistics=statistics(),
    )


@checked
def largest_eigenvalue(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    wrt: Wrt = "weights",
    num_steps: int = 100,
    tolerance: float = 1e-3,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    seed: int = 0,
) -> tuple[float, int]:
    r"""Return the largest eigenvalue of the Hessian of a network's loss, and over how many examples.

    By the method of Lanczos, from products with the Hessian alone: none is formed, and a product costs about two steps
    of training. Power iteration makes the same products, but keeps only the last vector, and so stops at wrong values
    where eigenvalues are close, or as far below zero as above. This keeps a vector ``(P,)`` for each product, usually
    10 to 50; with respect to inputs, one of the size of a batch, and to both, one of ``(P,)`` and all data. The largest
    eigenvalue in their span is returned once its residual :math:`\lVert H v - \lambda v \rVert` is small.

    With respect to weights it is the Hessian of the mean loss, for all parameters that are not frozen. With respect to
    inputs each example has one of its own; all are found side by side, and the result is the mean of their eigenvalues
    (Zhao et al., 2020, compare it with the robust loss along a curve). With respect to both it is again the one Hessian
    of the mean loss, over these parameters and the inputs of all examples.

    Args:
        model: A network in eval mode, in which no example depends on others.
        loader: Data.
        wrt: Which Hessian: "weights", "inputs" or "both".
        num_steps: How many products at most; more would be needed if a warning says so.
        tolerance: How large the residual may be, relative to the eigenvalue.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples, differentiable twice.
        forward: ``forward(model, batch) -> loss`` in its place, for ``wrt="weights"``.
        seed: Of the random vectors.

    Raises:
        ValueError: If ``wrt`` is unknown, a setting or a target out of range, or the model in train mode.
        FloatingPointError: If a product is NaN.

    References:
        Zhao et al., 2020, https://arxiv.org/abs/2005.00060
    """
    if num_steps < 1 or not tolerance > 0:
        raise ValueError(
            f"num_steps must be at least 1 and tolerance positive, got num_steps={num_steps}, tolerance={tolerance}."
        )
    if forward is not None and wrt != "weights":
        raise ValueError(
            "with forward= it is not known which inputs belong to which example: pass loss_fn=, or wrt='weights'."
        )
    check_eval_mode(model)
    device, space, loss = device_of(model), WeightSpace(model), _Loss(model, loss_fn, forward)
    with seeded(seed, device), under_attack(model), torch.enable_grad(), _twice_differentiable():
        check_loader(loader) if forward is None else first_batch(loader)
        data = list(batches(loader, device))
        for batch in data if wrt != "weights" else ():
            _check_examples(*inputs_and_targets(batch), wrt)
        meter = Meter(data, loss_fn, forward)
        meter.measure(model)  # which looks at every batch, and whether the loss is a mean
        meter.results()  # raises where no target counts
        if wrt != "inputs":
            count = sum(num_examples(batch) for batch in data)
            products = [_product_in_weights(loss, space, data, with_inputs=wrt == "both")]
        else:
            alone = [_examples(model, loss_fn, *inputs_and_targets(batch)) for batch in data]
            count = sum(len(x) for x, _ in alone)
            products = [_product_in_inputs(model, loss_fn, x, y) for x, y in alone if len(x)]
        values = [_largest(product, start, num_steps, tolerance) for product, start in products]
    return float(torch.cat(values).double().mean()), count


class _Loss(nn.Module):
    """The loss of a batch around the model, so that other weights can be put into it.

    Args:
        model: The network.
        loss_fn: ``loss_fn(outputs, targets)``.
        forward: ``forward(model, batch) -> loss`` in its place.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, forward: Forward | None) -> None:
        super().__init__()
        self.model, self._loss_fn, self._forward = model, loss_fn, forward
        self.training = False

    def forward(self, batch: Any) -> Weighted:
        """Return the loss as a sum and its weight."""
        size = num_examples(batch)
        if self._forward is not None:
            loss, _ = answer_of(called(self._forward, self.model, batch))
            return Weighted(loss.double() * size, float(size), False)
        inputs, targets = inputs_and_targets(batch)
        outputs = run(self.model, inputs)
        loss = loss_of(self._loss_fn, outputs, targets).reshape(())
        return weighted(self._loss_fn, loss, outputs, targets, size)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Compute in ways of which torch has a second derivative, and a right one."""
    with sdpa_kernel(SDPBackend.MATH), _WrittenOut():
        yield


class _WrittenOut(TorchFunctionMode):
    """Writes weight normalisation out: the second derivative of torch's own operator is wrong."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _product_in_weights(
    loss: _Loss, space: WeightSpace, data: list[Any], *, with_inputs: bool
) -> tuple[_Product, Tensor]:
    """Return products with the Hessian of the mean loss over ``data``, and a first vector ``(1, D)``.

    It is taken in the weights, or in these and the inputs of all batches, one behind the other.
    """
    theta = space.flatten(loss.model).requires_grad_()
    moving = space.trainable.to(theta)
    if with_inputs:
        pairs = [inputs_and_targets(batch) for batch in data]
        data = [(x.detach().requires_grad_(), y) for x, y in pairs]
    inputs = [x for x, _ in data] if with_inputs else []
    sizes = [len(theta), *(x.numel() for x in inputs)]

    def product(vectors: Tensor) -> Tensor:
        in_weights, *in_inputs = vectors[0].split(sizes)
        total, found_in_inputs, weight = torch.zeros_like(theta), [], 0.0
        for number, batch in enumerate(data):
            weights = {f"model.{name}": tensor for name, tensor in space.unflatten(theta).items()}
            found = torch.func.functional_call(loss, weights, (batch,))
            here = slice(number, number + 1)  # an empty one where inputs stay as they are
            moved, *rest = _times(found.total, [theta, *inputs[here]], [in_weights * moving, *in_inputs[here]])
            total += moved
            found_in_inputs += [one.flatten() for one in rest]
            weight = weight + found.weight
        return torch.cat([total * moving, *found_in_inputs])[None] / weight

    start = [torch.randn_like(theta) * moving, *(torch.randn_like(x).flatten() for x in inputs)]
    return product, torch.cat(start)[None]


def _check_examples(x: Any, y: Any, wrt: str) -> None:
    """Raise unless each example of a batch has an input that can be differentiated by, and a target."""
    if not (is_dense(x) and x.is_floating_point()):
        raise ValueError(
            f"inputs of loader must be one dense floating-point tensor for wrt={wrt!r}, got {described(x)}."
        )
    if not (is_dense(y) and x.ndim and y.ndim and len(x) == len(y)):
        raise ValueError(
            f"loader must yield a target for each example for wrt={wrt!r}, got inputs {described(x)} and targets "
            f"{described(y)}."
        )


def _examples(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the examples of a batch that have a target that counts."""
    with torch.no_grad():
        classes = classes_of(run(model, x), y, loss_fn)
    counted = None if classes is None else weighs(classes, loss_fn).reshape(len(y), -1).any(1)
    return (x, y) if counted is None else (x[counted], y[counted])


def _product_in_inputs(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> tuple[_Product, Tensor]:
    """Return products with the Hessian of each example's own mean loss, and first vectors ``(N, D)``."""
    x = x.detach().requires_grad_()

    def product(vectors: Tensor) -> Tensor:
        # The Hessian of the sum over examples has one block for each example.
        total = per_example(loss_fn, run(model, x), y).double().sum()
        return _times(total, [x], [vectors])[0].reshape(len(x), -1)

    return product, torch.randn_like(x).reshape(len(x), -1)


def _times(loss: Tensor, at: Sequence[Tensor], vector: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the product of the Hessian of ``loss`` with a vector, both in parts, each of the size of one of ``at``."""
    gradients = torch.autograd.grad(differentiable(loss, "the loss"), at, create_graph=True)
    along = sum((gradient * part.view_as(gradient)).sum() for gradient, part in zip(gradients, vector, strict=True))
    if not along.requires_grad:  # A linear loss has no second derivative.
        return [torch.zeros_like(one) for one in at]
    return [product.detach() for product in torch.autograd.grad(along, at, materialize_grads=True)]


def _largest(product: _Product, start: Tensor, num_steps: int, tolerance: float) -> Tensor:
    """Return the largest eigenvalue of each matrix, ``(R,)``, by the method of Lanczos."""
    size, basis, diagonal, beside = start.shape[1], [_unit(start)], [], []
    for step in range(1, min(num_steps, size) + 1):
        moved = product(basis[-1])
        diagonal.append((moved * basis[-1]).sum(1))
        if step > 1:
            _check_symmetry((moved * basis[-2]).sum(1), beside[-1], torch.stack([*diagonal, *beside]))
        moved = _orthogonal(moved, basis)
        lengths = torch.linalg.vector_norm(moved, dim=1)
        if step % _LOOK_EVERY == 0 or step in (num_steps, size):
            values, settled = _ritz(diagonal, beside, lengths, tolerance)
            if step == size or settled.all():
                return values
        # A residual that is rounding noise: the Krylov space is exhausted, so restart from a random direction.
        spent = lengths <= _ROUNDING * torch.finfo(moved.dtype).eps * torch.stack(diagonal).abs().amax(0)
        beside.append(lengths.masked_fill(spent, 0))
        moved = torch.where(spent[:, None], torch.randn_like(moved), moved)
        basis.append(_unit(_orthogonal(_unit(moved), basis)))
    warn(
        f"the largest eigenvalue did not settle in {num_steps} steps; it is a lower bound. "
        f"Pass a larger num_steps or tolerance."
    )
    return values


def _check_symmetry(above: Tensor, below: Tensor, entries: Tensor) -> None:
    """Raise unless the entries beside the diagonal, above and below, agree as they do for symmetric matrices.

    All matrices together: that of an example of which the network is sure is nothing but rounding.
    """
    off = float((above - below).abs().double().sum() / entries.abs().amax(0).double().sum().clamp(min=1e-300))
    if off > _ASYMMETRY * max(1.0, torch.finfo(entries.dtype).eps / 1e-4):
        raise ValueError(
            f"the second derivative of the loss is not symmetric, by {off:.0%} of its size: torch computes that of one "
            f"of the model's operators wrongly, or the network draws random numbers. Write the operator out of "
            f"elementary ones; let nothing be drawn in eval mode."
        )


def _ritz(diagonal: list[Tensor], beside: list[Tensor], lengths: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the largest Ritz value of each matrix, and whether its residual is small, both ``(R,)``."""
    matrices = torch.diag_embed(torch.stack(diagonal, 1).double().cpu())
    if beside:
        matrices += torch.diag_embed(torch.stack(beside, 1).double().cpu(), -1)  # eigh reads the lower half only
    if not matrices.isfinite().all():
        raise FloatingPointError("the Hessian is NaN or infinite. Look for NaN in the network's weights and the data.")
    every, vectors = torch.linalg.eigh(matrices)
    values, residuals = every[:, -1], lengths.double().cpu() * vectors[:, -1, -1].abs()
    rounding = _ROUNDING * torch.finfo(lengths.dtype).eps * every.abs().amax(1)
    return values, residuals <= torch.maximum(tolerance * values.abs(), rounding)


def _orthogonal(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    """Take out of each vector what lies in its basis, twice: once leaves too much where little else is in it."""
    for direction in (*basis, *basis):
        vectors = vectors - (vectors * direction).sum(1, keepdim=True) * direction
    return vectors


def _unit(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny)
