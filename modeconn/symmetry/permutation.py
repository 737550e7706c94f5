"""A relabelling of a model's hidden units: apply it, compose it, undo it, keep it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of
from modeconn.symmetry.spec import Group, PermutationSpec
from modeconn.tools import files as checkpoint


@dataclass(frozen=True, eq=False)
class Permutation:
    """One permutation per group of a spec.

    Unit ``perm[i]`` takes place ``i``: ``w.index_select(dim, perm)``, as a matrix ``P[i, perm[i]] = 1``. The units of a
    group with parents (a head, say) have one permutation for each place of the parents, ``perm`` of shape
    ``(*parent sizes, n)``, so that place ``(h, i)`` holds what was unit ``(perm_parent[h], perm[h, i])``.

    Args:
        spec: The groups.
        perms: By group name, int64 of the group's shape, on the CPU.

    Raises:
        ValueError: If a group is missing or unknown, or its ``perm`` is not a permutation of that group.
    """

    spec: PermutationSpec
    perms: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        names = {group.name for group in self.spec.groups}
        if names != self.perms.keys():
            odd = sorted(names ^ self.perms.keys())[0]
            problem = "is missing from the permutation" if odd in names else "is no group of this spec"
            raise ValueError(f"group '{odd}' {problem}.")
        for group in self.spec.groups:
            _check(group, self.perms[group.name])

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a relabelled copy of ``model``; parameters and saved buffers move, the function stays.

        Raises:
            ValueError: If the model is not of this permutation's spec.
        """
        self.spec.check_model(model)
        relabelled = copy_of(model)
        tensors = dict(relabelled.named_parameters(remove_duplicate=False))
        tensors |= dict(relabelled.named_buffers(remove_duplicate=False))
        done: set[int] = set()
        with torch.no_grad():
            for name, moved in self.relabel({name: tensors[name] for name in self.spec.state}).items():
                if id(tensors[name]) not in done:
                    done.add(id(tensors[name]))
                    tensors[name].copy_(moved)
        return relabelled

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers with their units moved; names that the spec does not know stay."""
        by_atom = self.by_atom()
        return {
            name: self.spec.structure.relabel(tensor.detach(), self.spec.state[name], by_atom)
            if name in self.spec.state
            else tensor
            for name, tensor in tensors.items()
        }

    def by_atom(self) -> dict[int, Tensor]:
        """Return the perms under the numbers that the spec's structure uses."""
        return {group.atom: self.perms[group.name] for group in self.spec.groups}

    def flat_sources(self, name: str) -> Tensor:
        """Return the source of every unit of a group, blocks and units inside them numbered row-major, ``(N,)``."""
        group = self.spec[name]
        flat = torch.zeros(group.shape, dtype=torch.int64)
        for source, size in zip([*self._parent_sources(group), self.perms[name]], group.shape, strict=True):
            flat = flat * size + source
        return flat.flatten()

    def inverse(self) -> Permutation:
        """Return the relabelling that undoes this one."""
        return Permutation(self.spec, {g.name: self._inverse(g) for g in self.spec.groups})

    def _inverse(self, group: Group) -> Tensor:
        perm = self.perms[group.name]
        inverse = torch.empty_like(perm)
        inverse[(*self._parent_sources(group), perm)] = torch.arange(group.size).expand(group.shape)
        return inverse

    def __matmul__(self, other: Permutation) -> Permutation:
        """``(p @ q).apply(m)`` equals ``p.apply(q.apply(m))``."""
        if (other.spec.state, other.spec.shapes) != (self.spec.state, self.spec.shapes):
            raise ValueError("these permutations are of different specs, so they cannot be composed.")
        return Permutation(
            self.spec,
            {g.name: other.perms[g.name][(*self._parent_sources(g), self.perms[g.name])] for g in self.spec.groups},
        )

    def _parent_sources(self, group: Group) -> list[Tensor]:
        """For each parent, which of its units stands at each place of the group, in shapes that broadcast."""
        structure, by_atom = self.spec.structure, self.by_atom()
        parents = structure.parents[group.atom]
        here = [
            torch.arange(structure.sizes[p]).view([-1 if d == i else 1 for d in range(len(parents) + 1)])
            for i, p in enumerate(parents)
        ]
        sources = []
        for i, parent in enumerate(parents):
            if parent in by_atom:
                above = [here[parents.index(p)] for p in structure.parents[parent]]
                sources.append(by_atom[parent][(*above, here[i])])
            else:
                sources.append(here[i])
        return sources

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation):
            return NotImplemented
        return self.perms.keys() == other.perms.keys() and all(
            torch.equal(perm, other.perms[name]) for name, perm in self.perms.items()
        )

    __hash__ = None

    @property
    def num_moved(self) -> int:
        """The number of units that are not in their own place."""
        return sum(int((perm != torch.arange(perm.shape[-1])).sum()) for perm in self.perms.values())

    def __repr__(self) -> str:
        return f"Permutation({len(self.perms)} groups, {self.num_moved:,} of {self.spec.num_units:,} units moved)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the permutation and its spec to a safetensors file, all or nothing."""
        checkpoint.write(path, "permutation", self.perms, {"spec": self.spec.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Permutation:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is no permutation that modeconn wrote.
        """
        perms, about = checkpoint.read(path, "permutation")
        return cls(PermutationSpec.from_json(about["spec"]), perms)


def _check(group: Group, perm: Tensor) -> None:
    if perm.dtype != torch.int64 or tuple(perm.shape) != group.shape:
        raise ValueError(
            f"permutation for group '{group.name}' must be int64 of shape {group.shape}, "
            f"got {str(perm.dtype).removeprefix('torch.')} of shape {tuple(perm.shape)}."
        )
    ordered = perm.sort(-1).values
    if not torch.equal(ordered, torch.arange(group.size).expand(group.shape)):
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        what = f"uses unit {int(twice[0])} twice" if len(twice) else f"uses unit {int(ordered.flatten()[-1])}"
        raise ValueError(
            f"permutation for group '{group.name}' {what}; it must contain each of 0..{group.size - 1} once."
        )
