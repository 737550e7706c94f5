"""Proof that a spec is right: every tensor of the graph is relabelled as predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.rng import seeded
from modeconn.symmetry.graph import Example
from modeconn.symmetry.permutation import Permutation
from modeconn.symmetry.spec import Group, PermutationSpec, Trace, VerificationError


def verify(spec: PermutationSpec, model: nn.Module, example_input: Any, *, tolerance: float, seed: int) -> float:
    """See `PermutationSpec.verify`."""
    from modeconn.symmetry.discover import example_for, traces_of

    spec.check_model(model)
    example = _float64(example_for(model, example_input).to("cpu"))
    generator = torch.Generator().manual_seed(seed)
    state = redraw_state(model, generator)
    worst = 0.0
    for permutation in telling_relabellings(spec, generator):
        for trace in traces_of(spec, model, example_input):
            for name, error in _differences(spec, trace, state, permutation, example, seed):
                if not error <= tolerance:
                    message = _blame(spec, trace, state, permutation, example, tolerance, seed, name, error)
                    raise VerificationError(message)
                worst = max(worst, error)
    return worst


def telling_relabellings(spec: PermutationSpec, generator: torch.Generator) -> Iterator[Permutation]:
    """Draw relabellings until every group has moved and any two of equal size have moved differently.

    One is enough for groups of a dozen units. But of two units every second drawing moves none, and two such groups
    that can only move alike do so in every second drawing. The blocks of a group are told apart in the same way.
    """
    seen: dict[int, Tensor] = {}  # by size: a row for each group or block, where all drawings so far have sent it
    while True:
        permutation = spec.random(generator)
        yield permutation
        for size in {group.size for group in spec.groups}:
            rows = [permutation.perms[group.name].view(-1, size) for group in spec.groups if group.size == size]
            seen[size] = torch.cat([*([seen[size]] if size in seen else []), torch.cat(rows)], 1)
        if not any(_confused(rows, size) for size, rows in seen.items()):
            return


def _confused(rows: Tensor, size: int) -> bool:
    """Return whether a row never moved, or two always moved alike."""
    stay = torch.arange(size).repeat(1, rows.shape[1] // size)
    return len(torch.cat([rows, stay]).unique(dim=0)) <= len(rows)


def redraw_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return float64 parameters and floating buffers with generic values: matrices of unit gain, vectors in [0.5, 1.5].

    Values a model starts with hide mistakes: zero scales, equal biases, unit variances.
    """
    drawn: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    saved = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name not in saved:
            continue
        if id(tensor) not in drawn:
            drawn[id(tensor)] = _redraw(tensor, generator)
        state[name] = drawn[id(tensor)]
    return state


def _redraw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor.cpu().clone()
    if tensor.dim() < 2:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    fan_in = max(math.prod(tensor.shape[1:]), 1)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)


def _differences(
    spec: PermutationSpec, trace: Trace, state: dict[str, Tensor], permutation: Permutation, example: Example, seed: int
) -> Iterator[tuple[str, float]]:
    """Run the model and its relabelled twin node by node; yield each node's name and relative difference.

    The twin then goes on from the prediction, so that every operator is judged on exact inputs: rounding does not add
    up, and deep networks that amplify it need no wider tolerance.
    """
    perms = permutation.by_atom()
    if trace.graph.free_batch:
        example = example.with_batch_of_two() or example
    plain = trace.graph.run(state, example, dtype=torch.float64)
    moved = trace.graph.run(permutation.relabel(state), example, dtype=torch.float64)
    largest: dict[Any, float] = {}
    for number in range(len(trace.graph.nodes)):
        with seeded(seed + number):
            node, value = next(plain, (None, None))
        with seeded(seed + number):
            _, twin = next(moved, (None, None))
        if node is None:
            return
        largest[node] = 0.0
        scale = max((largest[source] for source in node.all_input_nodes), default=0.0)
        for x, y, axes in _tensors(value, twin, trace.axes.get(node)):
            if x.numel() and (x.is_floating_point() or x.is_complex()):
                largest[node] = max(largest[node], float(x.abs().max()))
                expected = spec.structure.relabel(x, axes, perms)
                if torch.equal(expected, y):
                    yield node.name, 0.0
                else:
                    yield node.name, _relative(expected, y, scale)
                    y.copy_(expected)


def _tensors(x: Any, y: Any, axes: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
    if isinstance(x, Tensor) and axes is not None:
        yield x, y, axes
    elif isinstance(x, (list, tuple)) and isinstance(axes, list):
        for triple in zip(x, y, axes, strict=False):
            yield from _tensors(*triple)


def _relative(expected: Tensor, actual: Tensor, scale: float) -> float:
    """Return the largest difference in standard deviations of the tensor; infinite values must be the same.

    A tensor that hardly varies is measured against its own size and ``scale``, the size of what it was computed from:
    the mean of something centred is nothing but rounding.
    """
    difference = float((expected - actual).abs().max())
    if not math.isfinite(difference):
        finite = torch.isfinite(expected.abs())
        if not torch.equal(finite, torch.isfinite(actual.abs())):
            return math.inf
        expected, actual = expected[finite], actual[finite]
        difference = float((expected - actual).abs().max()) if expected.numel() else 0.0
    spread = float(expected.std()) if expected.numel() > 1 else float(expected.abs().sum())  # one number has no spread
    scale = max(scale, float(expected.abs().max())) if expected.numel() else scale
    return difference / max(spread, 1e-6 * scale, 1e-300) if difference else 0.0


def _blame(
    spec: PermutationSpec,
    trace: Trace,
    state: dict[str, Tensor],
    permutation: Permutation,
    example: Example,
    tolerance: float,
    seed: int,
    name: str,
    error: float,
) -> str:
    """Move the groups at the first wrong tensor one at a time to find those behind it."""
    identity = spec.identity().perms
    guilty = []
    for group in _groups_at(spec, trace, name):
        alone = Permutation(spec, {**identity, group.name: permutation.perms[group.name]})
        if any(not e <= tolerance for _, e in _differences(spec, trace, state, alone, example, seed)):
            guilty.append(f"'{group.name}'")
    mode = "train" if trace.graph.training else "eval"
    who = f"group {', '.join(guilty)}" if guilty else "several groups together"
    return (
        f"relabelling {who} changes the function: in {mode} mode tensor '{name}' differs from its prediction by "
        f"{error:.1e} standard deviations."
    )


def _groups_at(spec: PermutationSpec, trace: Trace, name: str) -> Iterator[Group]:
    """Yield the groups that move the tensor called ``name`` or one that it is computed from."""
    node = next(node for node in trace.graph.nodes if node.name == name)
    moving: set[int] = set()
    for axes in pytree.tree_leaves([trace.axes.get(n) for n in (node, *node.all_input_nodes)], is_leaf=_is_tensor):
        if axes is not None:
            moving |= {atom for axis in axes for atom in spec.structure.moving_atoms(axis)}
    yield from (group for group in spec.groups if group.atom in moving)


def _is_tensor(axes: Any) -> bool:
    return isinstance(axes, tuple)


def _float64(example: Example) -> Example:
    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.device.type == "meta":
            leaf = (
                torch.rand(leaf.shape).to(leaf.dtype)
                if leaf.is_floating_point()
                else torch.zeros_like(leaf, device="cpu")
            )
        if not leaf.is_floating_point():
            return leaf.clone()
        noise = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return leaf.double() + noise  # an example of zeros shows nothing

    return Example(*pytree.tree_map(convert, (example.args, example.kwargs)))
