"""Which of a model's outputs count: what nobody reads, such as a cache, need not stay as it is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

Selection = str | int | tuple[str | int, ...] | list[str | int] | Callable[[Any], Any] | None
"""Names of outputs, positions in a tuple of them, or a function of what the model returns."""


@dataclass(frozen=True)
class Outputs:
    """The outputs that count.

    Args:
        names: Their names or positions, in their order; empty for all of them.
        function: What returns them in place of names.
        place: Where that function comes from, ``module:name``.
    """

    names: tuple[str | int, ...] = ()
    function: Callable[[Any], Any] | None = None
    place: str = ""

    @classmethod
    def of(cls, selection: Selection | Outputs) -> Outputs:
        """Return what a user passes as ``outputs=`` in this form.

        Raises:
            ValueError: If it is nothing that selects outputs.
        """
        if selection is None or isinstance(selection, Outputs):
            return selection or cls()
        names = selection if isinstance(selection, (tuple, list)) else (selection,)
        if names and all(isinstance(name, (str, int)) and not isinstance(name, bool) for name in names):
            return cls(names=tuple(names))
        if callable(selection):
            named = selection if hasattr(selection, "__qualname__") else type(selection)
            return cls(function=selection, place=f"{named.__module__}:{named.__qualname__}")
        raise ValueError(
            f"outputs must be the name of an output, its position, several of these, or a function of what the model "
            f"returns, got outputs={selection!r:.60}."
        )

    def __reduce__(self) -> Any:
        """Let a function travel by reference, and one that has no name by which it is found by its place alone."""
        named: Any = sys.modules.get(self.place.partition(":")[0])
        for part in self.place.partition(":")[2].split("."):
            named = getattr(named, part, None)
        return Outputs, (self.names, self.function if named is self.function else None, self.place)

    @property
    def are_all(self) -> bool:
        """Whether every output counts."""
        return not (self.names or self.place)

    def __call__(self, returned: Any) -> Any:
        """Return what counts of what a model returned.

        Raises:
            ValueError: If it has no such output, or the function is not known here.
        """
        if self.are_all:
            return returned
        self.check_known()
        if self.function is not None:
            return self.function(returned)
        if len(self.names) == 1:
            return _part(returned, self.names[0])
        return {str(name): _part(returned, name) for name in self.names}

    def check_known(self) -> None:
        """Raise a ValueError if they are those of a function that is not known here."""
        if self.place and self.function is None:
            raise ValueError(
                f"the saved spec was found with outputs={self.place}, and files hold no functions. Pass "
                f"PermutationSpec.load(path, outputs=), what discover was given."
            )

    def to_plain(self) -> Any:
        """Return what a file holds: names, or the place of a function."""
        return self.place or list(self.names)

    @classmethod
    def from_plain(cls, kept: Any) -> Outputs:
        """Invert `to_plain`; a function is not called, and has to be given again."""
        return cls(place=kept) if isinstance(kept, str) else cls.of(kept or None)


def _part(returned: Any, name: str | int) -> Any:
    """Return one output by its name or position."""
    try:
        if isinstance(returned, Mapping) or isinstance(name, int):
            return returned[name]
        return getattr(returned, name)
    except (AttributeError, LookupError, TypeError):
        known = ", ".join(map(repr, _names(returned))) or f"one {type(returned).__name__}"
        raise ValueError(f"the model has no output {name!r}, which outputs= asks for; it returns {known}.") from None


def _names(returned: Any) -> list[Any]:
    if isinstance(returned, Mapping):
        return list(returned)
    if hasattr(returned, "_fields"):
        return list(returned._fields)
    if isinstance(returned, (tuple, list)):
        return list(range(len(returned)))
    return list(getattr(returned, "__dataclass_fields__", ()))


def leaf_names(structure: pytree.TreeSpec) -> Iterator[str]:
    """Yield the name of each leaf of the outputs, such as ``past_key_values[0]``; "" for a lone one."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(structure.num_leaves), structure))
    for path, _ in paths:
        yield re.sub(r"^\['(\w+)'\]", r"\1", pytree.keystr(path))
