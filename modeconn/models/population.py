"""Train many small networks of one architecture at once: their weights stacked, every step one vectorised step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from modeconn.learning.checkpoint import TRAINING, Checkpoint, Resumable, RunFile, State, run_file
from modeconn.learning.parts import Epochs, Learned, pack_rng, unpack_rng
from modeconn.models.training import Weighted, count_batches, run_epochs, run_settings
from modeconn.network.batches import check_loader, described, inputs_and_targets, is_dense, num_bytes, num_examples, run
from modeconn.network.copies import copy_of
from modeconn.network.loss import LossFn, check_targets, cross_entropy, of_many
from modeconn.network.loss import checked as checked_loss
from modeconn.network.recipe import Recipe, autocast
from modeconn.network.shares import check_whole, facts_of
from modeconn.network.vectorised import over_networks
from modeconn.network.weights import WeightSpace, named_places
from modeconn.tools import provenance
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import identify
from modeconn.tools.processes import joined, shared
from modeconn.tools.rng import reseed, rng_state, seed_of, seeded, set_rng_state

M = TypeVar("M", bound=nn.Module)

_DEFAULT_RECIPE = Recipe()
_READ_AHEAD_BYTES = 1 << 27

_Batch = tuple[Tensor, Tensor]


@shared
@checked
def train_population(
    models: Iterable[M],
    loader: Iterable[Any],
    *,
    recipe: Recipe = _DEFAULT_RECIPE,
    loss_fn: LossFn = cross_entropy,
    seeds: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = False,
) -> list[M]:
    """Train copies of many networks of one architecture in one vectorised run, and return them in eval mode.

    Network ``i`` ends, up to rounding, as ``train(models[i], loader, recipe=recipe, seed=seeds[i])`` would end: each
    has its own order of the data, its own augmentation and its own batch-norm statistics. Dropout alone differs: it is
    drawn for each network, but not as it would be drawn for one. Worthwhile for small networks, whose single steps
    spend their time on overhead. Weights, gradients and the optimizer's state of all networks are in memory together.

    Recurrent cells (``nn.RNN``, ``nn.GRU``, ``nn.LSTM``) cannot be vectorised, and networks that have them are refused;
    train those one after another with `modeconn.models.train`.

    Where several processes are an initialised group of `torch.distributed`, all must make this call, with the same
    data, and share the networks; all get all of them.

    Args:
        models: Networks of one architecture, on one device; they are not changed.
        loader: Re-iterable of ``(inputs, targets)`` batches, read once an epoch for every network.
        recipe: Optimizer, schedule, epochs and weight decay of every network; the optimizer must act on every weight by
            itself, as SGD and Adam do.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the examples of the batch, of operations that
            `torch.func.vmap` knows; so must the networks be, which excludes recurrent cells, and batch norm with
            ``momentum=None``.
        seeds: Of batch order and augmentation, one for each network. Default: 0, 1, 2, ...
        checkpoint: A file to which the run saves itself after every epoch. If it exists, the run goes on from it and
            ends with the same bits as one that was never interrupted, on the same machine and versions.
        progress: Whether to show a progress bar.

    Returns:
        The trained copies, ordinary modules, in the order of ``models``.

    Raises:
        ValueError: If the networks differ in architecture, the seeds are not as many, the optimizer mixes weights or
            needs a closure, a layer is none that vmap knows, or the data is not as `modeconn.models.train` needs it.
        FloatingPointError: If a loss became infinite or NaN; noticed at the end of the epoch.

    Example:
        >>> from modeconn import data, models
        >>> train_loader, test_loader = data.load("digits")
        >>> untrained = [models.mlp(64, (32,), 10, seed=seed) for seed in range(3)]
        >>> len(models.train_population(untrained, train_loader, recipe=Recipe(epochs=1)))
        3
    """
    trained = [copy_of(model).train() for model in models]
    seeds = range(len(trained)) if seeds is None else seeds
    _check_networks(trained)
    if len(seeds) != len(trained):
        raise ValueError(f"seeds must hold one for each of the {len(trained)} networks, got {len(seeds)}.")
    device = next(trained[0].parameters()).device
    _check_recipe(recipe, device)
    them = joined()
    if them.size > len(trained):
        raise ValueError(
            f"there are {them.size} processes for {len(trained)} networks. Start at most one for each network."
        )
    check_whole(loader)
    settings = partial(run_settings, recipe, {"loss": loss_fn, "seeds": list(seeds)}, trained)
    with seeded(seeds[0], device):
        num_batches = count_batches(loader, any_batch=False)
        if them.size > 1:
            them.agree({**settings(), **facts_of(loader), **dict(provenance.versions())})
    with run_file(checkpoint, settings, device, TRAINING, loader) as file, seeded(seeds[0], device):
        mine = them.mine(range(len(trained)))
        reading = _Reading(loader, [seeds[number] for number in mine], device, numbers=mine)
        run = _PopulationRun([trained[number] for number in mine], recipe, loss_fn)
        if not them.is_first:
            reseed(seed_of(seeds[0], them.rank), device)  # for dropout
        run.run(reading, num_batches, file, progress=progress)
    _exchange(trained)
    return [model.eval() for model in trained]


def _exchange(models: Sequence[nn.Module]) -> None:
    """Give every process the networks that the others trained."""
    them = joined()
    if them.size > 1:
        states = them.each(lambda: [copy_of(model).cpu().state_dict() for model in them.mine(models)])
        for model, state in zip(models, them.in_order(states), strict=True):
            model.load_state_dict(state)


class _Order:
    """The batches of one network, drawn as if it were trained alone: its random state is kept between reads."""

    def __init__(self, loader: Iterable[Any], seed: int, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        with seeded(seed, device):
            self.state = rng_state(device)

    def begin_epoch(self) -> None:
        """Start from the loader's beginning at the next read."""
        self._batches = chain.from_iterable((self._loader,))  # asks the loader for an iterator at the first read only

    def take(self, count: int) -> list[_Batch]:
        """Return the next batches of the epoch: so many, or those that are left."""
        with self._own_randomness():
            return list(islice(self._batches, count))

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        outside = rng_state(self._device)
        set_rng_state(self.state, self._device)
        try:
            yield
        finally:
            self.state = rng_state(self._device)
            set_rng_state(outside, self._device)


class _Reading:
    """An epoch of all networks, step by step: inputs ``(M, N, ...)`` and targets ``(M, N, ...)``, on ``device``.

    As many batches as memory allows are read of one network's order before the next one's, since changing the random
    state takes longer than to draw from it.

    Args:
        loader: Batches.
        seeds: One for each network.
        device: Where batches go.
        numbers: Which networks of the population these are.
    """

    def __init__(
        self, loader: Iterable[Any], seeds: Sequence[int], device: torch.device, *, numbers: Sequence[int]
    ) -> None:
        self._numbers = numbers
        self._orders = [_Order(loader, seed, device) for seed in seeds]
        self._device = device
        first = _pair_of_tensors(check_loader(loader))
        self._at_once = max(1, _READ_AHEAD_BYTES // (num_bytes(first) * len(seeds)))

    def state(self) -> State:
        """Return the random state of every order, as a part of a run."""
        tensors: dict[str, Tensor] = {}
        about = {}
        for number, order in zip(self._numbers, self._orders, strict=True):
            own, about[f"order {number}"] = pack_rng(order.state, f"order {number}.")
            tensors |= own
        return tensors, about

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for number, order in zip(self._numbers, self._orders, strict=True):
            order.state = unpack_rng(tensors, about[f"order {number}"], f"order {number}.")

    def __iter__(self) -> Iterator[_Batch]:
        for order in self._orders:
            order.begin_epoch()
        while True:
            taken = [order.take(self._at_once) for order in self._orders]
            if len({len(own) for own in taken}) != 1:
                raise ValueError("the passes of loader are of different lengths: each network needs as many batches.")
            steps = list(zip(*taken, strict=True))
            for step in steps:
                pairs = [_pair_of_tensors(batch) for batch in step]
                inputs, targets = (torch.stack(parts).to(self._device) for parts in zip(*pairs, strict=True))
                yield inputs, targets
            if len(steps) < self._at_once:
                return


def _pair_of_tensors(batch: Any) -> _Batch:
    inputs, targets = inputs_and_targets(batch)
    if not (is_dense(inputs) and is_dense(targets)):
        raise ValueError(f"loader must yield pairs of dense tensors, which can be stacked, got {described(batch)}.")
    num_examples(batch)  # an empty batch is refused
    return inputs, targets


class _PopulationRun:
    """One run over stacked weights, which are written into ``models`` at its end."""

    def __init__(self, models: Sequence[nn.Module], recipe: Recipe, loss_fn: LossFn) -> None:
        self.models = models
        self.recipe = recipe
        self.loss_fn = loss_fn
        parameters, buffers = stack_module_state(models)
        self.state = {**parameters, **buffers}
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self.optimizer = recipe.make_optimizer(trained, weight_decay=recipe.weight_decay)
        self.device = trained[0].device

        network, places = copy_of(models[0]), named_places(models[0])

        def loss(state: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            tensors = {place: state[name] for place, name in places.items()}
            return of_many(loss_fn)(functional_call(network, tensors, (inputs,), tie_weights=False), targets)

        self.losses = over_networks(
            loss,
            network,
            lambda state, inputs, targets: checked_loss(loss_fn)(run(network, inputs[0]), targets[0]),
            randomness="different",
            way_out="Train such networks one by one.",
            compile=recipe.compile,
        )

    def run(self, steps: _Reading, num_batches: int, file: RunFile, *, progress: bool) -> None:
        parts, epochs = (Learned(self.state, self.optimizer), steps), Epochs(self.recipe.epochs)
        epochs.begin_run()
        run_epochs(
            self.recipe,
            self.optimizer,
            lambda epoch: steps,
            self._step,
            num_batches=num_batches,
            file=file,
            parts=tuple(part if joined().size == 1 else _Dealt(part, len(self.models)) for part in parts),
            epochs=epochs,
            device=self.device,
            progress=progress,
        )
        self._write_back()

    @torch.no_grad()
    def _check_targets(self, inputs: Tensor, targets: Tensor) -> None:
        outputs = run(self.models[0], inputs[0])
        for own in targets:
            check_targets(outputs, own, self.loss_fn)

    def _step(self, batch: _Batch, epoch: int) -> list[Weighted]:
        """Make one step of every network and return the losses before it, ``(M,)``, all of which count alike."""
        if epoch == 0:
            self._check_targets(*batch)
        self.optimizer.zero_grad()
        with autocast(self.device, self.recipe.autocast):
            losses = self.losses(self.state, *batch)
        # No weight belongs to two networks, so the gradient of the sum is that of each network.
        losses.sum().backward()
        self.optimizer.step()
        return [(losses.detach(), 1.0)]

    @torch.no_grad()
    def _write_back(self) -> None:
        for number, model in enumerate(self.models):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(self.state[name][number])


class _Dealt:
    """A part of a run of which each process has that of its own networks; what is saved is that of all.

    So a run goes on with any number of processes.

    Args:
        part: This process's.
        count: How many networks it has.
    """

    def __init__(self, part: Resumable, count: int) -> None:
        self._part, self._them = part, joined()
        self._counts = self._them.each(lambda: count)

    def state(self) -> State:
        """Return the state of the networks of all processes."""

        def own() -> State:
            tensors, about = self._part.state()
            return {name: tensor.detach().cpu() for name, tensor in tensors.items()}, about

        parts = self._them.each(own)
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for part_tensors, part_about in parts:
            tensors |= part_tensors
            about |= part_about
        for name, tensor in parts[0][0].items():
            if _is_stacked(name, tensor, self._counts[0]):
                rows = self._them.in_order([list(part[name]) for part, _ in parts])
                tensors[name] = torch.stack(rows)
        return tensors, about

    def load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `state` returned to the networks of this process."""
        mine = {
            name: self._them.mine(tensor) if _is_stacked(name, tensor, sum(self._counts)) else tensor
            for name, tensor in tensors.items()
        }
        self._part.load_state(mine, about)


def _is_stacked(name: str, tensor: Tensor, count: int) -> bool:
    """Whether a tensor of a run has a row for each of its networks."""
    return name.startswith(("model.", "optimizer.")) and tensor.ndim > 0 and len(tensor) == count


def _check_networks(models: Sequence[nn.Module]) -> None:
    if not models:
        raise ValueError("models is empty: there is no network to train.")
    first = _describe_network(models[0])
    for number, model in enumerate(models):
        other = _describe_network(model)
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            raise ValueError(
                f"models[{number}] differs from models[0] in {differ[0]}: {other.get(differ[0], 'missing')} against "
                f"{first.get(differ[0], 'missing')}. All must be of one architecture."
            )
    if not any(parameter.requires_grad for parameter in models[0].parameters()):
        raise ValueError("models[0] has no parameter to train: all have requires_grad=False.")


def _describe_network(model: nn.Module) -> dict[str, str]:
    """Return what networks that share one stack must have in common."""
    space = WeightSpace(model)
    buffers = {f"buffer {name!r}": f"{tuple(b.shape)}, {b.dtype}" for name, b in model.named_buffers()}
    parameters = {f"parameter {name!r}": layout for name, layout in space.layout.items()}
    return {**parameters, **buffers, "device": str(space.device), "its modules": repr(model)}


def _check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Raise unless the recipe moves stacked weights as it would move each network's."""
    recipe.check_not_offloaded()
    if recipe.autocast is torch.float16:
        raise ValueError("float16 needs one loss scale for each network; use Recipe(autocast=torch.bfloat16) or None.")
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 3)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    slopes = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    slopes = [slope * torch.tensor([1.0, 100.0], device=device).view(-1, *[1] * (slope.dim() - 1)) for slope in slopes]
    together = _two_steps(recipe, start, slopes)
    for network in (0, 1):
        alone = _two_steps(recipe, [x[network] for x in start], [x[network] for x in slopes])
        for ours, theirs in zip(together, alone, strict=True):
            if not torch.allclose(ours[network], theirs, rtol=1e-9, atol=1e-12):
                raise ValueError(
                    f"the recipe's optimizer ({identify(recipe.optimizer)}) does not act on every weight by itself, so "
                    f"networks would mix. Use one that does, such as Adam or SGD, or train them one by one."
                )


def _two_steps(recipe: Recipe, start: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
    """Return where two steps down constant slopes lead."""
    weights = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = recipe.make_optimizer(weights, weight_decay=recipe.weight_decay)
    for _ in range(2):
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope.clone()
        try:
            optimizer.step()
        except TypeError as error:
            raise ValueError(
                f"the recipe's optimizer ({identify(recipe.optimizer)}) makes no step along gradients alone ({error}). "
                f"Use one that does, such as Adam or SGD, or train the networks one by one."
            ) from error
    return [weight.detach() for weight in weights]
