"""Projected gradient descent: the attack that trains robust networks, and gives a first reading of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeconn.network.attack import check_attackable, under_attack
from modeconn.network.batches import run
from modeconn.network.loss import LossFn, check_targets, cross_entropy, differentiable, one_number, per_example
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings
from modeconn.tools.fingerprint import identify
from modeconn.tools.shown import Shown

_SCALE = 2.0**10  # The loss is scaled up so that float16 gradients do not underflow; a power of two adds no rounding.
_ROUNDING = 1e-5  # Augmentation may leave the pixel range by this much.


@dataclass(frozen=True, repr=False)
class PGD(Shown):
    r"""Move inputs uphill on the loss, inside a ball of radius ``eps`` around them (Madry et al., 2018).

    .. math:: x_{i+1} = \Pi_{B_\epsilon(x) \cap [0, 1]^d} \left( x_i + \alpha \, u(\nabla_x L(x_i, y)) \right)

    with :math:`u(g) = \operatorname{sign} g` in the norm "linf" and :math:`u(g) = g / \lVert g \rVert` in "l2".
    ``PGD(...)(model, x, y)`` returns the last point. Other attacks are settings of this one:

    - FGSM (Goodfellow et al., 2015): ``PGD(eps, eps, 1, random_start=False)``;
    - that of fast adversarial training (Wong et al., 2020): ``PGD(eps, 1.25 * eps, 1)``.

    No gradient is computed but that of the inputs. A network in eval mode is attacked as it is. One in train mode is
    attacked as the function that the next update improves, batch norm with the statistics of the batch, which matters
    along a curve, where there are no others; but running statistics stay and dropout is off.

    Args:
        eps: Radius of the ball, in units of the pixel range, before any normalisation, which belongs into the model;
            0 returns ``x`` bit for bit.
        step_size: :math:`\alpha`, in the same units.
        num_steps: How many steps; 0 leaves the random start.
        norm: "linf" or "l2", each example by itself.
        random_start: Whether to begin at a uniformly random point of the ball.
        num_restarts: How many attacks to make; of each example the one of highest loss is kept. Restart k is the same
            however many there are, so in eval mode more of them never lower any example's loss. (Its answer may turn
            right again, though: a higher loss can belong to a right answer.)
        targeted: Whether ``y`` are classes to lead to: the loss then falls.
        loss_fn: ``loss_fn(outputs, y)``, a mean over examples, to be raised.
        clip: Lowest and highest value of a pixel, or None for inputs that are no images.
        seed: Of the random starts; each call then begins alike. None draws from torch's global generator, which in
            training is the run's own.

    Raises:
        ValueError: If a setting is out of range; when called, if an input is outside ``clip`` or ``y`` no class.
        FloatingPointError: When called, if a gradient is NaN.

    References:
        Madry et al., 2018, https://arxiv.org/abs/1706.06083; Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572;
        Wong et al., 2020, https://arxiv.org/abs/2001.03994

    Example:
        >>> from modeconn import models
        >>> attack = PGD(8 / 255, 2 / 255, 5)
        >>> attack
        PGD(eps=8/255, step_size=2/255, num_steps=5)
        >>> x = torch.full((3, 4), 0.5)
        >>> x_adv = attack(models.mlp(4, (8,), 2), x, torch.tensor([0, 1, 1]))
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    eps: float
    step_size: float
    num_steps: int
    _: KW_ONLY
    norm: Literal["linf", "l2"] = "linf"
    random_start: bool = True
    num_restarts: int = 1
    targeted: bool = False
    loss_fn: LossFn = cross_entropy
    clip: tuple[float, float] | None = (0.0, 1.0)
    seed: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_radius(self.eps)
        check_integers(self, "num_steps", "num_restarts", "seed")
        check_at_least(self, 0, "num_steps")
        if self.num_steps > 0 and not (isinstance(self.step_size, Real) and 0 < self.step_size < math.inf):
            raise ValueError(
                f"step_size must be positive and finite, got step_size={self.step_size!r} for "
                f"num_steps={self.num_steps}."
            )
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be 'linf' or 'l2', got norm={self.norm!r}.")
        check_at_least(self, 1, "num_restarts")
        if self.num_restarts > 1 and not self.random_start:
            raise ValueError(
                f"num_restarts={self.num_restarts} without random_start would repeat one attack. Use random_start=True."
            )
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be the lowest and the highest value of a pixel, got clip={self.clip}.")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial examples.

        Args:
            model: Any network, in the mode in which it is to be attacked; it is left as it was.
            x: Inputs ``(N, ...)``, floating point, in ``clip``.
            y: Right classes, int64 ``(N,)``, or wherever ``targeted`` leads to; else what ``loss_fn`` takes.

        Returns:
            ``x_adv``, as ``x``, without a gradient.
        """
        check_pixels(x, self.clip)
        largest = torch.finfo(x.dtype).max / 4  # so that sums and differences stay finite
        if not max(self.eps, self.step_size) <= largest:
            raise ValueError(
                f"eps and step_size must be at most {largest:.3g} for inputs of {x.dtype}, got eps={self.eps:g} and "
                f"step_size={self.step_size:g}."
            )
        if self.eps == 0 or not len(x):
            return x
        x, generator = x.detach(), self._generator(x.device)
        with under_attack(model):
            found = self._attack(model, x, y, generator)
            if self.num_restarts > 1:
                losses = self._losses(model, found, y)
            for _ in range(1, self.num_restarts):
                other = self._attack(model, x, y, generator)
                others = self._losses(model, other, y)
                better = others > losses
                losses = torch.where(better, others, losses)
                found = torch.where(_per_example(better, x), other, found)
        return found

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return where one attack ends."""
        norm, uphill = _NORMS[self.norm], -1.0 if self.targeted else 1.0
        lowest, highest = (-math.inf, math.inf) if self.clip is None else self.clip
        x_adv, found_nan = x, torch.zeros((), dtype=torch.bool, device=x.device)
        if generator is not None:
            x_adv = (x + norm.random(x, self.eps, generator)).clamp(lowest, highest)
        for step in range(self.num_steps):
            x_adv = x_adv.detach().requires_grad_()
            outputs = run(model, x_adv)
            if step == 0:
                check_targets(outputs, y, self.loss_fn, name="an attack")
            loss = differentiable(one_number(self.loss_fn, outputs, y), "loss_fn=")
            (gradient,) = torch.autograd.grad(_SCALE * loss, x_adv)
            found_nan |= gradient.isnan().any()
            moved = torch.add(x_adv.detach(), norm.direction(gradient), alpha=uphill * self.step_size)
            x_adv = norm.project(moved, x, self.eps).clamp(lowest, highest)
        if found_nan:  # Checked once per call, because every check makes an accelerator wait.
            raise FloatingPointError(f"{self!r} met a gradient that is NaN; look for NaN in the network's weights.")
        return x_adv

    def _losses(self, model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
        """Return what each example's loss is, ``(N,)``, negated if the attack lowers it."""
        with torch.no_grad():
            losses = per_example(self.loss_fn, run(model, x_adv), y)
        return -losses if self.targeted else losses

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """Return a generator of this call's random starts, which all restarts draw from one after the other.

        Of the global generator one number is taken, so what follows does not depend on the number of restarts.
        """
        if not self.random_start:
            return None
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed(seed)

    def __repr__(self) -> str:
        """Name what was set, numbers in units of 1/255 where that is shorter."""
        shown = [
            f"{field.name}={show(getattr(self, field.name))}"
            for field in fields(self)
            if field.name in ("eps", "step_size", "num_steps") or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def check_radius(eps: float) -> None:
    """Raise a ValueError unless ``eps`` can be the radius of a ball."""
    if not (isinstance(eps, Real) and 0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number, 0 or more, got eps={eps!r}.")


def check_pixels(x: Tensor, clip: tuple[float, float] | None) -> None:
    """Raise a ValueError unless inputs are floating point and in the pixel range ``clip``, if there is one."""
    check_attackable(x)
    if clip is None or not x.numel():
        return
    lowest, highest = (value.item() for value in x.detach().aminmax())
    if math.isnan(lowest):
        raise ValueError("inputs of an attack must lie in the pixel range, but some are NaN. Look at the data.")
    if not clip[0] - _ROUNDING <= lowest <= highest <= clip[1] + _ROUNDING:
        raise ValueError(
            f"inputs of an attack must lie in [{clip[0]:g}, {clip[1]:g}], got values from {lowest:g} to "
            f"{highest:g}. Divide images in [0, 255] by 255, put normalisation into the model, or pass clip=."
        )


def show(value: Any) -> str:
    """Return a setting as its caller would write it: numbers in units of 1/255 where that is shorter."""
    if callable(value):
        return identify(value)
    levels = round(value * 255) if isinstance(value, float) else 0
    return min(repr(value), f"{levels}/255", key=len) if levels and levels / 255 == value else repr(value)


@dataclass(frozen=True)
class _Norm:
    """What depends on the norm: a point in the ball around 0, the steepest direction of length 1, the projection."""

    random: Callable[[Tensor, float, torch.Generator], Tensor]
    direction: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor, float], Tensor]


def _random_in_cube(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x).uniform_(-eps, eps, generator=generator)


def _project_to_cube(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.clamp(x_adv, x - eps, x + eps)


def _random_in_ball(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Return uniform points: of a ball's volume the share inside radius r is (r / eps) to the power of dimensions."""
    share = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    radius = eps * share ** (1 / max(x[0].numel(), 1))
    return _unit(torch.empty_like(x).normal_(generator=generator)) * _per_example(radius, x)


def _unit(x: Tensor) -> Tensor:
    return x / _lengths(x).clamp(min=torch.finfo(x.dtype).tiny)


def _project_to_ball(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    moved = x_adv - x
    return x + moved * (eps / _lengths(moved).clamp(min=eps))


def _lengths(x: Tensor) -> Tensor:
    return _per_example(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


def _per_example(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values (N,)`` with dimensions added so that they go with ``x (N, ...)``."""
    return values.view(-1, *[1] * (x.dim() - 1))


_NORMS = {
    "linf": _Norm(_random_in_cube, torch.sign, _project_to_cube),
    "l2": _Norm(_random_in_ball, _unit, _project_to_ball),
}
