"""Train an encoder on pairs of networks of a population."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from modeconn.deep_align.augmentation import rescale
from modeconn.deep_align.encoder import Encoder
from modeconn.deep_align.settings import Settings
from modeconn.learning.checkpoint import RunFile, State, check_alike
from modeconn.learning.parts import BatchStream, Count, Learned, Randomness
from modeconn.learning.shared_gradient import SharedGradient
from modeconn.matching import match_units
from modeconn.matching.sinkhorn_operator import soft_matrices
from modeconn.network.batch_norm import calibration_batches, norm_layers
from modeconn.network.batches import check_loader, inputs_and_targets, run, to_device
from modeconn.network.copies import copy_of
from modeconn.network.loss import LossFn, check_targets, checked, main_output, of_many
from modeconn.network.recipe import one_cycle
from modeconn.network.shares import is_shared_out, share_of
from modeconn.network.vectorised import over_networks
from modeconn.network.weights import named_places
from modeconn.symmetry.explore import example_for
from modeconn.symmetry.graph import Example
from modeconn.tools.processes import joined
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import reseed, seed_of

_LOGGER = logging.getLogger(__name__)
_CLIP = 1.0
_VALIDATION_EXAMPLES = 512


class EncoderTraining:
    """One run, inside one seeded stretch of random numbers.

    Args:
        settings: What to do.
        encoder: Changed in place; at the end it has the weights that were best on the validation pairs.
        network: The architecture of the population.
        states: The population ``(N, P)``.
        validation: Networks ``(V, P)`` of which fixed pairs choose the best step.
        loader: Training data, not read if the loss of the networks is not needed.
        example: Inputs of a network, by which rescaling is checked; None where the networks have some themselves.
        sharded: Whether the loader yields other examples in each process.

    Processes that share the run take pairs and batches of their own, and step along their mean gradient.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        network: PopulationNetwork,
        states: Tensor,
        validation: Tensor,
        loader: Iterable[Any] | None,
        example: Any = None,
        *,
        sharded: bool = False,
    ) -> None:
        self.settings, self.encoder, self.graph = settings, encoder, encoder.graph
        self.states = states
        spread = states.var(0).masked_fill(self.graph.is_buffer, 0).sum()
        self.distance = 2 * spread.clamp(min=1e-12)  # mean squared distance between two networks
        self.network = network
        self._them = joined()
        share = loader
        if settings.connectivity:
            share = share_of(loader, self._them, sharded=sharded)
        self.batches = None if not settings.connectivity else BatchStream(share, states.device)
        if settings.connectivity:
            read = partial(calibration_batches, loader, states.device, limit=_VALIDATION_EXAMPLES, seed=settings.seed)
            has_own = is_shared_out(loader, sharded=sharded)  # but all have to choose the same step
            self.sample = to_device(self._them.first(read), states.device) if has_own else list(read())
            self.network.check_targets(*to_device(check_loader(loader), states.device))
        if settings.augmentation.rescale:
            self._check_rescaling(example_for(network.model, example))
        generator = torch.Generator().manual_seed(settings.seed)
        first, second = _pairs(len(validation), settings.num_validation_pairs, generator)
        self.validation = validation[first], validation[second]
        self.history: dict[str, list[float]] = {name: [] for name in ("supervised", "alignment", "connectivity")}
        self.validations: list[tuple[int, float]] = []
        self._gradient = None if self._them.size == 1 else SharedGradient(encoder.parameters())
        self._best: dict[str, Tensor] = {}  # the encoder where its validation was lowest

    def run(self, file: RunFile, *, progress: bool) -> None:
        """Make all steps, from where the run was saved if it was, and return to the best; validations are saved."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.encoder.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        done, randomness = Count("steps"), Randomness(self.states.device)
        parts = [self, Learned(self.encoder.state_dict(), optimizer), done, *([self.batches] if self.batches else [])]
        parts.append(randomness)  # last, because others draw random numbers while they restore their state
        if not self._them.is_first:
            reseed(seed_of(settings.seed, self._them.rank), self.states.device)  # for pairs of its own
        if file.resume(*parts) and file.is_of_others:
            reseed(seed_of(settings.seed, self._them.rank, done.value), self.states.device)
        if not self.validations:
            self._validate(0)
        steps = range(done.value + 1, settings.num_steps + 1)
        bar = progress_bar(
            steps, show=progress, desc="Deep-Align", unit="step", initial=done.value, total=settings.num_steps
        )
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * one_cycle(step - 1, settings.num_steps)
            self._step(optimizer, step)
            done.value = step
            if step % settings.validate_every == 0 or step == settings.num_steps:
                bar.set_postfix(validation=f"{self._validate(step):.4f}")
                file.save(*parts)
        if not self._best:
            raise FloatingPointError(
                f"the loss in the middle between validation networks is not finite after any of {settings.num_steps} "
                f"steps; look for values in networks or data that are too large."
            )
        self.encoder.load_state_dict(self._best)

    def state(self) -> State:
        """Return what was found so far, as a part of a run."""
        values = [(step, value if isfinite(value) else None) for step, value in self.validations]
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        return best, {"losses": self.history, "validations": values}

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.history = about["losses"]
        self.validations = [(step, inf if value is None else value) for step, value in about["validations"]]
        best = {name: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        self._best = {name.removeprefix("best."): tensor.to(self.states.device) for name, tensor in best.items()}
        if self._best:
            check_alike({f"best.{name}": tensor for name, tensor in self.encoder.state_dict().items()}, best)

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        losses: list[float] = []

        def differentiate() -> tuple[float, bool]:
            losses[:] = self._differentiate(step)
            return 1.0, True

        if self._gradient is None:
            differentiate()
        else:
            self._gradient.average(differentiate)
        found = self._them.numbers(lambda: losses)
        nn.utils.clip_grad_norm_(self.encoder.parameters(), _CLIP)
        optimizer.step()
        for values, mean in zip(self.history.values(), found.mean(0).tolist(), strict=False):
            values.append(mean)

    def _differentiate(self, step: int) -> list[float]:
        """Bring the gradient of the losses of the next pairs to the encoder; return them, 0 those left out."""
        losses = self.losses()
        settings = self.settings
        weights = {name: getattr(settings, name) for name in losses}
        total = sum(weights[name] * loss for name, loss in losses.items())
        if not total.isfinite():
            values = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
            raise FloatingPointError(
                f"the loss became {total.item()} in step {step} of {settings.num_steps} ({values}); "
                f"lower learning_rate."
            )
        total.backward()
        return [losses[name].item() if name in losses else 0.0 for name in self.history]

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
                graph.named(graph.between(a, mixed, t)), *inputs_and_targets(next(self.batches))
            ).mean()
        return losses

    @torch.no_grad()
    def _check_rescaling(self, example: Example) -> None:
        """Raise a ValueError if rescaling changes what a network computes."""
        state, groups = self.states[:1], self.graph.spec.groups
        factors = [1.5 + torch.rand(1, g.size, device=state.device, dtype=state.dtype) for g in groups]
        before, after = (
            self.network.outputs({name: x[0].clone() for name, x in self.graph.named(one).items()}, example)
            for one in (state, rescale(self.graph, state, factors))
        )
        if not (after - before).norm() <= torch.finfo(state.dtype).eps ** 0.5 * before.norm():
            raise ValueError(
                f"augmentation.rescale={self.settings.augmentation.rescale} changes what these networks compute: it is "
                f"for ReLU networks without norm layers, whose weights have the units that they make along axis 0, as "
                f"those of nn.Linear and nn.Conv2d, not nn.ConvTranspose2d. Pass WeightAugmentation(rescale=0)."
            )

    @torch.no_grad()
    def _validate(self, step: int) -> float:
        """Return the loss in the middle between validation networks, really relabelled; keep the best encoder.

        Without data, or use for it, it is the squared distance of their parameters.
        """
        a, b = self.validation
        of_a, of_b = zip(*(x.chunk(2) for x in self.encoder(torch.cat([a, b]))), strict=True)
        perms = [torch.stack([match_units(x) for x in s]) for s in self.encoder.similarities(of_a, of_b)]
        moved = self.graph.permute(b, perms)
        if not self.settings.connectivity:
            value = float(self.graph.distance(a, moved).mean() / self.distance)
        else:
            middle = self.graph.named(self.graph.between(a, moved, 0.5))
            pairs = [inputs_and_targets(batch) for batch in self.sample]
            losses = [self.network.losses(middle, x, y).mean() * len(y) for x, y in pairs]
            value = float(sum(losses)) / sum(len(y) for _, y in pairs)
        value = value if isfinite(value) else inf
        if value < min((before for _, before in self.validations), default=inf):
            self._best = copy.deepcopy(self.encoder.state_dict())
        self.validations.append((step, value))
        _LOGGER.info("step %d of %d: validation %.4f", step, self.settings.num_steps, value)
        return value


class PopulationNetwork:
    """The architecture of the population as a function of stacked weights; norm layers use the batch's statistics."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = copy_of(model).requires_grad_(False).eval()
        self._norms = [self.model.get_submodule(layer) for layer in norm_layers(self.model)]
        self._places = named_places(self.model)
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self._loss_fn = loss_fn

    def _call(self, state: dict[str, Tensor], inputs: Any) -> Any:
        tensors = {place: state[name] for place, name in self._places.items() if name in state}
        given = Example.of(inputs)
        return functional_call(self.model, tensors, given.args, given.kwargs, tie_weights=False)

    def losses(self, states: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of each of a stack of networks ``(B, ...)`` on the same examples, ``(B,)``."""
        for norm in self._norms:
            norm.train()
        own = {name: x.detach().clone() if name in self._buffers else x for name, x in states.items()}
        loss = over_networks(
            lambda state: of_many(self._loss_fn)(self._call(state, inputs), targets),
            self.model,
            lambda state: checked(self._loss_fn)(run(self.model, inputs), targets),
            randomness="same",
            way_out="Use DeepAlign(connectivity=0), which does not run the networks.",
        )
        return loss(own)

    @torch.no_grad()
    def outputs(self, state: dict[str, Tensor], inputs: Any) -> Tensor:
        """Return the main output of one network."""
        return main_output(self._call(state, inputs))

    def check_targets(self, inputs: Any, targets: Tensor) -> None:
        """Raise a ValueError if a target is no class."""
        with torch.no_grad():
            check_targets(run(self.model, inputs), targets, self._loss_fn)


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
    # soft_matrices groups by size; restore the order of the groups.
    matrices = soft_matrices({str(k): x for k, x in enumerate(similarities)}, 1.0)
    return [matrices[str(k)] for k in range(len(similarities))]


def _pairs(population: int, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return numbers of two different networks, ``(count,)`` each."""
    first = torch.randint(population, (count,), generator=generator)
    return first, (first + torch.randint(1, population, (count,), generator=generator)) % population
