"""The verb: relabel b after a."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from modeconn.matching.activation_matching import ActivationMatching
from modeconn.matching.method import Method, check_data, check_method, correlations
from modeconn.matching.statistics import collect
from modeconn.matching.weight_matching import WeightMatching
from modeconn.network.batches import Opened, check_rereadable, first_batch, inputs_of, is_of_dtypes
from modeconn.network.shares import check_whole
from modeconn.network.weights import WeightSpace, device_of
from modeconn.symmetry.discover import discover
from modeconn.symmetry.export import ExportError
from modeconn.symmetry.graph import InputMismatch
from modeconn.symmetry.kinds import check_symmetries
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import checked
from modeconn.tools.progress import bars
from modeconn.tools.rng import seeded
from modeconn.tools.shown import Shown
from modeconn.tools.table import html_table

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Symmetry:
    """What is known of the symmetries of networks, or how to find them; arguments of `align`.

    Args:
        spec: What was found before, None to discover it.
        example_input: For discovery, in place of a loader's first batch.
        outputs: Which outputs have to stay as they are.
        verify: Whether to prove what is discovered.
        symmetries: The largest kind of group that is looked for.
        untie: Whether tied weights get a tensor for each of their names.
    """

    spec: PermutationSpec | None = None
    example_input: Any = None
    outputs: Selection = None
    verify: bool = True
    symmetries: str = "permutation"
    untie: bool = False

    def __post_init__(self) -> None:
        check_symmetries(self.symmetries)


@dataclass(frozen=True)
class Alignment(Shown):
    """Two networks with their units under the same names.

    Args:
        model_b: b relabelled: a new model, the same function as b.
        permutation: The relabelling: a `Permutation`, an `Orthogonal` where groups rotate, or what a method of your own
            finds. ``permutation.apply(b)`` is ``model_b``.
        model_a: The network that ``model_b`` agrees with: a itself or, where gains were folded, a new model, the same
            function as a. Curves and averages are between the two.
        correlation: Mean correlation of paired units before and after, by group, on the data that was given, if its
            batches are the model's inputs; groups whose units no operator reads by itself are left out.
        constant_units: Units that never change on that data, ``(of a, of b)`` by group; they stay where they can.
        history: The method's objective, step by step, if it has one.
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    model_b: nn.Module
    permutation: Relabelling
    correlation: dict[str, tuple[float, float]] = field(default_factory=dict)
    constant_units: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[float, ...] = ()
    model_a: nn.Module | None = None

    @property
    def spec(self) -> PermutationSpec:
        """The groups that were matched."""
        return self.permutation.spec

    def _repr_html_(self) -> str:
        if not self.correlation:
            return super()._repr_html_()
        rows = [
            [name, f"{before:.3f}", f"{after:.3f}", self._constant(name)]
            for name, (before, after) in self.correlation.items()
        ]
        table = html_table(["group", "correlation before", "after", "constant units"], rows)
        return f"<p><b>Alignment</b>: {html.escape(repr(self.permutation))}</p>{table}"

    def _facts(self) -> dict[str, str]:
        return {"relabelling": repr(self.permutation)}

    def __repr__(self) -> str:
        lines = [f"Alignment({self.permutation!r})"]
        width = max(map(len, self.correlation), default=0)
        for name, (before, after) in self.correlation.items():
            constant = self._constant(name)
            note = f"  constant: {constant}" if constant else ""
            lines.append(f"  {name:{width}}  correlation {before:6.3f} -> {after:6.3f}{note}")
        return "\n".join(lines)

    def _constant(self, name: str) -> str:
        """Say how many units of a group never change; empty if none."""
        counts = zip(self.constant_units.get(name, (0, 0)), "ab", strict=True)
        return ", ".join(f"{count} of {end}" for count, end in counts if count)


@checked
def align(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    method: Method | None = None,
    spec: PermutationSpec | None = None,
    example_input: Any = None,
    outputs: Selection = None,
    verify: bool = True,
    symmetries: str = "permutation",
    untie: bool = False,
    progress: bool = False,
) -> Alignment:
    """Relabel the units of b so that it agrees with a; a stays, b is copied.

    Where groups rotate units (``symmetries="orthogonal"``), both networks are copied with their gains folded first.

    The caller's random state has no part in the result, also where the loader draws from it to shuffle, and stays.

    Args:
        model_a: The reference.
        model_b: A network of the same architecture.
        loader: Training data, ``(inputs, targets)`` batches; targets are read by attacks alone.
        method: How to match. Default: `ActivationMatching` with a loader, `WeightMatching` without.
        spec: What `discover` found for this architecture. Default: it is discovered here.
        example_input: For discovery, where there is neither a loader nor ``model_a.example_input()``.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.
        verify: Prove a newly discovered spec before it is used, see `PermutationSpec.verify`.
        symmetries: "permutation" or "orthogonal": the largest kind of group that is looked for, see
            `modeconn.discover`.
        untie: Give tied weights a tensor for each of their names, see `modeconn.discover`.
        progress: Whether to show progress bars where discovery, proof or matching take more than a second.

    Returns:
        The relabelled b, its permutation, and the correlations before and after. A model without a free group gives
        the identity.

    Raises:
        ValueError: If the networks are of different architectures, hold NaN, or data is missing.

    Example:
        >>> from modeconn import models
        >>> a, b = (models.mlp(64, (16,), 10, seed=s) for s in (1, 2))
        >>> align(a, b).permutation
        Permutation(1 group, 15 of 16 units moved)
    """
    space = WeightSpace(model_a)
    space.check(model_a, name="a")
    space.check(model_b, name="b")
    if method is None:
        method = WeightMatching() if loader is None else ActivationMatching()
    check_method(method)
    check_data(method, loader)
    check_whole(loader)
    data = None if loader is None else Opened(loader, space.device)
    with bars(progress):
        known = Symmetry(spec, example_input, outputs, verify, symmetries, untie)
        return find_alignment(model_a, model_b, data, method, known)


def find_alignment(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Opened | None,
    method: Method,
    known: Symmetry,
) -> Alignment:
    """Do what `align` does for networks that were checked, with data of which one pass has begun."""
    with seeded(0, device_of(model_a)):
        spec = find_spec(model_a, data, known)
        spec.check_model(model_b)  # before the work of matching
        prepared = spec.prepared if spec.prepares else lambda model: model
        model_a, moving = prepared(model_a), prepared(model_b)
        match = method.match(spec, model_a, moving, data)
    correlation = match.correlation
    if not correlation and data is not None:
        with suppress(InputMismatch):  # batches the networks cannot read are fine if the method did not need them
            moments = collect(spec, model_a, moving, data, num_examples_at_most=2_048, before_activation=False)
            correlation = correlations(moments, match.permutation)
    del moving  # a copy of all weights, where gains were folded
    return Alignment(
        model_b=match.permutation.apply(model_b),
        permutation=match.permutation,
        correlation=correlation,
        constant_units=match.constant_units,
        history=match.history,
        model_a=model_a,
    )


def find_spec(model: nn.Module, loader: Iterable[Any] | None, known: Symmetry) -> PermutationSpec:
    """Return the spec that is known, checked, or discover and prove one on the first example at hand.

    The loader is checked in any case. To be used inside one seeded stretch of random numbers, from which it draws.
    """
    if loader is not None and not isinstance(loader, Opened):
        check_rereadable(loader)
    spec = known.spec
    if spec is None:
        first = None if loader is None else inputs_of(first_batch(loader))
        example = known.example_input if known.example_input is not None else first
        is_of_loader = known.example_input is None and first is not None
        spec = _discovered(model, example, known, is_of_loader=is_of_loader)
        if known.verify:
            spec.verify(model, example)
    else:
        for name, default in (("outputs", None), ("symmetries", "permutation"), ("untie", False)):
            if getattr(known, name) != default:
                raise ValueError(f"{name}= is for discovery, and spec= was discovered. Pass it to modeconn.discover.")
        spec.check_model(model)
    if not spec.groups:
        _LOGGER.warning("%s has no group of units that may be relabelled.", type(model).__name__)
    return spec


def _discovered(model: nn.Module, example: Any, known: Symmetry, *, is_of_loader: bool) -> PermutationSpec:
    try:
        return discover(model, example, outputs=known.outputs, symmetries=known.symmetries, untie=known.untie)
    except ExportError:
        raise
    except ValueError as error:
        if not is_of_loader:
            raise
        way_out = (
            " Where batches are not (inputs, targets), pass example_input=, and a method that reads no data, such as "
            "WeightMatching()."
        )
        said = str(error).removesuffix(".")
        way_out = "" if is_of_dtypes(said) else way_out
        raise ValueError(f"{said}. That is the loader's first batch.{way_out}") from error
