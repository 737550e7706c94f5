"""Train an encoder on pairs of networks of a population."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from modeconn.batch_norm import calibration_batches, norm_layers
from modeconn.copies import copy_of
from modeconn.deep_align.augmentation import rescale
from modeconn.deep_align.encoder import Encoder
from modeconn.loaders import check_loader, endless_batches
from modeconn.loss import LossFn, check_targets, main_output
from modeconn.matching import match_units
from modeconn.matching.sinkhorn import soft_matrices
from modeconn.progress import progress_bar
from modeconn.recipe import one_cycle
from modeconn.weights import named_places

if TYPE_CHECKING:
    from modeconn.deep_align.aligner import DeepAlign

_LOGGER = logging.getLogger(__name__)
_CLIP = 1.0
_VALIDATION_EXAMPLES = 512


class Training:
    """One run, inside one seeded stretch of random numbers.

    Args:
        settings: What to do.
        encoder: Changed in place; at the end it has the weights that were best on the validation pairs.
        model: Any network of the population, for its architecture.
        states: The population ``(N, P)``.
        validation: Networks ``(V, P)`` of which fixed pairs choose the best step.
        loader: Training data, or None if the loss of the networks is not needed.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
    """

    def __init__(
        self,
        settings: DeepAlign,
        encoder: Encoder,
        model: nn.Module,
        states: Tensor,
        validation: Tensor,
        loader: Iterable[Any] | None,
        loss_fn: LossFn,
    ) -> None:
        self.settings, self.encoder, self.graph = settings, encoder, encoder.graph
        self.states = states
        spread = states.var(0).masked_fill(self.graph.is_buffer, 0).sum()
        self.distance = 2 * spread.clamp(min=1e-12)  # of two networks, squared, on average
        self.network = _Network(model, loss_fn, settings.augmentation.rescale)
        self.batches = None if loader is None else endless_batches(loader, states.device)
        self.sample = None
        if loader is not None:
            self.sample = list(
                calibration_batches(loader, states.device, limit=_VALIDATION_EXAMPLES, seed=settings.seed)
            )
            self.network.check(self.graph, states[:2], *check_loader(loader))
        generator = torch.Generator().manual_seed(settings.seed)
        first, second = _pairs(len(validation), settings.validation_pairs, generator)
        self.validation = validation[first], validation[second]
        self.history: dict[str, list[float]] = {name: [] for name in ("supervised", "alignment", "connectivity")}
        self.validations: list[tuple[int, float]] = []

    def run(self, *, progress: bool) -> None:
        """Make all steps, then return to the best."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.encoder.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        best = self._validate(0)
        bar = progress_bar(range(1, settings.steps + 1), show=progress, desc="Deep-Align", unit="step")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * one_cycle(step - 1, settings.steps)
            self._step(optimizer, step)
            if step % settings.validate_every == 0 or step == settings.steps:
                found = self._validate(step)
                best = min(best, found, key=lambda one: one[0])
                bar.set_postfix(validation=f"{found[0]:.4f}")
        self.encoder.load_state_dict(best[1])

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        losses = self.losses()
        settings = self.settings
        weights = {name: getattr(settings, name) for name in losses}
        total = sum(weights[name] * loss for name, loss in losses.items())
        if not total.isfinite():
            values = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
            raise FloatingPointError(
                f"the loss became {total.item()} in step {step} of {settings.steps} ({values}); lower learning_rate."
            )
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.encoder.parameters(), _CLIP)
        optimizer.step()
        for name, values in self.history.items():
            values.append(losses[name].item() if name in losses else 0.0)

    def losses(self) -> dict[str, Tensor]:
        """Return the losses, those of weight 0 left out, on the next pairs."""
        settings, graph, count = self.settings, self.graph, self.settings.batch_size
        first, second = _pairs(len(self.states), count)
        a, b = self.states[first], self.states[second]
        perms = [torch.rand(count, group.size, device=a.device).argsort(1) for group in graph.spec.groups]
        copies = graph.permute(settings.augmentation(graph, a), perms)
        of_a, of_b, of_copies = zip(*(x.chunk(3) for x in self.encoder(torch.cat([a, b, copies]))), strict=True)
        losses = {}
        if settings.supervised:
            losses["supervised"] = supervised_loss(self.encoder.similarities(of_a, of_copies), perms)
        if settings.alignment or settings.connectivity:
            mixed = graph.mix(b, _soft(self.encoder.similarities(of_a, of_b)))
        if settings.alignment:
            losses["alignment"] = graph.distance(a, mixed).mean() / self.distance
        if settings.connectivity:
            t = torch.rand(count, 1, device=a.device, dtype=a.dtype)
            losses["connectivity"] = self.network.losses(
                graph.named(torch.lerp(a, mixed, t)), *next(self.batches)
            ).mean()
        return losses

    @torch.no_grad()
    def _validate(self, step: int) -> tuple[float, dict[str, Tensor]]:
        """Return the loss in the middle between validation networks, really relabelled, and a copy of the weights.

        Without data, it is the squared distance of their parameters.
        """
        a, b = self.validation
        of_a, of_b = zip(*(x.chunk(2) for x in self.encoder(torch.cat([a, b]))), strict=True)
        perms = [torch.stack([match_units(x) for x in s]) for s in self.encoder.similarities(of_a, of_b)]
        moved = self.graph.permute(b, perms)
        if self.sample is None:
            value = float(self.graph.distance(a, moved).mean() / self.distance)
        else:
            middle = self.graph.named(torch.lerp(a, moved, 0.5))
            losses = [self.network.losses(middle, x, y).mean() * len(y) for x, y in self.sample]
            value = float(sum(losses)) / sum(len(y) for _, y in self.sample)
        self.validations.append((step, value))
        _LOGGER.info("step %d of %d: validation %.4f", step, self.settings.steps, value)
        return value, copy.deepcopy(self.encoder.state_dict())


class _Network:
    """The architecture of the population as a function of stacked weights; norm layers use the batch's statistics."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, rescaling: float) -> None:
        self._model = copy_of(model).requires_grad_(False).eval()
        self._norms = [self._model.get_submodule(layer) for layer in norm_layers(self._model)]
        self._places = named_places(self._model)
        self._buffers = {name for name, _ in self._model.named_buffers()}
        self._loss_fn, self._rescaling = loss_fn, rescaling

    def _call(self, state: dict[str, Tensor], inputs: Any) -> Any:
        tensors = {place: state[name] for place, name in self._places.items() if name in state}
        return functional_call(self._model, tensors, (inputs,), tie_weights=False)

    def losses(self, states: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of each of a stack of networks ``(B, ...)`` on the same examples, ``(B,)``."""
        for norm in self._norms:
            norm.train()
        own = {name: x.detach().clone() if name in self._buffers else x for name, x in states.items()}
        return vmap(lambda state: self._loss_fn(self._call(state, inputs), targets), randomness="same")(own)

    @torch.no_grad()
    def check(self, graph: Any, states: Tensor, inputs: Any, targets: Tensor) -> None:
        """Raise a ValueError if a target is no class, or rescaling changes what the network computes."""
        inputs, targets = inputs.to(states.device), targets.to(states.device)
        outputs = main_output(self._model(inputs))
        check_targets(outputs, targets)
        if not self._rescaling:
            return
        factors = [
            1.5 + torch.rand(len(states), g.size, device=states.device, dtype=states.dtype) for g in graph.spec.groups
        ]
        before, after = (
            main_output(self._call({n: x[0].clone() for n, x in graph.named(one).items()}, inputs))
            for one in (states, rescale(graph, states, factors))
        )
        if not (after - before).norm() <= 1e-3 * before.norm():
            raise ValueError(
                f"augmentation.rescale={self._rescaling} changes what these networks compute: it is for ReLU networks "
                f"without norm layers. Pass Augmentation(rescale=0)."
            )


def supervised_loss(similarities: list[Tensor], perms: list[Tensor]) -> Tensor:
    """Return the cross entropy of finding each unit's copy, and each copy's unit, a mean over both and all groups.

    Args:
        similarities: ``(B, n, n)`` for each group, rows for units, columns for copies.
        perms: ``(B, n)`` for each group: copy ``i`` is of unit ``perm[i]``.
    """
    losses = []
    for scores, perm in zip(similarities, perms, strict=True):
        losses.append(F.cross_entropy(scores.mT.flatten(0, 1), perm.flatten()))
        losses.append(F.cross_entropy(scores.flatten(0, 1), perm.argsort(1).flatten()))
    return torch.stack(losses).mean()


def _soft(similarities: list[Tensor]) -> list[Tensor]:
    matrices = soft_matrices({str(k): x for k, x in enumerate(similarities)}, 1.0)  # in another order
    return [matrices[str(k)] for k in range(len(similarities))]


def _pairs(population: int, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return numbers of two different networks, ``(count,)`` each."""
    first = torch.randint(population, (count,), generator=generator)
    return first, (first + torch.randint(1, population, (count,), generator=generator)) % population
