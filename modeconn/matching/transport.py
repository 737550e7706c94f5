"""Optimal transport between the units of two networks, hard or soft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeconn.matching.activation_matching import break_ties, constant_units
from modeconn.matching.assignment import match_tree
from modeconn.matching.method import Match, check_data, check_permutes, correlations
from modeconn.matching.sinkhorn_operator import sinkhorn
from modeconn.matching.soft import SoftPermutation, hard_matrices, shape_of
from modeconn.matching.statistics import Moments, collect
from modeconn.network.weights import WeightSpace
from modeconn.symmetry.groups import Group
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.checks import check_at_least, check_integers
from modeconn.tools.door import check_settings
from modeconn.tools.shown import Shown

_TINY = 1e-30


@dataclass(frozen=True)
class TransportMatching(Shown):
    r"""Carry the units of b to those of a at the lowest cost (OT-Fusion; Singh and Jaggi, 2020).

    Every unit weighs the same, so the plan of a group is doubly stochastic, and the exact plan is an assignment; with
    a regularisation it is that of Sinkhorn, which spreads over units of like cost,
    :math:`\operatorname{argmin}_P \langle P, C \rangle - \lambda H(P)`. `transport` returns the plan, whose
    `SoftPermutation.apply` is the barycentric projection that OT-Fusion averages with a; `match` rounds it.

    Args:
        cost: "activations": mean squared difference of two units over training data. "weights": squared distance of
            their weights, layer by layer: groups are taken in their order in the spec, each on all the weights that it
            shares with no group behind it, b's already carried in the groups before. These are the weights that reach
            a unit and, in a last hidden layer, those that it gives to the outputs. Without data.
        regularization: :math:`\lambda`, in units of the mean cost of a group; 0 for the exact plan.
        num_examples: How many training examples to use for activations; None for the whole loader.

    References:
        Singh and Jaggi, 2020, https://arxiv.org/abs/1910.05653

    Raises:
        ValueError: If a setting is out of range.
    """

    cost: Literal["activations", "weights"] = "activations"
    regularization: float = 0.0
    num_examples: int | None = 10_000

    def __post_init__(self) -> None:
        check_settings(self)
        check_integers(self, "num_examples")
        if self.cost not in ("activations", "weights"):
            raise ValueError(f"cost must be 'activations' or 'weights', got cost={self.cost!r}.")
        check_at_least(self, 0, "regularization")
        if self.num_examples is not None and self.num_examples < 2:
            raise ValueError(f"num_examples must be at least 2, or None, got num_examples={self.num_examples}.")

    @property
    def needs_data(self) -> str | None:
        """The message shown where no loader is given; None if the cost reads no data."""
        if self.cost == "weights":
            return None
        return (
            "TransportMatching(cost='activations') compares activations, so it needs data: pass loader=, or use "
            "TransportMatching(cost='weights')."
        )

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> Match:
        """Return the plan rounded to a relabelling of b; ``loader`` yields training data, for activations.

        Raises:
            ValueError: If data is missing, weights or activations are not finite, or groups of the spec rotate units.
        """
        check_permutes(spec, self)
        if self.cost == "weights":
            return Match(self._by_weights(spec, model_a, model_b).round())
        moments = self._moments(spec, model_a, model_b, loader)
        permutation = self._by_activations(spec, moments).round()
        return Match(permutation, correlations(moments, permutation), constant_units(moments))

    def transport(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> SoftPermutation:
        """Return the plan of every group; ``loader`` yields training data, for activations.

        Raises:
            ValueError: If data is missing, weights or activations are not finite, or groups of the spec rotate units.
        """
        check_permutes(spec, self)
        if self.cost == "weights":
            return self._by_weights(spec, model_a, model_b)
        return self._by_activations(spec, self._moments(spec, model_a, model_b, loader))

    def _moments(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None
    ) -> dict[str, Moments]:
        check_data(self, loader)
        return collect(spec, model_a, model_b, loader, num_examples_at_most=self.num_examples, before_activation=False)

    def _by_activations(self, spec: PermutationSpec, moments: Mapping[str, Moments]) -> SoftPermutation:
        return SoftPermutation(spec, self._plan(spec.groups, {n: _activation_cost(m) for n, m in moments.items()}))

    def _by_weights(self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module) -> SoftPermutation:
        spec.check_model(model_a)
        space = WeightSpace(model_a)
        a, b = (
            space.unflatten(space.flatten(m, name=n).to(space.wide_dtype)) for m, n in ((model_a, "a"), (model_b, "b"))
        )
        plan = SoftPermutation.of(spec.identity())
        carried: set[int] = set()
        for tree in sorted(spec.trees(), key=lambda tree: min(map(spec.groups.index, tree))):
            costs: dict[str, Tensor] = {}
            for name, x, y in _units(spec, tree, carried, a, plan.relabel(b)):
                costs[name] = costs.get(name, 0) + torch.cdist(x, y).square()
            plan = SoftPermutation(spec, {**plan.matrices, **self._plan(tree, costs)})
            carried |= {group.atom for group in tree}
        return plan

    def _plan(self, groups: Sequence[Group], costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.regularization == 0:
            perms = match_tree(groups, {name: -cost for name, cost in costs.items()})
            return {group.name: hard_matrices(group, perms[group.name]) for group in groups}
        units = {name: (self.regularization * cost.mean()).clamp(min=_TINY) for name, cost in costs.items()}
        return match_softly(groups, {name: -cost / units[name] for name, cost in costs.items()})


def match_softly(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the doubly stochastic matrices of largest total score and entropy.

    What `match_groups` is to an assignment, this is to `sinkhorn`: blocks that can be exchanged have for every pair the
    plan inside it, whose score and entropy are the score of those two blocks in the outer plan. Scores over a
    temperature that goes to 0 give the hard matching.

    Args:
        groups: Some of the groups of a spec, among them every parent of each.
        scores: By group name, ``(N, N)``, units numbered row-major; a group left out has no evidence of its own. If it
            has none of blocks inside it either, its units stay.

    Returns:
        The matrices of a `SoftPermutation`, by name.
    """
    total, sizes = dict(scores), {group.name: prod(group.shape) for group in groups}
    matrices: dict[str, Tensor] = {}
    for group in sorted(groups, key=lambda g: len(g.parents), reverse=True):
        n, count = group.size, prod(group.shape[:-1])
        if group.name not in total:
            matrices[group.name] = hard_matrices(group, torch.arange(n).expand(group.shape))
            continue
        blocks = total[group.name].view(count, n, count, n).transpose(1, 2)
        plan = sinkhorn(blocks)
        matrices[group.name] = plan.reshape(shape_of(group))
        parent = next((name for name, _ in reversed(group.parents) if name), None)
        if parent is not None and sizes[parent] == count:  # the parent itself varies with all the other parents
            total[parent] = total.get(parent, 0) + (plan * blocks + torch.special.entr(plan)).sum((-2, -1))
    return matrices


def _activation_cost(moments: Moments) -> Tensor:
    """Return the mean squared difference of each unit of a and each of b, ``(N, N)``."""
    power_a, power_b = (v + m**2 for v, m in zip(moments.variances(), moments.means(), strict=True))
    cost = power_a[:, None] + power_b[None, :] - 2 * moments.inner_product()
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("activations are NaN or infinite on this data; check the endpoints' weights and inputs.")
    return -break_ties(-cost.clamp(min=0), moments)


def _units(
    spec: PermutationSpec, tree: Sequence[Group], carried: set[int], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the weights of a tree's units in a and in b, ``(N, weights)``, where all other units are carried."""
    structure, names = spec.structure, {group.atom: group.name for group in tree}
    for name in [name for name in a if name in spec.state]:
        pieces = (structure.pieces(weight, spec.state[name]) for weight in (a[name], b[name]))
        for (x, labels), (y, _) in zip(*pieces, strict=True):
            for dims in structure.unit_dims(labels, names):
                others = {atom for dim, (atom, _) in enumerate(labels) if dim not in dims}
                if others & structure.parents.keys() <= carried:
                    yield names[labels[dims[-1]][0]], _rows(x, dims), _rows(y, dims)


def _rows(weight: Tensor, dims: Sequence[int]) -> Tensor:
    return weight.movedim(list(dims), list(range(len(dims)))).reshape(prod(weight.shape[d] for d in dims), -1)
