"""Proof that a spec is right: every tensor of the graph is relabelled as predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.network.copies import untied_copy
from modeconn.network.weights import named_state
from modeconn.symmetry.axes import Axis
from modeconn.symmetry.explore import example_for, is_unknown
from modeconn.symmetry.export import export, first_line
from modeconn.symmetry.findings import Trace
from modeconn.symmetry.gains import Fold, folded
from modeconn.symmetry.graph import Example
from modeconn.symmetry.groups import Group, NamedPerms, identity_perms, random_perms
from modeconn.symmetry.outputs import Outputs
from modeconn.symmetry.structure import Structure
from modeconn.tools.door import checked, shown
from modeconn.tools.progress import passing_bar
from modeconn.tools.rng import seeded
from modeconn.tools.warn import warn

if TYPE_CHECKING:
    from torch.fx import Node


class Provable(Protocol):
    """A spec, as its proof sees it."""

    structure: Structure
    state: dict[str, tuple[Axis, ...]]
    traces: tuple[Trace, ...]
    outputs: Outputs
    one_path: bool
    untied: bool
    freeze: tuple[str, ...]
    folds: tuple[Fold, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups."""
        ...

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError unless the model has the parameters and shapes that the spec was made for."""
        ...

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model, the same function, of whose weights the groups are."""
        ...

    def with_traces(self, model: nn.Module, example_input: Any = None) -> Provable:
        """Return the same spec with the exported graphs behind it."""
        ...


_PATHS, _RELABELLINGS = 3, 8
"""How often weights are redrawn for a recorded run, and how many relabellings of it are compared."""

_REDRAWN = 8
"""How many other weights are drawn where a tensor holds nothing, since values choose no entry for it."""


class VerificationError(ValueError):
    """A relabelling changed a tensor in another way than predicted: the spec is wrong for this model."""


class OtherPathError(VerificationError):
    """The model fails on other weights."""


@checked
def verify(
    spec: Provable, model: nn.Module, example_input: Any = None, *, tolerance: float = 1e-9, seed: int = 0
) -> float:
    """Prove a spec on a model: compare every tensor of its graphs with its predicted relabelling.

    All groups are relabelled at once, a few times, until every place has had another unit, and another one than in any
    other group of that size. Parameters and buffers are redrawn in float64, so that nothing is hidden by zeros or equal
    values; both modes run, without dropout; integers and truth values must agree exactly.

    Args:
        spec: A `modeconn.PermutationSpec`; for one that was loaded from a file, the model is exported anew.
        model: The model the spec was made for.
        example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            Default: ``model.example_input()``, where the model has that method.
        tolerance: Largest difference of any entry, relative to the standard deviation of its tensor. A mistake shows as
            differences near 1, rounding as 1e-15.
        seed: For the redrawn values and the relabelling.

    Returns:
        The largest relative difference met.

    Raises:
        VerificationError: With the first tensor that disagrees and the group behind it; or if the model fails, or makes
            nothing but NaN, on redrawn weights, so that nothing can be proved.
        ValueError: If the model is not the one the spec was found for, or has other groups on inputs of such a shape.
    """
    if not callable(getattr(spec, "with_traces", None)):
        raise ValueError(f"spec must be a modeconn.PermutationSpec, as discover returns, got {shown('spec', spec)}.")
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got tolerance={tolerance}.")
    spec.check_model(model)
    given = example_for(model, example_input)
    spec = spec.with_traces(model, given)
    model = untied_copy(model) if spec.untied else model
    traces = spec.traces
    check_function(spec, model, given)
    if spec.one_path:
        _check_path(spec, model, given)
    _check_outputs(spec)
    generator = torch.Generator().manual_seed(seed)
    if spec.one_path:
        return _worst_of_one_path(spec, model, _as_given(given.to("cpu")), tolerance, seed)
    _check_folding(spec, model, in_double(given.to("cpu")), generator, tolerance, seed)
    proof = _Proof(spec, redraw_folded(spec, model, generator), in_double(given.to("cpu")), seed)
    worst = 0.0
    for number, perms in enumerate(telling_relabellings(spec.groups, generator), 1):
        worst = max(worst, *(proof.worst(trace, perms, tolerance, f"relabelling {number}") for trace in traces))
    empty = proof.empty
    for number in range(1, _REDRAWN + 1):  # other weights choose other entries
        if not empty:
            break
        again = replace(proof, state=redraw_folded(spec, model, generator), empty=set())
        perms = random_perms(spec.groups, generator)
        worst = max(worst, *(again.worst(trace, perms, tolerance, f"other weights {number}") for trace in traces))
        empty &= again.empty
    if empty:
        warn(
            f"{len(empty)} tensors hold nothing on this example, such as {min(empty)!r}, so that nothing of "
            f"them was compared: values choose no entry for them. Pass an example_input of more examples."
        )
    return worst


def _worst_of_one_path(spec: Provable, model: nn.Module, example: Example, tolerance: float, seed: int) -> float:
    """Prove the operators of one run, on redrawn weights where they can do it, else on the model's own."""
    generator = torch.Generator().manual_seed(seed)
    perms = list(islice(telling_relabellings(spec.groups, generator), _RELABELLINGS))
    for number in range(_PATHS + 1):
        is_last = number == _PATHS
        state = own_state(spec.prepared(model)) if is_last else redraw_folded(spec, model, generator)
        proof = _Proof(spec, state, example, seed)
        try:
            worst = max(proof.worst(t, p, tolerance, "one path") for p in perms for t in spec.traces)
        except OtherPathError as error:
            if is_last:
                raise VerificationError(str(error)) from error
            continue
        if is_last:
            warn(
                "the recorded run cannot be repeated on redrawn weights, which take another path: the groups were "
                "compared on the model's own weights, where zeros and equal values may hide something."
            )
        return worst
    raise AssertionError("not reached")


def _as_given(example: Example) -> Example:
    """Return inputs in float64 with the values that they have, by which they take their path."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(torch.complex128) if leaf.is_complex() else leaf.double() if leaf.is_floating_point() else leaf

    return Example(*pytree.tree_map(widen, (example.args, example.kwargs)))


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers as they are, in float64 on the CPU."""
    saved = set(model.state_dict(keep_vars=True))
    tensors = {name: tensor.detach().cpu() for name, tensor in named_state(model) if name in saved}
    return {name: x.double() if x.is_floating_point() else x.clone() for name, x in tensors.items()}


def check_function(spec: Provable, model: nn.Module, example: Example) -> None:
    """Raise a ValueError unless the graphs are those of this model: found in it, or the same as its own."""
    graphs = [trace.graph for trace in spec.traces if trace.model() is not model]
    written = {name for graph in graphs for name in graph.written_state}
    for graph in graphs:
        own = export(model, example, training=graph.training, outputs=spec.outputs, freeze=spec.freeze)
        if not own.is_like(graph, written):
            raise ValueError(
                f"this spec is of another model: {type(model).__name__} does not compute what the model does in which "
                f"the spec was found. Call discover on it."
            )


def _check_path(spec: Provable, model: nn.Module, example: Example) -> None:
    """Raise a VerificationError unless a model does on these inputs what was recorded of it."""
    for graph in (trace.graph for trace in spec.traces if trace.model() is model):
        own = export(model, example, training=graph.training, outputs=spec.outputs, freeze=spec.freeze)
        if not own.is_like(graph, set(graph.written_state)):
            raise VerificationError(
                f"on this example_input {type(model).__name__} takes another path than in the run that was recorded, "
                f"for which alone this spec holds. Pass inputs of that path, or call discover with these."
            )


def _check_outputs(spec: Provable) -> None:
    """Raise a VerificationError if an output that counts moves: then all may be as predicted, and the function not."""
    for trace in spec.traces:
        for node in trace.graph.nodes:
            axes = trace.axes.get(node)
            if node.name in trace.graph.outputs and isinstance(axes, tuple):
                moving = {atom for axis in axes for atom in spec.structure.moving_atoms(axis)}
                names = ", ".join(f"'{group.name}'" for group in spec.groups if group.atom in moving)
                if moving:
                    name = trace.graph.outputs[node.name]
                    what = f"the output {name!r}" if name else "the output"
                    raise VerificationError(
                        f"relabelling group {names} changes the function: in {trace.graph.mode} mode it moves {what}."
                    )


def telling_relabellings(groups: Sequence[Group], generator: torch.Generator) -> Iterator[NamedPerms]:
    """Draw relabellings until every place has had another unit, and another one than in any other group of that size.

    Rotations are drawn at random each time. The first permutation is, too. One in three such moves every unit of a
    group, and few tell all pairs of groups apart at all places; so what is missing is made. Blocks are told apart in
    the same way as groups.
    """
    # By size: for each group or block and each place, a number that encodes all units it has had.
    seen: dict[int, Tensor] = {}
    turning = [group for group in groups if group.rotates]
    moving = [group for group in groups if not group.rotates]
    by_size = {size: [group for group in moving if group.size == size] for size in {group.size for group in moving}}
    open_sizes = set(by_size)
    perms = random_perms(groups, generator)
    for digit in count():
        yield perms
        for size in sorted(open_sizes):
            rows = torch.cat([perms[group.name].view(-1, size) for group in by_size[size]])
            rows = torch.cat([rows, torch.arange(size)[None]])  # the identity, from which all must differ
            seen[size] = seen.get(size, 0) * size + rows
            if bool((seen[size].sort(0).values.diff(dim=0) != 0).all()):
                open_sizes.remove(size)  # a number that went on growing would no longer fit
        if not open_sizes:
            return
        perms = _turned_apart(by_size, generator, digit) | random_perms(turning, generator)


def _turned_apart(by_size: Mapping[int, Sequence[Group]], generator: torch.Generator, digit: int) -> NamedPerms:
    """Return a relabelling that turns all groups and blocks of one size along one random circle.

    The k-th is turned by that digit of k = 1, 2, ... in the number system of its size. No two have all digits alike;
    after the last one, the first comes again.
    """
    perms: NamedPerms = {}
    for size, groups in by_size.items():
        counts = [math.prod(group.shape[:-1]) for group in groups]
        num_digits = next(n for n in count(1) if size**n > sum(counts))
        turns = torch.arange(1, sum(counts) + 1) // size ** (digit % num_digits) % size
        circle = torch.randperm(size, generator=generator)
        rows = circle[(circle.argsort() + turns[:, None]) % size]
        perms |= {g.name: part.view(g.shape) for g, part in zip(groups, rows.split(counts), strict=True)}
    return perms


def _check_folding(
    spec: Provable, model: nn.Module, example: Example, generator: torch.Generator, tolerance: float, seed: int
) -> None:
    """Raise a VerificationError if a network with redrawn gains and biases and its folded twin differ in an output."""
    if not spec.folds:
        return
    state = redraw_state(model, generator)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    changed = dict(folded({name: state[name] for name in first.values()}, spec.folds))
    twin = {name: changed.get(first[id(tensor)], tensor) for name, tensor in state.items()}
    for trace in spec.traces:
        runs = [trace.graph.run(tensors, example, dtype=torch.float64) for tensors in (state, twin)]
        for number in range(len(trace.graph.nodes)):
            node, x, y = _next(*runs, seed + number)
            if node is None:
                break
            if node.name in trace.graph.outputs and isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                error = _relative(x, y, 0.0)
                if not error <= tolerance:
                    raise VerificationError(
                        f"folding the gains changes the function: in {trace.graph.mode} mode tensor '{node.name}' "
                        f"differs by {error:.1e} standard deviations."
                    )


def redraw_folded(spec: Provable, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return redrawn parameters and buffers, but for gains that are ones in the networks that the groups are of."""
    state = redraw_state(model, generator)
    for fold in spec.folds:
        state[fold.gain].fill_(fold.neutral)  # in place: it may have other names
    return state


def redraw_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return float64 parameters and floating buffers with generic values: matrices of unit gain, vectors in [0.5, 1.5].

    Values a model starts with hide mistakes: zero scales, equal biases, unit variances.
    """
    drawn: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    saved = set(model.state_dict(keep_vars=True))
    for name, tensor in named_state(model):
        if name not in saved:
            continue
        if id(tensor) not in drawn:
            drawn[id(tensor)] = _redraw(tensor, generator)
        state[name] = drawn[id(tensor)]
    return state


def _redraw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor.cpu().clone()
    if tensor.is_complex():
        parts = torch.randn((*tensor.shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(parts) / math.sqrt(2 * _fan_in(tensor))
    if tensor.dim() < 2:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    if not tensor.is_meta and bool((tensor >= 0).all()):  # such as variances, of which a root may be taken
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).abs() / math.sqrt(_fan_in(tensor))
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(_fan_in(tensor))


def _fan_in(tensor: Tensor) -> int:
    return max(math.prod(tensor.shape[1:]), 1)


@dataclass(frozen=True)
class _Proof:
    """What a spec is proved with.

    Args:
        spec: The spec.
        state: Redrawn parameters and buffers, in float64.
        example: Inputs, in float64.
        seed: For random numbers that the model draws.
    """

    spec: Provable
    state: dict[str, Tensor]
    example: Example
    seed: int
    empty: set[str] = field(default_factory=set)

    def worst(self, trace: Trace, perms: NamedPerms, tolerance: float, label: str) -> float:
        """Return the largest difference in one mode.

        Raises:
            VerificationError: If it is above the tolerance.
        """
        worst, told = 0.0, {"desc": f"verify, {trace.graph.mode} mode, {label}", "unit": "operator"}
        for name, error in passing_bar(self.differences(trace, perms), total=len(trace.graph.nodes), **told):
            if not error <= tolerance:
                raise VerificationError(self.blame(trace, perms, name, error, tolerance))
            worst = max(worst, error)
        return worst

    def differences(self, trace: Trace, perms: NamedPerms) -> Iterator[tuple[str, float]]:
        """Run the model and its relabelled twin node by node; yield each node's name and relative difference.

        The twin then goes on from the prediction, so that every operator is judged on exact inputs: rounding does not
        add up, and deep networks that amplify it need no wider tolerance.
        """
        structure = self.spec.structure
        by_atom = {group.atom: perms[group.name] for group in self.spec.groups}
        example = (self.example.with_batch_of_two() if trace.graph.free_batch else None) or self.example
        twin_state = structure.relabel_all(self.state, self.spec.state, by_atom)
        plain, moved = (trace.graph.run(x, example, dtype=torch.float64) for x in (self.state, twin_state))
        largest: dict[Any, float] = {}
        for number in range(len(trace.graph.nodes)):
            node, value, twin = _next(plain, moved, self.seed + number)
            if node is None:
                return
            largest[node] = 0.0
            scale = max((largest[source] for source in node.all_input_nodes), default=0.0)
            for x, y, axes in _tensors(value, twin, trace.axes.get(node)):
                if x.shape != y.shape:  # as many as values say, which have changed
                    yield node.name, math.inf
                    return
                if not x.numel():
                    if any(is_unknown(size) for size in getattr(node.meta.get("val"), "shape", ())):
                        self.empty.add(node.name)
                    continue
                expected, is_inexact = structure.relabel(x, axes, by_atom), x.is_floating_point() or x.is_complex()
                if is_inexact:
                    largest[node] = max(largest[node], _size(node, x))
                if torch.equal(expected, y):
                    yield node.name, 0.0
                else:
                    yield node.name, _relative(expected, y, scale) if is_inexact else math.inf
                    _overwrite(y, expected)

    def blame(self, trace: Trace, perms: NamedPerms, name: str, error: float, tolerance: float) -> str:
        """Move the groups at the first wrong tensor one at a time to find those behind it."""
        identity, guilty = identity_perms(self.spec.groups), []
        for group in self._groups_at(trace, name):
            alone = {**identity, group.name: perms[group.name]}
            if any(not e <= tolerance for _, e in self.differences(trace, alone)):
                guilty.append(f"'{group.name}'")
        who = f"group {', '.join(guilty)}" if guilty else "several groups together"
        return (
            f"relabelling {who} changes the function: in {trace.graph.mode} mode tensor '{name}' differs from its "
            f"prediction by {error:.1e} standard deviations."
        )

    def _groups_at(self, trace: Trace, name: str) -> Iterator[Group]:
        """Yield the groups that move the tensor called ``name`` or one that it is computed from."""
        node = next(node for node in trace.graph.nodes if node.name == name)
        moving: set[int] = set()
        for axes in pytree.tree_leaves([trace.axes.get(n) for n in (node, *node.all_input_nodes)], is_leaf=_is_tensor):
            if axes is not None:
                moving |= {atom for axis in axes for atom in self.spec.structure.moving_atoms(axis)}
        yield from (group for group in self.spec.groups if group.atom in moving)


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write values to a tensor, each place in memory once: an expanded one has equal entries in one place."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def _next(plain: Iterator[Any], moved: Iterator[Any], seed: int) -> tuple[Node | None, Any, Any]:
    """Return what the next node makes in the model and in its twin, drawing the same random numbers."""
    values = []
    for run in (plain, moved):
        with seeded(seed):
            try:
                node, value = next(run, (None, None))
            except Exception as error:
                raise OtherPathError(
                    f"the spec cannot be proved: on redrawn weights the model fails with {first_line(error)}"
                ) from error
        values.append(value)
    return node, *values


def _size(node: Node, x: Tensor) -> float:
    """Return the largest entry; two tensors that are NaN from end to end agree, and prove nothing."""
    size = float(x.abs().max())
    if math.isnan(size) and bool(x.isnan().all()):
        raise VerificationError(
            f"the spec cannot be proved: on redrawn weights tensor '{node.name}' is NaN. Roots and logarithms of "
            f"weights that may be negative do that."
        )
    return 0.0 if math.isnan(size) else size


def _tensors(x: Any, y: Any, axes: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
    if isinstance(x, Tensor) and axes is not None:
        yield x, y, axes
    elif isinstance(x, (list, tuple)) and isinstance(axes, list):
        for triple in zip(x, y, axes, strict=False):
            yield from _tensors(*triple)


def _relative(expected: Tensor, actual: Tensor, scale: float) -> float:
    """Return the largest difference in standard deviations of the tensor; infinite values must be the same.

    A tensor of equal entries is measured against its own size. One that hardly varies is measured against a thousandth
    of its size, whose rounding it holds: the mean square of what was normalised before; and against ``scale``, the size
    of what it was computed from: the mean of something centred is nothing but rounding.
    """
    difference = float((expected - actual).abs().max())
    if not math.isfinite(difference):
        finite = torch.isfinite(expected.abs())
        if not torch.equal(finite, torch.isfinite(actual.abs())):
            return math.inf
        expected, actual = expected[finite], actual[finite]
        difference = float((expected - actual).abs().max()) if expected.numel() else 0.0
    if not difference:
        return 0.0
    size = float(expected.abs().max())
    spread = float(expected.std()) if expected.numel() > 1 else 0.0
    spread = max(spread, 1e-3 * size) if spread > 1e-9 * size else size
    return difference / max(spread, 1e-6 * scale, 1e-300)


def _is_tensor(axes: Any) -> bool:
    return isinstance(axes, tuple)


def in_double(example: Example) -> Example:
    """Return inputs in double precision; those on the meta device get values."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf if leaf.layout is torch.strided else leaf.to_dense()
        if leaf.device.type == "meta":
            leaf = (
                torch.rand(leaf.shape).to(leaf.dtype)
                if leaf.is_floating_point()
                else torch.zeros_like(leaf, device="cpu")
            )
        if not leaf.is_floating_point():
            return leaf.to(torch.complex128) if leaf.is_complex() else leaf.clone()
        # An example with odd values says nothing against the spec.
        leaf = torch.where(leaf.isfinite(), leaf, 0).double()
        noise = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if not leaf.any():
            return noise  # An example of zeros would hide mistakes.
        if not (leaf != leaf.flatten()[0]).any():
            return leaf * (1 - noise / 2)
        # Keep the values in the range of the example, which may hold probabilities.
        return torch.lerp(leaf, leaf.mean(), noise / 2)

    return Example(*pytree.tree_map(convert, (example.args, example.kwargs)))
