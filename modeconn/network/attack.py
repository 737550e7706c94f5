"""What an attack is, and the state in which a network is attacked."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modeconn.network.batches import inputs_and_targets
from modeconn.network.copies import check_no_inference
from modeconn.network.modes import backward_in_eval_mode, flags_kept
from modeconn.tools.door import check_settings, shown
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown


class Attack(Protocol):
    """An attack: a function, or an object that can be called.

    It may have any of these attributes, by which it is described, checked and compared with others:

    - ``eps`` and ``norm``: radius and norm ("linf", "l2" or "l1") of the ball that its examples stay in, which is
      checked, in units of the pixel range.
    - ``black_box``: True if it uses no gradients; what it finds then shows where those of others are masked.
    - ``targeted``: True if targets are the classes it leads to; such an attack measures no robustness.
    - ``settings``: A mapping of all that tells one setting of it from another; default the fields of a dataclass.
    - ``name``: What it is called beside the name of its class.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial examples of ``x``, in the same shape and dtype, finite and in [0, 1]."""
        ...


def is_attack(value: Any) -> bool:
    """Whether a value can be called as an attack is, ``value(model, x, y)``; a network cannot."""
    if isinstance(value, type) or not callable(value):
        return False
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):  # written in C
        return True
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    return True


def check_examples(x_adv: Any, x: Tensor, name: object) -> None:
    """Raise a ValueError unless what an attack returned for ``x`` can stand in its place; ``name`` stands for it."""
    if not isinstance(x_adv, Tensor):
        raise ValueError(f"{name} must return a tensor, but returned {type(x_adv).__name__}.")
    if x_adv.shape != x.shape:
        raise ValueError(f"{name} returned a shape of {tuple(x_adv.shape)} for inputs of shape {tuple(x.shape)}.")
    if x_adv.dtype != x.dtype:
        raise ValueError(f"{name} returned {x_adv.dtype} for inputs of {x.dtype}.")


@contextmanager
def under_attack(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters and, in train mode, keep nothing but the batch statistics of batch norm; undo both on exit.

    A network in train mode is attacked as the function that the next update improves: its batch norm uses the batch at
    hand. But no running statistic moves, dropout is off, and so are heads that exist for training alone. A network in
    eval mode stays as it is. Gradients are on, and all flags are as before at the end, also after an exception.
    """
    check_no_inference(model)
    training = [module for module in model.modules() if module.training]
    counting = [module for module in training if isinstance(module, _BatchNorm) and module.track_running_stats]
    with flags_kept(model):
        model.requires_grad_(False)
        for module in training:
            module.training = isinstance(module, _BatchNorm)
        try:
            for layer in counting:
                layer.track_running_stats = False
            with torch.enable_grad(), backward_in_eval_mode(model):
                yield
        finally:
            for layer in counting:
                layer.track_running_stats = True


def check_attackable(x: Any) -> None:
    """Raise a ValueError unless inputs are what attacks change: one tensor of floating-point values."""
    if not isinstance(x, Tensor):
        raise ValueError(f"inputs of an attack must be one tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise ValueError(
            f"inputs of an attack must be floating point, got {x.dtype}. Divide pixels by 255; integers such as tokens "
            f"cannot be attacked."
        )
    if x.dtype.itemsize < 2:
        raise ValueError(f"inputs of an attack must have 16 bits or more, got {x.dtype}, in which torch adds nothing.")


def attacked_in_eval_mode(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    """Return adversarial examples of the network in eval mode; its flags and the global random state stay."""
    check_attackable(x)
    with seeded(seed, x.device), under_attack(model):
        model.eval()  # `under_attack` restores
        return attack(model, x, y)


@dataclass(frozen=True)
class AdversarialExamples(Shown):
    """Training data as each network's own adversarial examples, for ``recalibrate=``.

    Batch norm is then recalibrated on clean data first, the network attacked with these statistics, in eval mode, and
    recalibrated again on what the attack found.

    Args:
        loader: Training data, ``(inputs, targets)`` batches.
        attack: The attack.
    """

    loader: Iterable[Any]
    attack: Attack

    def __post_init__(self) -> None:
        check_settings(self)
        if not is_attack(self.attack):
            raise ValueError(f"attack must be called as attack(model, x, y), got {shown('attack', self.attack)}.")

    def of(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the batches as adversarial examples of one network; always the same for the same network."""
        return [
            (attacked_in_eval_mode(self.attack, model, inputs, targets, seed=number), targets)
            for number, (inputs, targets) in enumerate(map(inputs_and_targets, self.loader))
        ]
