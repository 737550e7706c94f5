"""One network in the place of several: a point between two, the mean of many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.curves.path import Path
from modeconn.matching.alignment import Symmetry, find_spec
from modeconn.matching.method import Method, check_data, check_method
from modeconn.matching.weight_matching import WeightMatching
from modeconn.network.batch_norm import NUM_EXAMPLES, calibration_batches, norm_layers, recalibrate
from modeconn.network.copies import copy_of
from modeconn.network.estimates import differing, take_mean, warn_of
from modeconn.network.loss import Forward
from modeconn.network.repair import repair as repair_model
from modeconn.network.weights import WeightSpace, named_buffers
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import checked, looked_at
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown


@checked
def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    t: float = 0.5,
    *,
    recalibrate: Iterable[Any] | None = None,
    recalibration_examples: int | None = NUM_EXAMPLES,
    repair: bool = False,
    forward: Forward | None = None,
) -> nn.Module:
    """Return the network at ``t`` of the straight line between two, in eval mode; at its ends a and b, bit for bit.

    Args:
        model_a: At t=0.
        model_b: At t=1, already aligned with a.
        t: Position in [0, 1].
        recalibrate: Training data, which batch norm and ``repair`` need between the ends.
        recalibration_examples: How many examples of it to use, None for all.
        repair: Without batch norm, also interpolate the statistics of pre-activations, see `modeconn.repair`.
        forward: Runs the network on a batch of that data, ``forward(model, batch)``; default: the batch's inputs go to
            the model.

    Raises:
        ValueError: If t is outside [0, 1], the networks differ in architecture or hold NaN, or data is missing.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> torch.equal(interpolate(a, b, 1.0).weight, b.weight)
        True
    """
    return Path.straight_between(model_a, model_b).model_at(t, recalibrate, recalibration_examples, repair, forward)


@dataclass(frozen=True)
class Merge(Shown):
    """The mean of several networks, once their units are under the same names.

    Args:
        model: The mean, in eval mode.
        permutations: One for each network: ``permutations[i].apply(models[i])`` are what the mean is of. The first is
            the identity, so the mean has the first network's names.
        history: The sum of squared distances of the relabelled networks from their mean, as they came and after each
            step that was taken; it falls but for the step to the ``start``, which is taken in any case.
    """

    model: nn.Module
    permutations: tuple[Relabelling, ...]
    history: tuple[float, ...]

    @looked_at
    def pairwise(self, i: int, j: int) -> Relabelling:
        r"""Return the relabelling of network j after network i, :math:`P_{ij} = P_i^{-1} P_j`.

        These compose exactly, :math:`P_{ij} P_{jk} P_{ki} = 1`, unlike relabellings that are found pair by pair.
        """
        for name, number in (("i", i), ("j", j)):
            if not 0 <= number < len(self.permutations):
                raise ValueError(f"{name} must lie in 0..{len(self.permutations) - 1}, got {name}={number}.")
        return self.permutations[i].inverse() @ self.permutations[j]

    def _facts(self) -> dict[str, str]:
        return {
            "networks": str(len(self.permutations)),
            "squared distance from their mean, as they came": f"{self.history[0]:.4g}",
            "at the end": f"{self.history[-1]:.4g}",
            "steps": str(len(self.history) - 1),
        }

    def __repr__(self) -> str:
        first, last = self.history[0], self.history[-1]
        return (
            f"Merge({len(self.permutations)} networks, squared distance from their mean {first:.4g} -> {last:.4g} "
            f"in {len(self.history) - 1} steps)"
        )


@checked
def merge_many(
    models: Sequence[nn.Module],
    loader: Iterable[Any] | None = None,
    *,
    method: Method | None = None,
    start: Method | None = None,
    num_rounds: int = 100,
    repair: bool = False,
    forward: Forward | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    verify: bool = True,
    symmetries: str = "permutation",
    untie: bool = False,
    seed: int = 0,
) -> Merge:
    r"""Relabel networks into one set of names and return their mean (MergeMany, Git Re-Basin, algorithm 3).

    In each round every network, in random order, is aligned with the mean of the others, until a round changes nothing.
    A step is taken only if it brings the networks closer, so :math:`\sum_i \|P_i \theta_i - \bar\theta\|^2` falls with
    any method and the rounds end. It is a local optimum, and a ``start`` finds a better one: the mean of networks under
    different names says little.

    Args:
        models: Two or more networks of one architecture; they are not changed.
        loader: Training data for batch norm, for ``repair`` and for methods that need it.
        method: How to align a network with the mean of the others. Default: `WeightMatching`. A method that compares
            activations sees a mean whose batch norm was recalibrated.
        start: A method that first aligns every network with the first one, without any mean.
        num_rounds: Stop after so many rounds at the latest; 0 keeps the ``start``.
        repair: Without batch norm, repair the mean, see `modeconn.repair`; with it, it is recalibrated in any case.
        forward: Runs a network on a batch, ``forward(model, batch)``, for batch norm and repair; default: the batch's
            inputs go to the model.
        spec: What `discover` found for this architecture. Default: it is discovered here.
        example_input: For discovery, where there is neither a loader nor ``models[0].example_input()``.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        verify: Prove a newly discovered spec before it is used, see `PermutationSpec.verify`.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`. Where groups rotate, gains are folded first.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        seed: For the order of the networks and of a loader that shuffles; the caller's random state stays.

    Raises:
        ValueError: If there are fewer than two networks, they differ in architecture or hold NaN, or data is missing.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836; Crisostomi et al., 2024,
        https://arxiv.org/abs/2405.17897, on relabellings that compose.

    Example:
        >>> from modeconn import models
        >>> merged = merge_many([models.mlp(8, (6,), 3, seed=s) for s in range(3)])
        >>> merged.pairwise(0, 1) @ merged.pairwise(1, 2) @ merged.pairwise(2, 0)
        Permutation(1 group, 0 of 6 units moved)
    """
    models = list(models)
    space = _check_models(models, loader, repair=repair)
    if num_rounds < 0:
        raise ValueError(f"num_rounds must be at least 0, got num_rounds={num_rounds}.")
    method = WeightMatching() if method is None else method
    for name, one in (("start", start), ("method", method)):
        if one is not None:
            check_method(one, name=name)
            check_data(one, loader)
    with seeded(seed, space.device):
        found = find_spec(models[0], loader, Symmetry(spec, example_input, outputs, verify, symmetries, untie))
        if found.prepares:
            models = [found.prepared(model) for model in models]
            space = WeightSpace(models[0])
        names = _CommonNames(space, found, models)
        history = [names.spread()]
        if start is not None:
            names.follow_the_first(start, loader)
            history.append(names.spread())
        history += names.follow_the_others(method, loader, num_rounds, seed, forward)
    back = names.permutations[0].inverse()
    permutations = tuple(back @ permutation for permutation in names.permutations)
    merged = back.apply(names.mean())
    relabelled = [permutation.apply(model) for permutation, model in zip(permutations, models, strict=True)]
    buffers = [named_buffers(network) for network in relabelled]
    warn_of(differing(merged, buffers), buffers[0])
    if loader is not None and (repair or norm_layers(merged)):
        merged = repair_model(merged, relabelled, loader, forward=forward)
    return Merge(merged, permutations, tuple(history))


class _CommonNames:
    """Networks on their way to common names.

    Attributes:
        models: The networks as they are relabelled now.
        permutations: By which they are.
    """

    def __init__(self, space: WeightSpace, spec: PermutationSpec, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.permutations: list[Relabelling] = [spec.identity() for _ in models]
        self._space = space
        self._spec = spec
        self._thetas = torch.stack([space.flatten(model) for model in models]).double()

    def spread(self) -> float:
        """Return the sum of squared distances from the mean."""
        return _spread(self._thetas)

    def mean(self) -> nn.Module:
        """Return the mean of all weights, with buffers as `modeconn.network.estimates` has them."""
        model = copy_of(self.models[0]).eval()
        self._space.load(self._thetas.mean(0), model)
        take_mean(model, self.models)
        return model

    def follow_the_first(self, method: Method, loader: Iterable[Any] | None) -> None:
        """Align every network with the first one."""
        for i, model in enumerate(self.models[1:], 1):
            step = method.match(self._spec, self.models[0], model, loader).permutation
            self._move(i, step, moved := step.apply(model), self._space.flatten(moved).double())

    def follow_the_others(
        self, method: Method, loader: Iterable[Any] | None, num_rounds: int, seed: int, forward: Forward | None
    ) -> Iterator[float]:
        """Align every network with the mean of the others, round after round; yield the spread after each step.

        That mean has the buffers of the first of the others as it is relabelled now.
        """
        generator = torch.Generator().manual_seed(seed)
        others = copy_of(self.models[0]).eval()
        calibration = []
        if loader is not None and norm_layers(others):
            calibration = calibration_batches(loader, self._space.device)
        for _ in range(num_rounds):
            start = self.spread()
            for i in torch.randperm(len(self.models), generator=generator).tolist():
                rest = torch.cat([self._thetas[:i], self._thetas[i + 1 :]])
                self._space.load(rest.mean(0), others)
                take_mean(others, [*self.models[:i], *self.models[i + 1 :]])
                recalibrate(others, calibration, forward=forward)
                step = method.match(self._spec, others, self.models[i], loader).permutation
                moved = step.apply(self.models[i])
                theta = self._space.flatten(moved).double()
                if _spread(torch.cat([rest, theta[None]])) < (1 - 1e-12) * self.spread():
                    self._move(i, step, moved, theta)
                    yield self.spread()
            if self.spread() == start:
                break

    def _move(self, i: int, step: Relabelling, moved: nn.Module, theta: Tensor) -> None:
        self.models[i], self._thetas[i] = moved, theta
        self.permutations[i] = step @ self.permutations[i]


def _spread(thetas: Tensor) -> float:
    return float((thetas - thetas.mean(0)).square().sum())


def _check_models(models: Sequence[nn.Module], loader: Iterable[Any] | None, *, repair: bool) -> WeightSpace:
    if len(models) < 2:
        raise ValueError(f"there is nothing to merge in fewer than two networks, got {len(models)}.")
    space = WeightSpace(models[0])
    for i, model in enumerate(models):
        space.check(model, name=f"models[{i}]", reference="models[0]")
    if loader is None and (repair or norm_layers(models[0])):
        what = "repair" if repair else "batch norm"
        raise ValueError(f"the mean of networks needs statistics of training data for {what}: pass loader=.")
    return space
