"""What a relabelling is: an element of the group that leaves a model's function as it is, of any kind."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from modeconn.network.weights import named_state
from modeconn.symmetry.axes import Axis
from modeconn.tools import files, provenance
from modeconn.tools.door import checked
from modeconn.tools.register import place_of, register
from modeconn.tools.shown import Shown

_FILE, _OLDER_FILE = "relabelling", "permutation"  # the second when permutations were the only kind
_KINDS: dict[str, type[Relabelling]] = {}


class Symmetries(Protocol):
    """What a relabelling needs of a spec."""

    state: Mapping[str, tuple[Axis, ...]]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter and buffer the spec knows."""
        ...

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError unless the model has parameters and buffers of these names and shapes."""
        ...

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model, the same function, with the weights that relabellings are for."""
        ...

    def to_json(self) -> str:
        """Return the spec as text."""
        ...


class Relabelling(Shown, ABC):
    """A map of a network's parameters and buffers that leaves its function as it is; they form a group.

    `Permutation` is the first kind, `Orthogonal` the second. Another is a subclass with a `kind` of its own, which
    defines `spec`, `relabel`, `inverse`, `after`, `is_identity`, `tensors` and `restore`. All that takes or returns a
    relabelling then takes and returns yours, connections, checkpoints and files included; only what moves single units,
    such as `modeconn.PAM`, asks for one of these two.

    Attributes:
        kind: What files call it; one word for each subclass.
        spec: The symmetries of the architecture that it is of.
    """

    kind: ClassVar[str]
    spec: Symmetries

    made_by: ClassVar[Mapping[str, Any] | None] = None
    """How it was found: call or command, versions, data; on the class nothing."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "kind" in vars(cls):
            register(_KINDS, cls.kind, cls)

    # ---------------------------------------------------------------- what a kind defines

    @abstractmethod
    def relabel(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named parameters and buffers relabelled; names that the spec does not know stay."""

    @abstractmethod
    def inverse(self) -> Self:
        """Return the relabelling that undoes this one."""

    @abstractmethod
    def after(self, first: Self) -> Self:
        """Return the relabelling that makes ``first``, of the same kind and spec, and then this one."""

    @property
    @abstractmethod
    def is_identity(self) -> bool:
        """Whether nothing changes under it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what a file has to hold besides the spec, by name."""

    @classmethod
    @abstractmethod
    def restore(cls, spec: str, tensors: Mapping[str, Tensor]) -> Self:
        """Return the relabelling of these `tensors`, with its spec as JSON (`PermutationSpec.from_json` reads it)."""

    def sources(self, name: str) -> Tensor | None:
        """Return which unit takes each place of a group, ``(N,)``; None where units are mixed or may change sign."""
        return None

    # ---------------------------------------------------------------- what all have

    @checked
    def apply(self, model: nn.Module) -> nn.Module:
        """Return a relabelled copy of ``model``; parameters and saved buffers move, the function stays.

        Raises:
            ValueError: If the model is not of this relabelling's spec.
        """
        return relabelled_copy(self.spec, model, self.relabel)

    def __matmul__(self, other: Relabelling) -> Relabelling:
        """``(p @ q).apply(m)`` equals ``p.apply(q.apply(m))``."""
        if not isinstance(other, Relabelling):
            return NotImplemented
        if (other.spec.state, other.spec.shapes) != (self.spec.state, self.spec.shapes):
            raise ValueError("these relabellings are of different specs, so they cannot be composed.")
        if other.kind == self.kind:
            return self.after(other)
        if not (self.is_identity or other.is_identity):
            raise ValueError(
                f"a {self.kind} and a {other.kind} cannot be composed. Apply one after the other: p.apply(q.apply(m))."
            )
        return self if other.is_identity else other

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the relabelling and its spec to a safetensors file, all or nothing."""
        tensors, about = pack(self)
        files.write(path, _FILE, tensors, {**about, **provenance.entry(self)})

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; a subclass reads its own kind alone.

        Raises:
            ValueError: If the file is no relabelling that modeconn wrote, or one of another kind or one that no
                class that was imported defines.
        """
        with files.opened(path) as (tensors, about):
            if about["kind"] not in (_FILE, _OLDER_FILE):
                raise ValueError(f"{os.fspath(path)!r} is a {about['kind'][:60]}, not a {getattr(cls, 'kind', _FILE)}.")
            found = unpack(tensors, about if about["kind"] == _FILE else {"permutation": about["spec"]})
            if found is None:
                raise ValueError("it says that there is no relabelling in it, so it is damaged. Write it again.")
        if cls is not Relabelling and found.kind != cls.kind:
            raise ValueError(
                f"{os.fspath(path)!r} is of the kind {found.kind}, not {cls.kind}: use {type(found).__name__}.load."
            )
        provenance.keep(found, about.get(provenance.ATTRIBUTE))
        return found


class NotImportedError(ValueError):
    """A file holds a relabelling of a class that nobody imported."""


MOVED = "permutation."
"""Begins the names of a relabelling's tensors in files that hold others, too."""


def pack(relabelling: Relabelling | None, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a relabelling, or that there is none, as a file holds it.

    Args:
        relabelling: What to keep.
        prefix: Begins the names of its tensors.

    Returns:
        Tensors by name, and what belongs into the description, under the name "relabelling".
    """
    if relabelling is None:
        return {}, {"relabelling": None}
    owner = _KINDS[relabelling.kind]
    about = {"kind": relabelling.kind, "class": place_of(owner), "spec": relabelling.spec.to_json()}
    return {f"{prefix}{name}": tensor for name, tensor in relabelling.tensors().items()}, {"relabelling": about}


def unpack(tensors: Mapping[str, Tensor], about: Mapping[str, Any], prefix: str = "") -> Relabelling | None:
    """Invert `pack`, where other tensors may stand beside those with the prefix.

    Raises:
        NotImportedError: If the class of the relabelling was not imported.
        ValueError: If what is kept is no relabelling of that class.
    """
    kept = about["relabelling"] if "relabelling" in about else _older(about)
    if kept is None:
        return None
    if kept["kind"] not in _KINDS:
        owner = f"{kept['class']:.60}"
        raise NotImportedError(
            f"this file holds a relabelling of the kind {kept['kind']!r:.60}, which was {owner} and which nobody "
            f"imported: import {owner.partition(':')[0]} first, on the command line modeconn --import MODULE."
        )
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return _KINDS[kept["kind"]].restore(kept["spec"], own)


def _older(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a description that was written when permutations were the only kind."""
    return None if about["permutation"] is None else {"kind": "permutation", "spec": about["permutation"]}


def relabelled_copy(
    spec: Symmetries, model: nn.Module, relabel: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> nn.Module:
    """Return a copy of ``model`` with what ``relabel`` makes of the parameters and saved buffers that a spec knows.

    Raises:
        ValueError: If the model is not of this spec.
    """
    spec.check_model(model)
    relabelled = spec.prepared(model)
    tensors = dict(named_state(relabelled))
    with torch.no_grad():
        moved = relabel({name: tensors[name] for name in spec.state})
        for name in {id(tensors[name]): name for name in reversed(moved)}.values():  # write each tied tensor once
            tensors[name].copy_(moved[name])
    return relabelled
