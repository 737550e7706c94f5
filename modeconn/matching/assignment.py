"""Linear assignment: which unit of b takes which place of a; and rotations, where a group rotates its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from modeconn.matching.procrustes import best_rotations, best_values
from modeconn.symmetry.spec import Group, Orthogonal, Permutation, PermutationSpec


def match_units(similarity: Tensor) -> Tensor:
    r"""Pair each unit of network a with a unit of network b so that total similarity is largest.

    .. math:: \pi^\star = \operatorname{argmax}_{\pi \in S_n} \sum_{i=1}^{n} C_{i, \pi(i)}

    With cross-correlations of activations as ``C`` this is the layer-wise step of neuron alignment (Tatro et al.,
    2020); with inner products of weights, that of weight matching (Ainsworth et al., 2023). Exact; O(n^3), on the CPU.

    Args:
        similarity: ``C``, shape ``(n, n)``, rows for units of a, columns for units of b; finite, any scale.

    Returns:
        ``perm``, int64, shape ``(n,)``, on the device of ``similarity``: unit ``perm[i]`` of b takes place i.

    Raises:
        ValueError: If ``similarity`` is not square or not finite (a unit that never fires has no correlation).

    References:
        Tatro et al., 2020, https://arxiv.org/abs/2009.02439; Ainsworth et al., 2023, https://arxiv.org/abs/2209.04836

    Example:
        >>> match_units(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        tensor([1, 0])
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square, got shape {tuple(similarity.shape)}.")
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("similarity must be finite; it holds NaN or infinite entries.")
    return torch.from_numpy(_assign(_copy(similarity.detach()).numpy())).to(similarity.device)


def _assign(similarity: np.ndarray) -> np.ndarray:
    """Return the column of each row; the matrix is used up, since a second one would be as large as a layer.

    Distances to the largest entries, not entries, save a third of scipy's search.
    """
    from scipy.optimize import linear_sum_assignment

    cost = np.subtract(similarity.max(1, keepdims=True), similarity, out=similarity)
    cost -= cost.min(0)
    return linear_sum_assignment(cost)[1]


def _copy(similarity: Tensor) -> Tensor:
    return similarity.to("cpu", torch.float64, copy=True)


def match_groups(spec: PermutationSpec, similarities: Mapping[str, Tensor]) -> Permutation | Orthogonal:
    """Choose the relabelling of largest total similarity.

    Groups without parents are matched by one assignment. Where the units of a group lie in blocks that can be exchanged
    (the parent: heads, convolution groups), the assignment inside is solved for every pair of blocks, and its value is
    the similarity of those two blocks in the outer one: exact for any depth of nesting. A group that rotates its units
    is matched by an orthogonal Procrustes problem in place of an assignment.

    Args:
        spec: The groups.
        similarities: By group name, ``(N, N)`` with ``N`` the product of the group's shape, units numbered row-major;
            rows for a, columns for b. A group left out has no evidence of its own.

    Returns:
        The relabelling, on the CPU.

    Raises:
        ValueError: If a similarity is not finite.
    """
    return spec.relabelling(match_tree(spec.groups, {name: _copy(s) for name, s in similarities.items()}))


def match_tree(groups: Sequence[Group], similarities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the relabelling of largest total similarity of groups that vary together; return elements by group name.

    Similarities in double precision on the CPU may be overwritten.
    """
    by_name = {group.name: group for group in groups}
    total = {name: _evidence(group, similarities.get(name)) for name, group in by_name.items()}
    deepest_first = sorted(groups, key=lambda g: len(_free_parents(g)), reverse=True)
    for group in deepest_first:
        parent = _chain_parent(group, by_name)
        if parent is not None:
            total[parent.name] = total[parent.name] + _block_values(group, total[group.name])
    perms: dict[str, Tensor] = {}
    for group in reversed(deepest_first):
        perms[group.name] = _read_off(group, by_name, total[group.name], perms)
    return perms


def _evidence(group: Group, similarity: Tensor | None) -> np.ndarray:
    if similarity is None:
        return np.zeros((prod(group.shape),) * 2)
    if not torch.isfinite(similarity.sum()):
        raise ValueError(f"similarity of group '{group.name}' must be finite; it holds NaN or infinite entries.")
    return similarity.double().cpu().numpy()


def _free_parents(group: Group) -> list[str]:
    return [name for name, _ in group.parents if name]


def _chain_parent(group: Group, groups: Mapping[str, Group]) -> Group | None:
    """Return the nearest free parent if it varies with all the other parents; their evidence then adds up."""
    free = _free_parents(group)
    if not free:
        return None
    nearest = groups[free[-1]]
    return nearest if (*nearest.parents, (nearest.name, nearest.size)) == group.parents else None


def _blocks(group: Group, similarity: np.ndarray) -> np.ndarray:
    """Return ``(blocks of a, blocks of b, n, n)``, a view."""
    n, count = group.size, len(similarity) // group.size
    return similarity.reshape(count, n, count, n).transpose(0, 2, 1, 3)


def _block_values(group: Group, similarity: np.ndarray) -> np.ndarray:
    """Return the value of the best inner element for every pair of places of the parent."""
    blocks, rows = _blocks(group, similarity), np.arange(group.size)
    if group.rotates:
        return best_values(blocks, group.kind)
    values = np.empty(blocks.shape[:2])
    for i, j in np.ndindex(values.shape):
        values[i, j] = blocks[i, j, rows, _assign(blocks[i, j].copy())].sum()
    return values


def _read_off(group: Group, groups: Mapping[str, Group], similarity: np.ndarray, perms: Mapping[str, Tensor]) -> Tensor:
    """Find the element inside each block, given which block of b takes its place."""
    blocks = _blocks(group, similarity)
    if group.rotates:
        perm = torch.empty((*group.shape, group.size), dtype=torch.float64)
    else:
        perm = torch.empty(group.shape, dtype=torch.int64)
    sizes = [size for _, size in group.parents]
    names = [name for name, _ in group.parents]
    for place in product(*map(range, sizes)):
        source = []
        for name, index in zip(names, place, strict=True):
            if not name:
                source.append(index)
                continue
            above = [place[names.index(p)] if p else place[k] for k, (p, _) in enumerate(groups[name].parents)]
            source.append(int(perms[name][(*above, index)]))
        block = blocks[_flat(place, sizes), _flat(source, sizes)]
        found = (
            best_rotations(torch.from_numpy(block), group.kind) if group.rotates else torch.from_numpy(_assign(block))
        )
        perm[place] = found
    return perm


def _flat(index: tuple[int, ...] | list[int], sizes: list[int]) -> int:
    flat = 0
    for i, size in zip(index, sizes, strict=True):
        flat = flat * size + i
    return flat
