"""Weight matching: relabel b so that its weights lie closest to a's, without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.matching.assignment import match_groups
from modeconn.matching.method import Match
from modeconn.symmetry.permutation import Permutation
from modeconn.symmetry.spec import Group, PermutationSpec


@dataclass(frozen=True)
class WeightMatching:
    r"""Maximise :math:`\langle \theta_a, P \theta_b \rangle` by coordinate descent (Git Re-Basin, algorithm 1).

    Since relabelling keeps :math:`\|\theta_b\|`, this minimises the distance in weight space. One group (with the
    blocks inside it) is matched exactly while the others stay, in an order drawn anew each sweep, until a sweep changes
    nothing. The objective never falls. It is a local optimum: the joint problem is NP-hard.

    Args:
        max_sweeps: Stop after so many sweeps at the latest.
        seed: For the order of the groups.

    References:
        Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836
    """

    max_sweeps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got max_sweeps={self.max_sweeps}.")

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> Match:
        """Return the relabelling of b; ``loader`` is not needed."""
        weights = [_weights(spec, model) for model in (model_a, model_b)]
        trees = _trees(spec)
        permutation = spec.identity()
        history = [_objective(permutation, *weights)]
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.max_sweeps):
            start = history[-1]
            for number in torch.randperm(len(trees), generator=generator).tolist():
                candidate = _best_tree(spec, trees[number], permutation, *weights)
                objective = _objective(candidate, *weights)
                if objective > history[-1] * (1 + 1e-12) or objective - history[-1] > 1e-9 * abs(history[0]):
                    permutation = candidate
                    history.append(objective)
            if history[-1] == start:
                break
        return Match(permutation, history=tuple(history))


def _weights(spec: PermutationSpec, model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that move, each tensor once, in float64 on the CPU's or the model's device."""
    return {
        name: parameter.detach().double()
        for name, parameter in model.named_parameters()
        if any(spec.structure.moving_atoms(axis) for axis in spec.state.get(name, ()))
    }


def _objective(permutation: Permutation, a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    moved = permutation.relabel(b)
    return float(sum(torch.sum(a[name] * moved[name]) for name in a))


def _trees(spec: PermutationSpec) -> list[list[Group]]:
    """Return the groups that must be matched together: a group and all that vary with it."""
    trees: list[list[Group]] = []
    for group in sorted(spec.groups, key=lambda g: len(g.parents)):
        names = {name for name, _ in group.parents if name}
        home = [tree for tree in trees if names & {g.name for g in tree}]
        merged = [g for tree in home for g in tree] + [group]
        trees = [tree for tree in trees if tree not in home] + [merged]
    return trees


def _best_tree(
    spec: PermutationSpec, tree: list[Group], current: Permutation, a: dict[str, Tensor], b: dict[str, Tensor]
) -> Permutation:
    """Match one tree of groups exactly, the others as they are."""
    similarities: dict[str, Tensor] = {}
    for name, x, y in _unit_weights(spec, tree, current, a, b):
        product = x @ y.T
        similarities[name] = similarities[name] + product if name in similarities else product
    found = match_groups(spec, similarities)
    names = {group.name for group in tree}
    return Permutation(spec, {name: (found if name in names else current).perms[name] for name in current.perms})


def _unit_weights(
    spec: PermutationSpec, tree: list[Group], current: Permutation, a: dict[str, Tensor], b: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the weights of a tree's units in a and in b, ``(N, weights)``, all other axes of b already relabelled.

    A weight that holds the tree's units twice (from the hidden state to itself) is met once for each, the other one
    relabelled as it is now.
    """
    structure, perms = spec.structure, current.by_atom()
    names = {group.atom: group.name for group in tree}
    for name in a:
        axes = spec.state[name]
        if not any(structure.moving_atoms(axis) & names.keys() for axis in axes):
            continue
        for (x, labels), (y, _) in zip(structure.pieces(a[name], axes), structure.pieces(b[name], axes), strict=True):
            for dims in structure.unit_dims(labels, names):
                units = prod(x.shape[d] for d in dims)
                moved = structure.move_piece(y, labels, perms, stay=dims)
                yield (
                    names[labels[dims[-1]][0]],
                    x.movedim(dims, list(range(len(dims)))).reshape(units, -1),
                    moved.movedim(dims, list(range(len(dims)))).reshape(units, -1),
                )
