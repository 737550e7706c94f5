"""The algebra of tensor axes: how a relabelling of hidden units acts on each axis of each tensor.

An *atom* is a set of positions on which a group of one *kind* may act (`modeconn.symmetry.kinds`): any rotation, any
permutation, or nothing, when it is *fixed*. An *axis* is written with atoms as a concatenation of products::

    axis    = (segment, segment, ...)     positions of the first segment, then of the second, ...
    segment = (factor, factor, ...)       row-major product, the last factor runs fastest
    factor  = atom | axis                 an axis inside a product is a concatenation that comes later than first

so ``((c, hw),)`` are ``c`` channels of ``hw`` pixels each after a flatten, ``((a,), (b,))`` two concatenated branches,
``((h, ((q,), (k,), (v,))),)`` heads that each hold a query, a key and a value. ``((),)`` has one position.

Everything that discovery learns is one of two facts about atoms, kept in one table that all axes are read through:
two axes act alike (`Space.unify`), or only some kind of group acts on an axis (`Space.lower`; `Space.fix` for none).
Both only ever shrink the symmetry group, so what was concluded earlier stays true, and an equation too hard to solve
may always end in `Space.fix`.

*Families.* Where an axis ``p`` is fixed, another axis of the same tensor may be relabelled differently at each index of
``p``: query, key and value in ``x.view(..., 3, heads, size)``. ``select(p, i)`` then turns atom ``q`` into its *member*
at ``(p, i)``. Whether the members may differ is known only when all tensors have been seen (`Space.settle`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from modeconn.symmetry.kinds import FIXED, ORTHOGONAL_ONES, PERMUTATION, Kind

Axis = tuple[Any, ...]
Tensor = tuple[Axis, ...]
"""The axes of one tensor."""

Families = dict[int, tuple[int, list[Axis]]]
"""``family -> (index atom, the family's axis at each index)``"""

UNIT: Axis = ((),)
MISALIGNED = "views cut it in ways that do not fit together"


@dataclass(frozen=True)
class At:
    """One index of a fixed axis of ``size`` positions, in place of that axis (see `Structure.expand`)."""

    size: int
    index: int


class Space:
    """All atoms of one model, and everything known about them.

    Args:
        top: The kind of an axis of which nothing is known yet.
    """

    def __init__(self, top: Kind = PERMUTATION) -> None:
        self._top = top
        self._size: list[int] = []
        self._kind: list[Kind] = []
        self._why: list[str | None] = []  # what lowered an atom to its kind, None while it has the top one
        self._meaning: dict[int, Axis] = {}  # atom -> the axis it was found to be; every axis is read through this
        self._normal: dict[Axis, Axis] = {}  # cache of `normal`, emptied when `_meaning` grows
        self._batch: set[int] = set()
        self._member: dict[tuple[int, int, int], int] = {}  # (family, index axis, index) -> member

    # ---------------------------------------------------------------- making and reading axes

    def free(self, size: int) -> Axis:
        """Return a new axis of which nothing is known yet."""
        return self._new(size, self._top, None)

    def fixed(self, size: int, why: str) -> Axis:
        """Return a new axis whose positions carry meaning."""
        return self._new(size, FIXED, why)

    def batch(self, size: int) -> Axis:
        """Return a new fixed axis that stands for the batch: any other size would do as well."""
        axis = self._new(size, FIXED, "input")
        self._batch.update(axis[0])
        return axis

    def _new(self, size: int, kind: Kind, why: str | None) -> Axis:
        if size <= 1:
            return ((),) * size
        self._size.append(size)
        self._kind.append(kind)
        self._why.append(why)
        return ((len(self._size) - 1,),)

    def normal(self, axis: Axis) -> Axis:
        """Return the axis in terms of what its atoms are known to be: equal axes that act alike read the same."""
        known = self._normal.get(axis)
        if known is None:
            known = tuple(part for segment in axis for part in self._normal_segment(segment))
            self._normal[axis] = known
        return known

    def _normal_segment(self, segment: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        factors: list[Any] = []
        for factor in segment:
            if isinstance(factor, int):
                if factor not in self._meaning:
                    factors.append(factor)
                    continue
                factor = self._meaning[factor]
            elif isinstance(factor, At):
                factors.append(factor)
                continue
            inner = self.normal(factor)
            if len(inner) == 1:
                factors.extend(inner[0])
            else:
                factors.append(inner)
        if factors and isinstance(factors[0], tuple):  # (a + b) x c = a x c + b x c
            return [s for part in factors[0] for s in self._normal_segment((*part, *factors[1:]))]
        inside = next((i for i, factor in enumerate(factors[:-1]) if isinstance(factor, tuple)), None)
        if inside is not None:  # a x (b + c) x d = a x (b x d + c x d)
            parts = tuple(s for part in factors[inside] for s in self._normal_segment((*part, *factors[inside + 1 :])))
            factors[inside:] = [parts]
        return [tuple(factors)]

    def size(self, axis: Axis) -> int:
        """Return the number of positions."""
        return sum(self._segment_size(segment) for segment in axis)

    def _segment_size(self, segment: Iterable[Any]) -> int:
        return prod(self._size[f] if isinstance(f, int) else self.size(f) for f in segment)

    def is_fixed(self, axis: Axis) -> bool:
        """Return whether no position of the axis can move."""
        return all(self._kind[atom] is FIXED for atom in atoms_of(self.normal(axis)))

    @property
    def batch_atoms(self) -> frozenset[int]:
        """The atoms that stand for the batch."""
        return frozenset(self._batch)

    @property
    def num_atoms(self) -> int:
        """The number of atoms made so far."""
        return len(self._size)

    def atom_size(self, atom: int) -> int:
        """Return the number of positions of one atom."""
        return self._size[atom]

    def atom_kind(self, atom: int) -> Kind:
        """Return the kind of group that may act on an atom of a normal axis."""
        return self._kind[atom]

    def is_free_atom(self, atom: int) -> bool:
        """Return whether an atom of a normal axis is not fixed."""
        return self._kind[atom] is not FIXED

    # ---------------------------------------------------------------- building axes from axes

    def product(self, axes: Sequence[Axis]) -> Axis:
        """Return the row-major product: several axes viewed as one."""
        return self.normal((tuple(axes),))

    def concatenate(self, axes: Iterable[Axis]) -> Axis:
        """Return the axes one behind the other."""
        return self.normal(tuple(segment for axis in axes for segment in axis))

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Read one axis as the row-major product of several of the given sizes."""
        parts = []
        for i, size in enumerate(sizes[:-1]):
            head, axis = self._split_two(axis, size, prod(sizes[i + 1 :]))
            parts.append(head)
        return [*parts, self.normal(axis)]

    def _split_two(self, axis: Axis, num: int, rest: int) -> tuple[Axis, Axis]:
        if num == 1:
            return UNIT, axis
        if rest == 1:
            return axis, UNIT
        axis = self.normal(axis)
        found = self._split_product(axis[0], num) if len(axis) == 1 else self._split_concatenation(axis, num, rest)
        if found is None:
            self.fix(axis, MISALIGNED)
            return self.fixed(num, MISALIGNED), self.fixed(rest, MISALIGNED)
        return found

    def _split_product(self, factors: tuple[Any, ...], num: int) -> tuple[Axis, Axis] | None:
        for i, factor in enumerate(factors):
            if num == 1:
                return (factors[:i],), (factors[i:],)
            size = self._segment_size((factor,))
            if num % size == 0:
                num //= size
            elif size % num == 0:
                inside = self._split_atom(factor, num) if isinstance(factor, int) else None
                head, tail = inside or self._split_two(factor, num, size // num)
                return self.product([(factors[:i],), head]), self.product([tail, (factors[i + 1 :],)])
            else:
                return None
        return (factors,), UNIT

    def _split_atom(self, atom: int, num: int) -> tuple[Axis, Axis]:
        known, size = (self._kind[atom], self._why[atom]), self._size[atom]
        head, tail = self._new(num, *known), self._new(size // num, *known)
        if atom in self._batch:
            self._batch.update(head[0])
        self._define(atom, ((*head[0], *tail[0]),))
        return head, tail

    def _split_concatenation(self, axis: Axis, num: int, rest: int) -> tuple[Axis, Axis] | None:
        sizes = [self._segment_size(segment) for segment in axis]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        if all(k * rest in starts for k in range(num)):  # a stack of `num` axes, each moving on its own
            cuts = [starts.index(k * rest) for k in range(num)] + [len(axis)]
            over = self.fixed(num, "stacked")
            return over, self.family(over, [axis[cuts[k] : cuts[k + 1]] for k in range(num)])
        if all(size % rest == 0 for size in sizes):  # a concatenation times the rest
            pairs = [self._split_two((segment,), size // rest, rest) for segment, size in zip(axis, sizes, strict=True)]
            for _, tail in pairs[1:]:
                self.unify(pairs[0][1], tail)
            return self.concatenate(head for head, _ in pairs), self.normal(pairs[0][1])
        return None

    def cut(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Read one axis as the concatenation of several of the given sizes."""
        pieces = self.concatenate(self.free(size) for size in sizes)
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        self.unify(axis, pieces)
        return [self.between(axis, start, stop) for start, stop in pairwise(bounds)]

    def between(self, axis: Axis, start: int, stop: int) -> Axis:
        """Return positions ``start`` to ``stop`` of an axis; where they cut through a segment, it becomes fixed."""
        position, kept = 0, []
        for segment in self.normal(axis):
            size = self._segment_size(segment)
            low, high = max(start, position), min(stop, position + size)
            if (low, high) == (position, position + size):
                kept.append(segment)
            elif low < high:
                self.fix((segment,), "sliced")
                kept.extend(self.fixed(high - low, "sliced"))
            position += size
        return tuple(kept)

    # ---------------------------------------------------------------- what is learned

    def lower(self, axis: Axis, kind: Kind, why: str | None) -> None:
        """Learn that no larger group than one of a kind may act on an axis; the reason that led to a kind stays."""
        for atom in atoms_of(self.normal(axis)):
            met = self._kind[atom].meet(kind)
            if met is not self._kind[atom]:
                self._kind[atom], self._why[atom] = met, why

    def fix(self, axis: Axis, why: str) -> None:
        """Learn that no position of the axis may move, and remember the first reason."""
        self.lower(axis, FIXED, why)

    def why_lowered(self, axis: Axis) -> str | None:
        """Return why the first atom of an axis that is of a smaller kind than nothing would say is of that kind."""
        return next((self._why[atom] for atom in atoms_of(self.normal(axis)) if self._why[atom] is not None), None)

    def why_fixed(self, axis: Axis) -> str | None:
        """Return why the first fixed atom of an axis is fixed, None if all are free."""
        return next((self._why[atom] for atom in atoms_of(self.normal(axis)) if self._kind[atom] is FIXED), None)

    def unify(self, x: Axis, y: Axis) -> None:
        """Learn that two axes of one size are always relabelled alike."""
        if self.size(x) != self.size(y):
            raise ValueError(f"axes of {self.size(x)} and {self.size(y)} positions cannot be one.")
        while True:
            x, y = self.normal(x), self.normal(y)
            if x == y:
                return
            if self.is_fixed(x) or self.is_fixed(y):
                why = self.why_fixed(x) if self.is_fixed(x) else self.why_fixed(y)
                self.fix(x, why or "")
                self.fix(y, why or "")
                self._identify_fixed(x, y)
                return
            i = next(i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t)
            if not self._refine(x[i], y[i]):
                self.fix(x[i:], MISALIGNED)
                self.fix(y[i:], MISALIGNED)
                return

    def _refine(self, s: tuple[Any, ...], t: tuple[Any, ...]) -> bool:
        """Take one step that makes two different segments more alike; False if there is none."""
        size_s, size_t = self._segment_size(s), self._segment_size(t)
        if size_s > size_t:
            return self._cut_segment(s, size_t)
        if size_s < size_t:
            return self._cut_segment(t, size_s)
        f, g = next((f, g) for f, g in zip(s, t, strict=False) if f != g)
        size_f, size_g = self._segment_size((f,)), self._segment_size((g,))
        if size_f == size_g:
            return self._equate(f, g)
        if size_f < size_g:
            f, size_f, g, size_g = g, size_g, f, size_f
        if size_f % size_g or not isinstance(f, int):
            return False
        self._split_atom(f, size_g)
        return True

    def _equate(self, f: Any, g: Any) -> bool:
        if isinstance(f, int) and isinstance(g, int):
            # The older atom keeps its number: a family that became its own member would never settle.
            f, g = max(f, g), min(f, g)
            self.lower(((g,),), self._kind[f], self._why[f])
            self._batch.update({g} if f in self._batch else ())
            self._define(f, ((g,),))
        elif isinstance(f, int):
            self._become(f, g)
        elif isinstance(g, int):
            self._become(g, f)
        else:
            self.unify(f, g)
            return self.normal(f) == self.normal(g)
        return True

    def _become(self, atom: int, axis: Axis) -> None:
        self.lower(axis, self._kind[atom], self._why[atom])
        self._define(atom, axis)

    def _cut_segment(self, segment: tuple[Any, ...], position: int) -> bool:
        first, rest = segment[0], self._segment_size(segment[1:])
        if position % rest:
            return False
        size, known = self._size[first], (self._kind[first], self._why[first])  # a normal segment begins with an atom
        num = position // rest
        self._define(first, self._new(num, *known) + self._new(size - num, *known))
        return True

    def _define(self, atom: int, axis: Axis) -> None:
        self._meaning[atom] = axis
        self._normal.clear()

    def _identify_fixed(self, x: Axis, y: Axis) -> None:
        """Give fixed atoms of equal place and size one name, so that families over them are one family."""
        if len(x) == len(y) == 1:
            for f, g in zip(x[0], y[0], strict=False):
                if not (isinstance(f, int) and isinstance(g, int) and self._size[f] == self._size[g]):
                    return
                if MISALIGNED in (self._why[f], self._why[g]):
                    continue  # A misaligned atom may stand for the same positions in another order.
                if f != g and f not in self._meaning and g not in self._meaning:
                    self._batch.update({g} if f in self._batch else ())
                    self._define(f, ((g,),))

    # ---------------------------------------------------------------- families

    def member(self, axis: Axis, over: Axis, index: int) -> Axis:
        """Return how ``axis`` is relabelled at one index of the axis ``over``, which becomes fixed."""
        self.fix(over, "indexed")
        axis, over = self.normal(axis), self.normal(over)
        if len(over) != 1 or not all(isinstance(p, int) for p in over[0]):
            return axis
        for i, p in enumerate(over[0]):
            axis = self._member_axis(axis, p, index // self._segment_size(over[0][i + 1 :]) % self._size[p])
        return axis

    def _member_axis(self, axis: Axis, p: int, index: int) -> Axis:
        return tuple(tuple(self._member_factor(factor, p, index) for factor in segment) for segment in axis)

    def _member_factor(self, factor: Any, p: int, index: int) -> Any:
        if not isinstance(factor, int):
            return self._member_axis(factor, p, index)
        if self._kind[factor] is FIXED:
            return factor
        key = (factor, p, index)
        if key not in self._member:
            self._member[key] = self._new(self._size[factor], self._kind[factor], self._why[factor])[0][0]
        return self._member[key]

    def family(self, over: Axis, axes: Sequence[Axis]) -> Axis:
        """Return the axis that is relabelled like ``axes[i]`` at index ``i`` of the fixed axis ``over``."""
        first = self.normal(axes[0])
        if all(self.normal(axis) == first for axis in axes):
            return first
        family = self.free(self.size(first))
        for index, axis in enumerate(axes):
            self.unify(self.member(family, over, index), axis)
        return family

    def join_members(self, axis: Axis) -> None:
        """Learn that an axis is relabelled alike at every index that it was looked at."""
        for key in [key for key in self._member if ((key[0],),) == self.normal(((key[0],),))]:
            if key in self._member and key[0] in atoms_of(self.normal(axis)):
                self.unify(((key[0],),), ((self._member.pop(key),),))

    def settle(self, tensors: Iterable[Tensor]) -> set[Tensor]:
        """Decide which families may differ by member, and return the distinct tensors in their final form.

        A family may differ only if every tensor that holds it also says at which index: if not, its members are one.
        """
        shown = set(tensors)
        while True:
            self._rekey_members()
            shown = {tuple(map(self.normal, tensor)) for tensor in shown}
            lost = self._undetermined_families(shown)
            if not lost:
                break
            for key in [key for key in self._member if key[0] in lost]:
                self.unify(((key[0],),), ((self._member.pop(key),),))
        for family, over in {key[:2] for key in self._member}:
            for index in range(self._size[over]):
                self._member_factor(family, over, index)
        self._lower_members()
        for atom, (size, kind) in enumerate(zip(self._size, self._kind, strict=True)):
            if size == 2 and kind is ORTHOGONAL_ONES:  # two units that keep their sum can but change places
                self._kind[atom] = PERMUTATION
        return shown

    def _lower_members(self) -> None:
        """Lower each member of a family to the family's kind, which says what may be done at every index."""
        changed = True
        while changed:
            changed = False
            for (family, _, _), member in self._member.items():
                for atom in atoms_of(self.normal(((member,),))):
                    before = self._kind[atom]
                    self.lower(((atom,),), self._kind[family], self._why[family])
                    changed |= self._kind[atom] is not before

    def _rekey_members(self) -> None:
        """Express members by what their family and index axis have become since."""
        changed = True
        while changed:
            changed = False
            for key in list(self._member):
                family, over = self.normal(((key[0],),)), self.normal(((key[1],),))
                if family == ((key[0],),) and over == ((key[1],),) and self.is_free_atom(key[0]):
                    continue
                self.unify(((self._member.pop(key),),), self.member(family, over, key[2]))
                changed = True

    def _undetermined_families(self, tensors: set[Tensor]) -> set[int]:
        over: dict[int, int] = {}
        # A family may be indexed along one axis only.
        lost = {family for family, p, _ in self._member if over.setdefault(family, p) != p}
        families = self.families()
        for tensor in tensors:
            for part in expand(tensor, families, but=lost, partly=True):
                lost |= {q for q, determined in co_occurrences(part) if q in over and over[q] not in determined}
        return lost

    def families(self) -> Families:
        """Return the families with their index axis and their member at each index."""
        table: Families = {}
        for (family, over, index), member in self._member.items():
            if family not in table:
                table[family] = (over, [self.free(self._size[family])] * self._size[over])
            if table[family][0] == over:  # else it is indexed along two axes, and will not stay a family
                table[family][1][index] = self.normal(((member,),))
        return table


def atoms_of(axis: Axis) -> Iterator[int]:
    """Yield each atom of an axis, left to right, as often as it occurs."""
    for segment in axis:
        for factor in segment:
            if isinstance(factor, int):
                yield factor
            elif isinstance(factor, tuple):
                yield from atoms_of(factor)


def expand(tensor: Tensor, families: Families, *, but: Collection[int] = (), partly: bool = False) -> Iterator[Tensor]:
    """Yield the tensor at each index of the axes that its families are indexed by.

    Args:
        tensor: The axes.
        families: What to expand.
        but: Families that stay; may grow while the tensors are read.
        partly: Yield also what is still to be expanded, before its expansion.
    """
    if partly:
        yield tensor
    family = next((a for axis in tensor for a in atoms_of(axis) if a in families and a not in but), None)
    if family is None:
        if not partly:
            yield tensor
        return
    over, members = families[family]
    for index in range(len(members)):
        here: dict[int, Any] = {q: at[index] for q, (p, at) in families.items() if p == over and q not in but}
        here[over] = At(len(members), index)
        part = tuple(_substitute(axis, here) for axis in tensor)
        yield from expand(part, families, but=but, partly=partly)


def _substitute(axis: Axis, values: dict[int, Any]) -> Axis:
    """Replace atoms by factors; a factor that is one product is spliced in."""
    segments = []
    for segment in axis:
        factors: list[Any] = []
        for factor in segment:
            new = values.get(factor, factor) if isinstance(factor, int) else factor
            if new is factor and isinstance(factor, tuple):
                new = _substitute(factor, values)
            if isinstance(new, tuple) and len(new) == 1:
                factors.extend(new[0])
            else:
                factors.append(new)
        segments.append(tuple(factors))
    return tuple(segments)


def co_occurrences(tensor: Tensor) -> Iterator[tuple[int, set[int]]]:
    """Yield each atom of a tensor with the atoms whose index a position of it also determines.

    Those are the other factors of its own product, and atoms that occur exactly once in the other axes as a factor of
    a whole axis. A factor of its own product is none if another axis holds it alone: where two axes were found to act
    alike, nothing tells any more which of them it was that this atom varied with. An atom that occurs twice is yielded
    twice.
    """
    whole = [[f for f in axis[0] if isinstance(f, int)] if len(axis) == 1 else [] for axis in tensor]
    held = [set(atoms_of(axis)) for axis in tensor]
    for i, axis in enumerate(tensor):
        others = [atom for j, atoms in enumerate(whole) if j != i for atom in atoms]
        outside = {atom for atom in others if others.count(atom) == 1}
        for atom, path in _within(axis, []):
            once = {factor for factor in path if path.count(factor) == 1}
            clear = {factor for factor in once if all(atom in atoms for atoms in held if factor in atoms)}
            yield atom, (clear | (outside - set(path))) - {atom}


def _within(axis: Axis, enclosing: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield each atom of an axis with all factors of its product, those that enclose it included."""
    for segment in axis:
        path = enclosing + [f for f in segment if isinstance(f, int)]
        for factor in segment:
            if isinstance(factor, int):
                yield factor, path
            elif isinstance(factor, tuple):
                yield from _within(factor, path)
