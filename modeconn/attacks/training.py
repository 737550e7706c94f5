"""Losses of networks under attack: what adversarial training lowers in place of the loss on clean examples."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeconn.attacks.pgd import PGD, check_pixels, show
from modeconn.network.attack import Attack, check_examples, is_attack, under_attack
from modeconn.network.batches import run
from modeconn.network.loss import LossFn, main_output
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings, shown
from modeconn.tools.shown import Shown


class Adversary(Protocol):
    """A way to train against an attack."""

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> Tensor:
        """Return what training lowers, a mean over examples, for ``loss_fn(outputs, targets)``."""
        ...


@dataclass(frozen=True)
class AdversarialTraining(Shown):
    r"""Lower the loss on adversarial examples of the network at hand (Madry et al., 2018).

    .. math:: (1 - w) \max_{\lVert \delta \rVert \le \epsilon} L(x + \delta) + w \, L(x)

    ``adversary=PGD(...)`` means ``AdversarialTraining(PGD(...))``. The attack sees the network as `PGD` says:
    batch norm with the statistics of the batch, as the update does, dropout off, running statistics unmoved.

    Args:
        attack: ``attack(model, x, y) -> x_adv``.
        clean_weight: :math:`w`, the share of clean examples in the loss, in [0, 1); 0 is Madry's objective, 1/2 that of
            Goodfellow et al. Where it is positive, clean and adversarial examples take one pass each.

    Raises:
        ValueError: If the share is out of range.

    References:
        Madry et al., 2018, https://arxiv.org/abs/1706.06083; Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572
    """

    attack: Attack
    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self)
        if not is_attack(self.attack):
            raise ValueError(
                f"attack must be one such as PGD(eps, step_size, num_steps), got {shown('attack', self.attack)}."
            )
        if not 0 <= self.clean_weight < 1:
            raise ValueError(
                f"clean_weight must lie in [0, 1), got clean_weight={self.clean_weight}. Without adversary= "
                f"training is clean."
            )

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> Tensor:
        """Return the loss of the mixture."""
        with under_attack(model):
            moved = self.attack(model, inputs, targets)
        check_examples(moved, inputs, self.attack)
        loss = loss_fn(run(model, moved), targets)
        if not self.clean_weight:
            return loss
        return torch.lerp(loss, loss_fn(run(model, inputs), targets), self.clean_weight)


@dataclass(frozen=True)
class TRADES(Shown):
    r"""Lower the clean loss, and how far an attack can move the network's answers (Zhang et al., 2019).

    .. math:: L(x) + \beta \max_{\lVert \delta \rVert \le \epsilon} \mathrm{KL}(p(x) \,\|\, p(x + \delta))

    The attack raises the divergence from the clean answers, so it does not read targets. Clean and adversarial
    examples take one pass each.

    Args:
        attack: A `PGD` with a random start, since the divergence has no slope at ``x``; its ``loss_fn`` is replaced.
        beta: The weight of the divergence, positive.

    Raises:
        ValueError: If ``attack`` has no random start, leads to targets, or is no `PGD`, or ``beta`` is not positive.

    References:
        Zhang et al., 2019, https://arxiv.org/abs/1901.08573
    """

    attack: PGD
    beta: float = 6.0

    def __post_init__(self) -> None:
        check_settings(self)
        if not isinstance(self.attack, PGD):
            raise ValueError(
                f"TRADES chooses what its attack raises, so the attack must be a PGD, got {self.attack!r}."
            )
        if not self.attack.random_start or self.attack.targeted:
            raise ValueError(f"the attack of TRADES must have a random start and no targets, got {self.attack!r}.")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got beta={self.beta}.")

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> Tensor:
        """Return clean loss and weighted divergence."""
        with under_attack(model):
            with torch.no_grad():
                answers = _log_probabilities(run(model, inputs))
            moved = replace(self.attack, loss_fn=_divergence)(model, inputs, answers)
        outputs = run(model, inputs)
        return loss_fn(outputs, targets) + self.beta * _divergence(run(model, moved), _log_probabilities(outputs))


@dataclass(frozen=True, repr=False)
class FreeAdversarialTraining(Shown):
    r"""Adversarial training at the price of ordinary training (Shafahi et al., 2019).

    Each batch is used ``num_replays`` times in a row. Every backward pass serves twice: for a step of the weights, and
    for a step of the perturbation,

    .. math:: \delta \leftarrow \Pi_{[-\epsilon, \epsilon]}
        \left( \delta + \alpha \operatorname{sign} \nabla_\delta L(x + \delta) \right),

    which begins at 0 and is never reset: the next batch starts from where the last one left it. An epoch makes
    ``num_replays`` times as many steps, so use that many fewer epochs. The network stays in train mode throughout, so
    dropout and running statistics see every pass. On a curve each pass has its own position.

    Args:
        eps: Largest change of a pixel, in units of the pixel range; 0 replays clean batches.
        step_size: :math:`\alpha`, in the same units. Default: ``eps``.
        num_replays: How often a batch is used; 4 to 8 in the paper.
        clip: Lowest and highest value of a pixel, or None for inputs that are no images.

    Raises:
        ValueError: If a setting is out of range; when training, if an input is outside ``clip``.

    References:
        Shafahi et al., 2019, https://arxiv.org/abs/1904.12843
    """

    eps: float
    step_size: float | None = None
    num_replays: int = 4
    clip: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_settings(self)
        PGD(self.eps, self._step_size, 1, clip=self.clip)  # raises unless the settings are valid
        check_integers(self, "num_replays")
        check_at_least(self, 1, "num_replays")

    @property
    def _step_size(self) -> float:
        return (self.eps or 1.0) if self.step_size is None else self.step_size

    def start(self) -> FreeRun:
        """Return what one run trains against."""
        lowest, highest = (-math.inf, math.inf) if self.clip is None else self.clip
        return FreeRun(self, self._step_size, lowest, highest)

    def __repr__(self) -> str:
        """Name what was set."""
        step = "" if self.step_size is None else f", step_size={show(self.step_size)}"
        clip = "" if self.clip == (0.0, 1.0) else f", clip={self.clip}"
        return f"FreeAdversarialTraining(eps={show(self.eps)}{step}, num_replays={self.num_replays}{clip})"


@dataclass
class FreeRun:
    """The adversary of one run of free training, with the perturbation that it carries from batch to batch.

    Attributes:
        perturbation: One for each place in a batch, ``(N, ...)``; None before the first batch.
    """

    settings: FreeAdversarialTraining
    step_size: float
    lowest: float
    highest: float
    perturbation: Tensor | None = None

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> Tensor:
        """Return the loss at the perturbed inputs; its backward pass moves the perturbation."""
        check_pixels(inputs, self.settings.clip)
        all_places = self.perturbation = self._fitted(inputs)
        delta = all_places[: len(inputs)].clone().requires_grad_()

        def move(gradient: Tensor) -> None:
            moved = torch.add(delta.detach(), gradient.sign(), alpha=self.step_size)
            all_places[: len(inputs)] = moved.clamp_(-self.settings.eps, self.settings.eps)

        delta.register_hook(move)
        return loss_fn(run(model, (inputs + delta).clamp(self.lowest, self.highest)), targets)

    def _fitted(self, inputs: Tensor) -> Tensor:
        """Return the perturbation with places for all inputs; new places, or those of another shape, begin at 0."""
        known = self.perturbation
        if known is None or known.shape[1:] != inputs.shape[1:]:
            return torch.zeros_like(inputs)
        known = known.to(inputs)
        return torch.cat([known, torch.zeros_like(inputs[len(known) :])])


AdversaryLike = Adversary | FreeAdversarialTraining | Attack
"""What ``adversary=`` takes."""


def adversary_of(adversary: AdversaryLike) -> Adversary | FreeAdversarialTraining:
    """Return the way to train that ``adversary=`` means: itself, or for an attack that of Madry et al.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(adversary, FreeAdversarialTraining) or inspect.isroutine(getattr(type(adversary), "loss", None)):
        return adversary  # An attack may hold a loss as an attribute; only an adversary has a method of that name.
    if not is_attack(adversary):
        raise ValueError(
            f"adversary must be an attack, AdversarialTraining(...), FreeAdversarialTraining(...) or TRADES(...), got "
            f"{shown('adversary', adversary)}."
        )
    return AdversarialTraining(adversary)


def _log_probabilities(outputs: Any) -> Tensor:
    return main_output(outputs).log_softmax(1)


def _divergence(outputs: Any, answers: Tensor) -> Tensor:
    """Return the mean over examples of the divergence of ``outputs`` from log probabilities ``answers``, ``(N, C)``."""
    return F.kl_div(_log_probabilities(outputs), answers, reduction="batchmean", log_target=True)
