"""Second moments of two networks' units, streamed over a data set in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modeconn.network.attack import Attack, attacked_in_eval_mode
from modeconn.network.batches import batches, first_examples, in_order, inputs_and_targets, inputs_of, refused
from modeconn.network.weights import device_of, named_state
from modeconn.symmetry.explore import is_unknown
from modeconn.symmetry.findings import Tap, Trace
from modeconn.symmetry.graph import Example
from modeconn.symmetry.groups import Group
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.rng import seeded
from modeconn.tools.warn import warn

if TYPE_CHECKING:
    from torch.fx import Node

aten = torch.ops.aten
_REDUCTIONS = {
    aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten.mean, aten.sum, aten.amax,
    aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d, aten.avg_pool1d, aten.avg_pool2d,
    aten.avg_pool3d, aten.max_pool1d, aten.max_pool2d, aten.max_pool3d,
}  # fmt: skip
_REARRANGEMENTS = {
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.permute, aten.transpose,
    aten.dropout, aten.dropout_, aten.feature_dropout, aten.contiguous, aten.clone, aten.detach, aten.movedim,
}  # fmt: skip


class Moments:
    """Count, sums and products of the units of two networks, over any number of samples.

    Values are multiplied in their own precision and added up in float64. Where the first samples show a mean far above
    the spread, whose variance would drown in rounding, values are shifted by that mean first.

    Args:
        num_units: ``N``.
    """

    def __init__(self, num_units: int) -> None:
        self.count = 0
        self._shift: tuple[Tensor | None, Tensor | None] | None = None
        self._sums = [torch.zeros(num_units, dtype=torch.float64) for _ in range(2)]
        self._squares = [torch.zeros(num_units, dtype=torch.float64) for _ in range(2)]
        self._products = torch.zeros(num_units, num_units, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples of both networks, ``(L, N, R)``: ``L R`` samples, the same inputs and places for both."""
        if self._shift is None:
            self._to(a.device)
            self._shift = (_far_mean(a), _far_mean(b))
        a, b = (x if shift is None else x - shift[:, None] for x, shift in zip((a, b), self._shift, strict=True))
        self.count += a.shape[0] * a.shape[2]
        for k, x in enumerate((a, b)):
            self._sums[k] += x.sum(2).sum(0, dtype=torch.float64)
            self._squares[k] += torch.linalg.vector_norm(x, dim=2).double().square().sum(0)
        self._products += _products(a, b)

    def _to(self, device: torch.device) -> None:
        self._sums = [x.to(device) for x in self._sums]
        self._squares = [x.to(device) for x in self._squares]
        self._products = self._products.to(device)

    def variances(self) -> tuple[Tensor, Tensor]:
        """Return the variance of each unit of a and of b, ``(N,)`` each."""
        a, b = (q / self.count - (s / self.count) ** 2 for q, s in zip(self._squares, self._sums, strict=True))
        return a.clamp(min=0), b.clamp(min=0)

    def covariance(self) -> Tensor:
        """Return the covariance of each unit of a with each of b, ``(N, N)``."""
        mean_a, mean_b = (s / self.count for s in self._sums)
        return self._products / self.count - torch.outer(mean_a, mean_b)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean of each unit of a and of b, ``(N,)`` each."""
        a, b = (
            s / self.count if shift is None else s / self.count + shift
            for s, shift in zip(self._sums, self._shift, strict=True)
        )
        return a, b

    def constant(self) -> tuple[Tensor, Tensor]:
        """Return which units of a and of b never change, up to rounding: bool ``(N,)`` each."""
        return tuple(v <= 1e-12 * (m**2 + v.max()) for v, m in zip(self.variances(), self.means(), strict=True))

    def correlation(self) -> Tensor:
        """Return Pearson's correlation of each unit of a with each of b, ``(N, N)``; 0 for a constant unit."""
        scale_a, scale_b = (
            torch.where(constant, 0.0, v.clamp(min=1e-300).rsqrt())
            for v, constant in zip(self.variances(), self.constant(), strict=True)
        )
        return self.covariance() * scale_a[:, None] * scale_b[None, :]

    def inner_product(self) -> Tensor:
        """Return the mean product of each unit of a with each of b, not centred, ``(N, N)``."""
        mean_a, mean_b = self.means()
        return self.covariance() + torch.outer(mean_a, mean_b)

    def cosine(self) -> Tensor:
        """Return the mean product over the root mean squares, ``(N, N)``; 0 for a unit that is always 0."""
        scale_a, scale_b = (
            torch.where(power > 0, power.clamp(min=1e-300).rsqrt(), 0.0)
            for power in (v + m**2 for v, m in zip(self.variances(), self.means(), strict=True))
        )
        return self.inner_product() * scale_a[:, None] * scale_b[None, :]


def _far_mean(x: Tensor) -> Tensor | None:
    """Return the mean of each unit over a few samples if that of any is far above its spread."""
    flat = x[:16, :, :256].double().transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(flat, 1, correction=0)
    return mean.to(x.dtype) if bool((mean.square() > 100 * variance + 1e-30).any()) else None


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over samples of the products of units, ``(N, N)`` in float64, for samples ``(L, N, R)``.

    Products of each of the ``L`` parts are formed without a copy of the samples, unless they would be larger than the
    samples themselves.
    """
    length, num_units, rest = a.shape
    if rest >= num_units or length == 1:
        return torch.bmm(a, b.transpose(1, 2)).sum(0, dtype=torch.float64)
    a, b = (x.transpose(0, 1).reshape(num_units, -1) for x in (a, b))
    return (a @ b.T).double()


@dataclass(frozen=True)
class Reading:
    """Which units to read from a tensor of the graph."""

    node: Node
    group: Group


def readings(spec: PermutationSpec, trace: Trace, *, before_activation: bool) -> list[Reading]:
    """Return what to read for each group: every tensor in which its units are summed over, once.

    A tensor that is only averaged over space before (global pooling) is read before that; with ``before_activation``,
    before elementwise functions of it alone (ReLU, GELU) and pooling too.
    """
    groups = {group.atom: group for group in spec.groups}
    found: dict[tuple[Node, int], Reading] = {}
    for tap in trace.taps:
        moving = spec.structure.moving_atoms(tap.axis) & groups.keys()
        blocks = {parent for atom in moving for parent in spec.structure.parents[atom]}
        for atom in sorted(moving - blocks):  # match_groups weighs the evidence of a block's units
            node = _before_pooling(trace, tap, atom, spec)
            if before_activation:
                node = _before_activation(trace, node, atom, spec)
            if node.op != "placeholder" and not _is_chosen_by_values(node):
                found.setdefault((node, atom), Reading(node, groups[atom]))
    return list(found.values())


def _is_chosen_by_values(node: Node) -> bool:
    """Whether a tensor holds as many entries as values say: those of two networks are of different examples."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(map(is_unknown, value.shape))


def _before_pooling(trace: Trace, tap: Tap, atom: int, spec: PermutationSpec) -> Node:
    node, found = tap.node, tap.node
    while (source := _only_tensor_input(node)) is not None and _holds(trace, source, atom, spec):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _REDUCTIONS and _pools_everything(node):
            found = source
        elif packet not in _REARRANGEMENTS:
            break
        node = source
    return found


def _pools_everything(node: Node) -> bool:
    """Whether what a reduction leaves of the axes that it changes is one position."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(after) < len(before) or all(n == 1 for n, m in zip(after, before, strict=True) if n != m)


def _before_activation(trace: Trace, node: Node, atom: int, spec: PermutationSpec) -> Node:
    while (source := _only_tensor_input(node)) is not None and _holds(trace, source, atom, spec):
        packet = getattr(node.target, "overloadpacket", None)
        elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or str(packet).endswith("_")
        if not (elementwise or packet in _REDUCTIONS or packet in _REARRANGEMENTS):
            break
        node = source
    return node


def _only_tensor_input(node: Node) -> Node | None:
    """Return the one tensor that a node is a function of, None if there are several or a parameter is among them."""
    if node.op != "call_function":
        return None
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].op == "call_function" else None


def _holds(trace: Trace, node: Node, atom: int, spec: PermutationSpec) -> bool:
    axes = trace.axes.get(node)
    return isinstance(axes, tuple) and any(atom in spec.structure.moving_atoms(axis) for axis in axes)


def collect(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    num_examples_at_most: int | None,
    before_activation: bool,
    adversary: Attack | None = None,
) -> dict[str, Moments]:
    """Run both networks in eval mode over the same data and return the moments of every group that is summed over.

    With an adversary, ``(inputs, targets)`` become each network's own adversarial examples first. A loader that
    shuffles gives the same examples every time; the caller's random state stays.
    """
    device = device_of(model_a)
    moments: dict[str, Moments] = {}
    plans, num_left_out = _Plans(spec, model_a, before_activation), 0
    with seeded(0, device):
        for number, batch in enumerate(_first_batches(loader, device, num_examples_at_most)):
            inputs = inputs_of(batch)
            plan = plans.of(inputs)
            own = [inputs, inputs]
            if adversary is not None:
                pair = inputs_and_targets(batch)
                own = [attacked_in_eval_mode(adversary, m, *pair, seed=number) for m in (model_a, model_b)]
            steps = _in_step(plan.trace, model_a, model_b, *map(Example.of, own))
            if plan.spec.one_path and (steps := _whole(steps, plan)) is None:
                num_left_out += 1
                continue
            for node, a, b in steps:
                for group in plan.groups_at.get(node, ()):
                    _add(plan.spec, moments, group, plan.trace.axes[node], a, b)
    if num_left_out:
        warn(
            f"{num_left_out} batches are left out of the statistics: the run of the model that was recorded cannot be "
            f"repeated on them, since values take another path. Batches of one size often help."
        )
    return moments


def _whole(steps: Iterator[tuple], plan: _Plan) -> Iterator[tuple] | None:
    """Return what is read of a recorded run on a batch, None if the batch takes another path, on which it fails."""
    kept = []
    try:
        for node, a, b in steps:
            if node in plan.groups_at:
                same_shape = a.shape == b.shape  # else values choose other entries in both networks
                kept.append((node, a.clone(), b.clone())) if same_shape else None
    except ValueError:
        return None
    return iter(kept)


@dataclass(frozen=True)
class _Plan:
    """Where to read which groups, in the graph that runs on inputs of certain shapes."""

    spec: PermutationSpec
    trace: Trace
    groups_at: dict[Node, list[Group]]


class _Plans:
    """The plan for each shape of inputs: sequences of another length, or images of another size, have another graph."""

    def __init__(self, spec: PermutationSpec, model: nn.Module, before_activation: bool) -> None:
        self._spec, self._model, self._before_activation = spec, model, before_activation
        self._by_spec: dict[int, _Plan] = {}
        self._by_shapes: dict[Any, _Plan] = {}

    def of(self, inputs: Any) -> _Plan:
        """Return the plan for such inputs, exporting the model where no graph there is runs on them."""
        shapes = tuple(tuple(tensor.shape) for tensor in Example.of(inputs).tensors())
        if shapes not in self._by_shapes:
            known = (plan.spec for plan in self._by_spec.values() if plan.spec.runs_on(inputs))
            spec = next(known, None) or self._spec.with_traces(self._model, inputs)
            if id(spec) not in self._by_spec:
                self._by_spec[id(spec)] = _where_to_read(spec, self._before_activation)
            self._by_shapes[shapes] = self._by_spec[id(spec)]
        return self._by_shapes[shapes]


def _first_batches(loader: Iterable[Any], device: torch.device, limit: int | None) -> Iterator[Any]:
    """Yield batches, without augmentation, up to ``limit`` examples; the last batch may be cut."""
    return first_examples(batches(in_order(loader), device), limit)


def _where_to_read(spec: PermutationSpec, before_activation: bool) -> _Plan:
    """Choose the mode in which the most groups are summed over: auxiliary heads exist in train mode only."""
    plans = []
    for trace in spec.traces:
        chosen: dict[Node, list[Group]] = {}
        for reading in readings(spec, trace, before_activation=before_activation):
            chosen.setdefault(reading.node, []).append(reading.group)
        plans.append(_Plan(spec, trace, chosen))
    return max(plans, key=lambda plan: len({group.name for groups in plan.groups_at.values() for group in groups}))


def _in_step(
    trace: Trace, model_a: nn.Module, model_b: nn.Module, example_a: Example, example_b: Example
) -> Iterator[tuple]:
    runs = [
        trace.graph.run(_state(model), example, running_statistics=True)
        for model, example in ((model_a, example_a), (model_b, example_b))
    ]
    pairs = zip(*runs, strict=True)
    while True:
        with refused((example_a.args, example_a.kwargs)):
            pair = next(pairs, None)
        if pair is None:
            return
        (node, a), (_, b) = pair
        yield node, a, b


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in named_state(model)}


def _add(spec: PermutationSpec, moments: dict[str, Moments], group: Group, axes: Any, a: Tensor, b: Tensor) -> None:
    if group.name not in moments:
        moments[group.name] = Moments(math.prod(group.shape))
    for x, y in zip(unit_samples(spec, group, axes, a), unit_samples(spec, group, axes, b), strict=True):
        moments[group.name].add(x, y)


def unit_samples(spec: PermutationSpec, group: Group, axes: Any, values: Tensor) -> Iterator[Tensor]:
    """Yield a group's units, ``(L, N, R)``, for each time the tensor holds them; a view where it can be."""
    for view, labels in spec.structure.pieces(values, axes):
        for dims in spec.structure.unit_dims(labels, {group.atom}):
            first = min(dims)
            grouped = view.movedim(dims, list(range(first, first + len(dims))))
            yield grouped.reshape(math.prod(view.shape[:first]), math.prod(group.shape), -1)
