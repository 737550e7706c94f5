"""Relabellings that also map the units inside of heads by invertible matrices, and where those have to be inverted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modeconn.symmetry.groups import Group
from modeconn.symmetry.kinds import ORTHOGONAL
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.slopes import SlopesOfOutputs, in_wide, places, shaped
from modeconn.symmetry.spec import Orthogonal, PermutationSpec
from modeconn.symmetry.verify import VerificationError
from modeconn.tools.door import check_settings

Pieces = Mapping[str, Sequence[Mapping[int, bool]]]
"""By name of a parameter, for each piece of it which groups it has, by atom, and whether these take the inverse."""


@dataclass(frozen=True, eq=False, repr=False)
class Invertible(Relabelling):
    r"""Rotations and permutations, and then invertible maps inside of heads.

    Queries and keys meet in products :math:`q^T k`, values in :math:`W_O v`. Where units of one side are mapped by any
    invertible matrix :math:`M`, and those of the other by :math:`M^{-T}`, the function stays. Such maps are found by
    learned matching, see ``invertible=`` of `modeconn.Sinkhorn`.

    Args:
        rotation: What comes first.
        maps: By name of a group that rotates, float64 ``(*parent sizes, n, n)`` on the CPU; invertible.
        duals: By the same names, bool ``(P,)``: which of the places of the group, counted through all parameters of the
            spec and their pieces, take the inverse transposed.

    Raises:
        ValueError: If a map is of no group that rotates, has another shape, or cannot be inverted.
    """

    kind: ClassVar[str] = "invertible"

    rotation: Orthogonal
    maps: Mapping[str, Tensor]
    duals: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_settings(self)
        known = {group.name: group for group in self.spec.groups if group.rotates}
        if self.maps.keys() != self.duals.keys() or not self.maps.keys() <= known.keys():
            raise ValueError(f"maps must be of groups that rotate, {', '.join(known)}, got {', '.join(self.maps)}.")
        for name, found in self.maps.items():
            shape, count = (*known[name].shape, known[name].size), len(places(self.spec, known[name]))
            if found.shape != shape or found.dtype != torch.float64:
                raise ValueError(f"the map of {name!r} must be float64 of shape {shape}, got {tuple(found.shape)}.")
            if self.duals[name].shape != (count,) or self.duals[name].dtype != torch.bool:
                raise ValueError(f"the duals of {name!r} must be bool of shape ({count},).")
            back, failed = torch.linalg.inv_ex(found)
            if failed.any() or not back.isfinite().all():
                raise ValueError(f"the map of {name!r} cannot be inverted.")

    @property
    def spec(self) -> PermutationSpec:
        """The groups."""
        return self.rotation.spec

    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers of a folded network relabelled; names the spec does not know stay."""
        moved, pieces = self.rotation.relabel(tensors), pieces_of(self.spec, self.duals)
        maps = {self.spec[name].atom: both_sides(found) for name, found in self.maps.items()}
        for name, each in pieces.items():
            if name in moved and any(each):
                exact = in_wide(moved[name]).to(moved[name].device)
                moved[name] = mapped(self.spec, name, exact, each, maps).to(moved[name].dtype)
        return moved

    def inverse(self) -> Invertible:
        """Return the relabelling that undoes this one."""
        back, maps = self.rotation.inverse(), {}
        for name, found in self.maps.items():
            turn = back.elements[name]
            maps[name] = turn @ back.blocks(self.spec[name], torch.linalg.inv(found)) @ turn.mT
        return Invertible(back, maps, self.duals)

    def after(self, first: Invertible) -> Invertible:
        """Return the relabelling that makes ``first`` and then this one."""
        maps = dict(self.maps)
        for name, found in first.maps.items():
            if name in self.duals and not self.duals[name].equal(first.duals[name]):
                raise ValueError(f"these relabellings invert the map of {name!r} in other places.")
            turn = self.rotation.elements[name]
            before = turn @ self.rotation.blocks(self.spec[name], found) @ turn.mT
            maps[name] = maps[name] @ before if name in maps else before
        return Invertible(self.rotation @ first.rotation, maps, {**first.duals, **self.duals})

    def sources(self, name: str) -> Tensor | None:
        """Return which unit takes each place of a group, ``(N,)``; None of a group that mixes its units."""
        return self.rotation.sources(name)

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, up to the rounding of matrices."""
        still = [torch.eye(found.shape[-1], dtype=found.dtype) for found in self.maps.values()]
        maps = zip(self.maps.values(), still, strict=True)
        return self.rotation.is_identity and all(torch.allclose(m, one.expand_as(m), atol=1e-12) for m, one in maps)

    @property
    def num_moved(self) -> int:
        """The number of units, of groups that permute, that are not in their own place."""
        return self.rotation.num_moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Invertible):
            return NotImplemented
        pairs = ((self.maps, other.maps), (self.duals, other.duals))
        return self.rotation == other.rotation and all(
            own.keys() == theirs.keys() and all(x.equal(theirs[name]) for name, x in own.items())
            for own, theirs in pairs
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"Invertible({self.rotation!r}, {len(self.maps)} groups mapped)"

    def tensors(self) -> dict[str, Tensor]:
        """Return elements, maps and duals by group name."""
        parts = {"element": self.rotation.tensors(), "map": self.maps, "dual": self.duals}
        return {f"{part}.{name}": x for part, found in parts.items() for name, x in found.items()}

    @classmethod
    def restore(cls, spec: str, tensors: Mapping[str, Tensor]) -> Invertible:
        """Return the relabelling of these tensors, with its spec as JSON."""
        parts: dict[str, dict[str, Tensor]] = {"element": {}, "map": {}, "dual": {}}
        for name, tensor in tensors.items():
            part, _, group = name.partition(".")
            if part not in parts:
                raise ValueError(f"this is no invertible relabelling: it holds a tensor {name!r}.")
            parts[part][group] = tensor
        return cls(Orthogonal.restore(spec, parts["element"]), parts["map"], parts["dual"])


def pieces_of(spec: PermutationSpec, duals: Mapping[str, Tensor]) -> Pieces:
    """Return which pieces of which parameters are mapped, and which by the inverse transposed."""
    found: dict[str, list[dict[int, bool]]] = {}
    for group_name, flags in duals.items():
        group = spec[group_name]
        for (name, number), is_dual in zip(places(spec, group), flags.tolist(), strict=True):
            if name not in found:
                found[name] = [{} for _ in spec.structure.pieces(shaped(spec, name), spec.state[name])]
            found[name][number][group.atom] = is_dual
    return found


BothSides = tuple[Tensor, Tensor]
"""A map ``(*parent sizes, n, n)``, and its inverse transposed."""


def both_sides(found: Tensor) -> BothSides:
    """Return a map and its inverse transposed; differentiable."""
    return found, torch.linalg.inv(found).mT


def mapped(
    spec: PermutationSpec, name: str, x: Tensor, pieces: Sequence[Mapping[int, bool]], maps: Mapping[int, BothSides]
) -> Tensor:
    """Return a parameter, or one relabelled by rotations, with maps inside of heads; differentiable in them.

    Args:
        spec: The groups.
        name: Of the parameter.
        x: The parameter.
        pieces: What `pieces_of` says of it.
        maps: By atom, what `both_sides` makes of a map.
    """
    matrices = [{atom: maps[atom][is_dual] for atom, is_dual in piece.items()} for piece in pieces]
    return spec.structure.turn_pieces(x, spec.state[name], matrices)


def duals_of(spec: PermutationSpec, model: nn.Module, example_input: Any, *, seed: int = 0) -> dict[str, Tensor]:
    r"""Return of which groups any invertible map leaves the function, and which of their places take its inverse.

    A map near the identity, :math:`1 + \epsilon X` with a symmetric ``X``, changes the outputs by :math:`\epsilon D_p`
    if it acts on one place of a group alone. The function stays if :math:`\sum_p s_p D_p = 0`, where :math:`s_p` is -1
    for places that take the inverse transposed and 1 for the others. These signs are found, on redrawn weights in
    double precision, and tried out with maps that are far from the identity, of all groups at once. Groups without
    such signs, as streams whose length a norm reads, are left out, and those that change no output.

    Args:
        spec: The groups.
        model: A model of this spec.
        example_input: What ``model(...)`` takes.
        seed: For the weights and maps.

    Returns:
        By group name bool ``(P,)``, for each of its `places` whether it takes the inverse transposed.

    Raises:
        VerificationError: If maps with these signs change the function all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = SlopesOfOutputs(spec, model, example_input, generator)
    found: dict[str, Tensor] = {}
    for group in spec.groups:
        if group.kind is not ORTHOGONAL:
            continue
        drawn = torch.randn(*group.shape, group.size, generator=generator, dtype=torch.float64)
        signs = outputs.signs(group, (drawn + drawn.mT) / 2)
        if signs is not None:
            found[group.name] = signs
    maps = {name: _far_from_identity(spec[name], generator) for name in found}
    change = outputs.change(Invertible(spec.identity(), maps, found).relabel) if found else 0.0
    if not change < _LARGEST_CHANGE:
        raise VerificationError(
            f"invertible maps inside of heads change the function by {change:.1e} of their size, though small ones "
            f"do not. Leave invertible= out."
        )
    return found


def _far_from_identity(group: Group, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(*group.shape, group.size, generator=generator, dtype=torch.float64)
    return torch.linalg.matrix_exp(drawn / (2 * group.size**0.5))


_LARGEST_CHANGE = 1e-8
