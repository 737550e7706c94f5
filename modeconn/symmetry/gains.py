"""Which gains of norms, and which layer scales, can be folded into the layers beside them, and how.

A gain acts on each unit by itself, so that units of its axis may only be permuted. Where all that reads the scaled
units are linear layers, their weights can take the gain up, ``W (g * x) = (W diag(g)) x``, and it becomes one; where
all that makes them are linear layers, theirs can. The network then has rotations. A bias that is added after the gain
goes into the biases of the layers that read it, where they have some, else it is divided by the gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeconn.symmetry.axes import Axis, Space, atoms_of
from modeconn.symmetry.kinds import LINEAR
from modeconn.symmetry.walk import Gain, Role, Use

if TYPE_CHECKING:
    from torch.fx import Node

Place = tuple[str, int, int]
"""A parameter, one of its dimensions, and where the units begin along it."""


@dataclass(frozen=True)
class Fold:
    """One gain and what takes it up.

    Args:
        gain: The parameter.
        offset: What is added to it first: 1 where it holds the gain less one, as in Gemma.
        into: The parts of weights that are multiplied by the gain.
        bias: A parameter that is added after the gain, None if there is none.
        shifts: For each place in ``into`` the bias of that layer, which takes up ``bias``; empty where one has none.
    """

    gain: str
    offset: float
    into: tuple[Place, ...]
    bias: str | None = None
    shifts: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """All parameters that change."""
        return frozenset({self.gain, *(name for name, _, _ in self.into), *self.shifts} | {self.bias} - {None})

    @property
    def neutral(self) -> float:
        """The value of the parameter where the gain is one."""
        return 1.0 - self.offset


@dataclass(frozen=True)
class Known:
    """What is known of a model when its gains are judged.

    Args:
        space: All atoms.
        state: The axes of each parameter and saved buffer, each tensor once.
        uses: Returns what all operators that read a parameter do with it, or in words what else is done with it, if
            some of them is no linear layer.
        aliases: All names of a tensor, by the one in ``state``.
        bound: Names in ``state`` of tensors that have several because the module that holds them has.
        made_by: Returns the operator whose entries a tensor holds, as they are but for their arrangement.
        untouchable: Parameters that nothing may be folded into, and why.
    """

    space: Space
    state: Mapping[str, tuple[Axis, ...]]
    uses: Callable[[str], list[Use] | str]
    aliases: Mapping[str, Sequence[str]]
    bound: Set[str]
    made_by: Callable[[Node | None], Node | None]
    untouchable: Mapping[str, str]


def judged(gains: Sequence[Gain], known: Known) -> tuple[list[Fold], dict[Gain, str]]:
    """Return how each gain is folded, and for each that cannot be, why."""
    folds: dict[str, Fold] = {}
    refused: dict[Gain, str] = {}
    for gain in gains:
        forward = _absorbed(gain, gains, known, "contracted")
        found = forward if isinstance(forward, Fold) else _absorbed(gain, gains, known, "made")
        if isinstance(found, Fold) and folds.setdefault(gain.name, found) == found:
            continue
        refused[gain] = forward if isinstance(forward, str) else "it is used in two ways"
    lost = {gain.name for gain in refused}
    return [fold for name, fold in folds.items() if name not in lost], refused


def _absorbed(gain: Gain, gains: Sequence[Gain], known: Known, role: Role) -> Fold | str:
    """Return how the layers after a gain ("contracted"), or before it ("made"), take it up, or why they cannot."""
    space = known.space
    after, axis = space.normal(gain.after), space.normal(gain.after if role == "contracted" else gain.before)
    if after == space.normal(gain.before):
        return _tied_along(axis, known) or "the scaled units are added to those that are not"
    atom = axis[0][0] if len(axis) == len(axis[0]) == 1 and isinstance(axis[0][0], int) else None
    if atom is None:
        return "the axis is cut into parts"
    if space.atom_kind(atom) is not LINEAR:
        return f"the scaled units are not read by linear layers alone: {space.why_lowered(axis)}"
    ends = "after" if role == "contracted" else "before"
    alike = {other for other in gains if space.normal(getattr(other, ends)) == axis}
    if {(other.name, other.offset, other.bias) for other in alike} != {(gain.name, gain.offset, gain.bias)}:
        return "another gain scales what the same layer reads"
    other_end = "before" if role == "contracted" else "after"
    if any(space.normal(getattr(other, other_end)) == axis for other in gains):
        return "another gain scales the same units once more"
    of_gain = known.uses(gain.name)
    if isinstance(of_gain, str) or not all(
        use.role == "gain" and use.axis in {g.after for g in alike} for use in of_gain
    ):
        return _read_otherwise(gain.name, known)
    own = {gain.bias: "gain"} if role == "contracted" else {}
    into: list[Place] = []
    uses: list[Use] = []
    bias = gain.bias if role == "contracted" else None
    for name, axes in known.state.items():
        dims = [dim for dim, other in enumerate(axes) if atom in atoms_of(space.normal(other))]
        if not dims:
            continue
        wanted = {own[name]} if name in own else {role, "added" if role == "contracted" else "bias"}
        found, here = known.uses(name), []
        starts = _starts(axis, space.normal(axes[dims[0]]), space)
        if isinstance(found, str):
            return _read_otherwise(name, known)
        if len(dims) > 1 or not starts:
            return f"'{name}' holds the units twice" if len(dims) > 1 else f"'{name}' holds them cut into parts"
        here = [use for use in found if space.normal(use.axis) == space.normal(axes[dims[0]])]
        if not {use.role for use in here} <= wanted or (len(starts) > 1 and role == "made"):
            return _read_otherwise(name, known)
        if not here or len({use.role for use in here}) != 1 or _num_readers(here) != _num_readers(found):
            return _read_otherwise(name, known)
        if here[0].role == "added":
            if bias is not None:
                return f"'{name}' is added to it beside '{bias}'"
            bias = name
        elif name not in own:
            into += [(name, dims[0], start) for start in starts]
            uses += here
    if not any(use.role == role for use in uses):
        return "no linear layer takes it up"
    for name in (gain.name, bias, *(name for name, _, _ in into)):
        if name in known.untouchable:
            return known.untouchable[name]
    shifts = _shifts({other.node for other in alike}, into, uses, known) if gain.bias is not None and bias else ()
    return Fold(gain.name, gain.offset, tuple(into), bias, shifts)


def _tied_along(axis: Axis, known: Known) -> str | None:
    """Return that a parameter along an axis has two names, if one does."""
    atoms = set(atoms_of(axis))
    for name, axes in known.state.items():
        if len(known.aliases[name]) > 1 and any(atoms & set(atoms_of(known.space.normal(other))) for other in axes):
            return _read_otherwise(name, known)
    return None


def _starts(axis: Axis, whole: Axis, space: Space) -> list[int]:
    """Return where an axis of one atom begins, each time it is a part of a whole one; nothing if it is cut there."""
    found, position, atom = [], 0, axis[0][0]
    for segment in whole:
        if (segment,) == axis:
            found.append(position)
        elif atom in atoms_of((segment,)):
            return []
        position += space.size((segment,))
    return found


def _num_readers(uses: Sequence[Use]) -> int:
    return len({use.reader for use in uses})


def _read_otherwise(name: str, known: Known) -> str:
    names = known.aliases.get(name, (name,))
    if len(names) > 1 and name in known.bound:
        return f"'{names[0]}' and '{names[1]}' are one, as a module has two names"
    if len(names) > 1:
        return f"'{names[0]}' is tied to '{names[1]}': untie=True gives each a copy of its own"
    found = known.uses(name)
    return f"'{name}' {found if isinstance(found, str) else 'is also read by a layer that does not take it up'}"


def _shifts(norms: Set[Node], into: Sequence[Place], uses: Sequence[Use], known: Known) -> tuple[str, ...]:
    """Return the bias of each layer that takes up a gain, if each has its own and reads what a norm makes as it is."""
    if not all(known.made_by(use.source) in norms for use in uses):
        return ()
    by_weight = {name: {use.bias for use in uses if use.name == name} for name, _, _ in into}
    if len(by_weight) < len(into):
        return ()
    biases = [next(iter(found)) for found in by_weight.values() if len(found) == 1]
    if len(biases) < len(by_weight) or None in biases or len(set(biases)) < len(biases):
        return ()
    for name, bias in zip(by_weight, biases, strict=True):
        if bias in known.untouchable or len(known.state[bias]) != 1:
            return ()
        found = known.uses(bias)
        readers = {use.reader for use in uses if use.name == name}
        if len(known.state[name]) != 2 or isinstance(found, str) or {use.reader for use in found} != readers:
            return ()
        if {use.role for use in found} != {"bias"}:
            return ()
    return tuple(biases)


def folded(tensors: Mapping[str, Tensor], folds: Sequence[Fold]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that change when all gains are folded, one by one: the same function.

    Raises:
        ValueError: If a bias has to be divided by a gain that is zero or nearly.
    """
    folding = Folding(lambda name: tensors[name].detach(), {name: tuple(x.shape) for name, x in tensors.items()}, folds)
    for name in tensors:
        if name in folding.names:
            yield name, folding.apply(name, tensors[name].detach()).to(tensors[name].dtype)


class Folding:
    """What becomes of each parameter of one network when all gains are folded.

    Computed in double precision, of which only vectors are kept: each matrix is scaled when its turn comes, and must
    not have been written over by then.

    Args:
        read: Returns a parameter by its name.
        shapes: Of all parameters.
        folds: What is folded, in this order.

    Attributes:
        names: The parameters that change.

    Raises:
        ValueError: If a bias has to be divided by a gain that is zero or nearly, or a gain is not finite.
    """

    def __init__(
        self, read: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, ...]], folds: Sequence[Fold]
    ) -> None:
        self._given = read
        self._shapes = shapes
        self._exact: dict[str, Tensor] = {}
        self._scales: dict[str, list[Tensor]] = {}
        for fold in folds:
            self._fold(fold)
        self.names = self._exact.keys() | self._scales.keys()

    def apply(self, name: str, given: Tensor) -> Tensor:
        """Return a parameter of the folded network from that of the network as it is; in double if it changes."""
        if name not in self.names:
            return given
        return prod(self._scales.get(name, ()), start=self._exact[name] if name in self._exact else given.double())

    def _read(self, name: str) -> Tensor:
        if name in self._exact:
            return prod(self._scales.get(name, ()), start=self._exact[name])
        return prod(self._scales.get(name, ()), start=self._given(name).double())

    def _write(self, name: str, value: Tensor) -> None:
        self._exact[name] = value
        self._scales.pop(name, None)

    def _fold(self, fold: Fold) -> None:
        gain = self._read(fold.gain) + fold.offset
        if not (gain.is_meta or bool(torch.isfinite(gain).all())):
            raise ValueError(f"the gain '{fold.gain}' holds NaN or infinite entries, so it cannot be folded.")
        needs_no_shift = fold.bias is None or not fold.shifts
        if not gain.is_meta and bool((gain == 1).all()) and (needs_no_shift or not self._read(fold.bias).any()):
            return
        vector = gain.flatten()
        if fold.bias is not None:
            bias = self._read(fold.bias)
            shape = bias.shape
            bias = bias.flatten()
            if fold.shifts:
                for (name, dim, _), own in zip(fold.into, fold.shifts, strict=True):
                    self._write(own, self._read(own) + torch.tensordot(self._read(name), bias, dims=([dim], [0])))
                self._write(fold.bias, torch.zeros_like(bias).view(shape))
            else:
                self._write(fold.bias, _divided(bias, vector, fold).view(shape))
        for name, dim, start in fold.into:
            shape = self._shapes[name]
            scale = torch.ones(shape[dim], dtype=vector.dtype, device=vector.device)
            scale[start : start + len(vector)] = vector
            scale = scale.view([-1 if d == dim else 1 for d in range(len(shape))])
            self._scales.setdefault(name, []).append(scale)
        self._write(fold.gain, torch.full_like(gain, fold.neutral))


def _divided(bias: Tensor, gain: Tensor, fold: Fold) -> Tensor:
    """Return ``bias / gain``, where a unit without a bias may have any gain."""
    smallest = gain.abs().min()
    if not gain.is_meta and bool(((gain.abs() <= _SMALLEST * gain.abs().max()) & (bias != 0)).any()):
        raise ValueError(
            f"the gain '{fold.gain}' has an entry of {float(smallest):.1e}, by which its bias '{fold.bias}' cannot be "
            f"divided, and a layer that reads it has no bias of its own. Pass freeze=[{fold.bias!r}] to "
            f"modeconn.discover, which then leaves its units where they are, or use symmetries='permutation'."
        )
    return torch.where(bias == 0, bias, bias / gain)


_SMALLEST = 1e-6
"""Smallest gain, relative to the largest, that is divided by."""


def to_plain(folds: Sequence[Fold]) -> list[Any]:
    """Return folds as they are written to files."""
    return [[fold.gain, fold.offset, fold.into, fold.bias, fold.shifts] for fold in folds]


def from_plain(data: Sequence[Any]) -> tuple[Fold, ...]:
    """Invert `to_plain`."""
    return tuple(
        Fold(gain, float(offset), tuple((name, int(dim), int(start)) for name, dim, start in into), bias, tuple(shifts))
        for gain, offset, into, bias, shifts in data
    )
