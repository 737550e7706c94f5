"""The verb: scale each hidden unit before a ReLU so that what makes it and what reads it weigh alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of, untied_copy
from modeconn.network.weights import named_state
from modeconn.symmetry.discover import discover
from modeconn.symmetry.groups import Group
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.slopes import SlopesOfOutputs, in_wide, places
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import checked


@checked
def balance(
    model: nn.Module,
    example_input: Any = None,
    *,
    spec: PermutationSpec | None = None,
    outputs: Selection = None,
) -> nn.Module:
    r"""Return a copy of a network in which each unit that may have any positive scale has the balanced one.

    A ReLU lets a positive factor through: the weights and the bias that make a unit times :math:`s`, and those that
    read it over :math:`s`, give the same function. Two networks that were trained apart differ in these scales, and a
    straight line between them then mixes units of other sizes. Balanced, a unit's weights in and out have the same
    norm, which is the least sum of squares that the function can have, and one scale for both networks:

    .. math:: s_i = \left( \lVert w_i^{out} \rVert^2 / \lVert w_i^{in} \rVert^2 \right)^{1/4}

    for each unit in turn, until nothing changes. Balance both networks before they are aligned. Which units have this
    freedom is found by small steps on redrawn weights, and tried out by scales from 1/1000 to 1000: those before ReLU,
    leaky ReLU and max pooling have it; those before GELU, tanh or ReLU6 have not, nor those that a norm reads, nor
    those with slopes of their own (``nn.PReLU(n)``), and stay. Units inside of others, as in heads, stay too.

    Args:
        model: Any module; it is not changed.
        example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            Default: ``model.example_input()``, where the model has that method.
        spec: What `modeconn.discover` found. Default: it is discovered here.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.

    Returns:
        A network of the same class with parameters of the same names, and the same function: outputs of a float64
        network agree to 1e-10 of their size, of a float32 one to 1e-5.

    Raises:
        ValueError: If the model cannot be looked at, is not of the spec, has no weights, or takes paths that values
            choose.

    References:
        Neyshabur et al., 2015, https://arxiv.org/abs/1506.02617; Stock et al., 2019, https://arxiv.org/abs/1902.10416

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> even = balance(net, torch.rand(2, 4))
        >>> made = torch.cat([even[0].weight, even[0].bias[:, None]], 1).norm(dim=1)
        >>> torch.allclose(made, even[2].weight.norm(dim=0), rtol=1e-3)
        True
    """
    example = model.example_input() if example_input is None and hasattr(model, "example_input") else example_input
    if spec is None:
        spec = discover(model, example, outputs=outputs)
    elif outputs is not None:
        raise ValueError("outputs= is for discovery, and spec= was discovered: pass it to discover.")
    spec.check_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device, so it has no weights to balance. Build it on a real one.")
    if spec.one_path:
        raise ValueError(
            f"torch.export cannot follow {type(model).__name__}, so it cannot be balanced: where values choose the "
            f"path, other scales may choose another one."
        )
    scaling = _scaled_groups(spec, model, example)
    twin = untied_copy(model) if spec.untied else copy_of(model)
    scaled = {name for group, _ in scaling.items() for name, _ in places(spec, spec[group])}
    named = {name: x for name, x in named_state(twin) if name in scaled}
    exact = {name: in_wide(x) for name, x in named.items()}
    _balance(exact, spec, scaling)
    with torch.no_grad():
        for name, x in named.items():
            x.copy_(exact[name])
    return twin


Scaling = Mapping[str, Tensor]
"""By name of a group bool ``(P,)``: which of its places are divided by the scale; the others are multiplied."""


def _scaled_groups(spec: PermutationSpec, model: nn.Module, example: Any, *, seed: int = 0) -> Scaling:
    """Return the groups of which each unit may have any positive scale: also very large ones and very small ones."""
    generator = torch.Generator().manual_seed(seed)
    slopes = SlopesOfOutputs(spec, model, example, generator)
    parents = {name for group in spec.groups for name, _ in group.parents}
    found: dict[str, Tensor] = {}
    for group in spec.groups:
        if group.rotates or len(group.shape) > 1 or group.name in parents:
            continue
        signs = slopes.signs(group, torch.rand(group.size, generator=generator, dtype=torch.float64).diag())
        if signs is None:
            continue
        scales = 10 ** (6 * torch.rand(group.size, generator=generator, dtype=torch.float64) - 3)
        rescaled = partial(_rescaled, spec=spec, group=group, signs=signs, scales=scales)
        if slopes.change(rescaled) < _LARGEST_CHANGE:
            found[group.name] = signs
    return found


def _rescaled(
    tensors: Mapping[str, Tensor], *, spec: PermutationSpec, group: Group, signs: Tensor, scales: Tensor
) -> dict[str, Tensor]:
    moved = {name: x.clone() for name, x in tensors.items()}
    _scale(moved, spec, group, signs, scales)
    return moved


def _scale(tensors: Mapping[str, Tensor], spec: PermutationSpec, group: Group, signs: Tensor, scales: Tensor) -> None:
    """Scale the units of a group in all of its places, in place."""
    for units, is_read in zip(_units(tensors, spec, group), signs.tolist(), strict=True):
        units.mul_((1 / scales if is_read else scales).view(-1, *[1] * (units.dim() - 1)))


def _units(tensors: Mapping[str, Tensor], spec: PermutationSpec, group: Group) -> Iterator[Tensor]:
    """Yield what a group's units have in each of its places, as views with the units first."""
    for name, number in places(spec, group):
        piece, labels = next(islice(spec.structure.pieces(tensors[name], spec.state[name]), number, None))
        yield piece.movedim(next(dim for dim, (atom, _) in enumerate(labels) if atom == group.atom), 0)


def _balance(tensors: Mapping[str, Tensor], spec: PermutationSpec, scaling: Scaling) -> None:
    """Balance the units of all groups, in place, one group after the other."""
    for _ in range(_MOST_SWEEPS):
        largest = 0.0
        for name, signs in scaling.items():
            group = spec[name]
            sums = [torch.zeros(group.size, dtype=torch.float64) for _ in range(2)]
            for units, is_read in zip(_units(tensors, spec, group), signs.tolist(), strict=True):
                sums[is_read] += units.reshape(group.size, -1).abs().square().sum(1)
            has_both = (sums[0] > 0) & (sums[1] > 0)
            scales = torch.where(has_both, sums[1] / sums[0].clamp(min=1e-300), 1.0) ** 0.25
            largest = max(largest, float(scales.log().abs().max()))
            _scale(tensors, spec, group, signs, scales)
        if largest < _BALANCED:
            return


_LARGEST_CHANGE = 1e-8
_MOST_SWEEPS, _BALANCED = 1_000, 1e-9
