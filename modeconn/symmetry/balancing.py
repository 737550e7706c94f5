"""The verb: scale each hidden unit before a ReLU so that what makes it and what reads it weigh alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of
from modeconn.network.weights import named_state
from modeconn.symmetry.discover import discover
from modeconn.symmetry.explore import example_for
from modeconn.symmetry.groups import Group
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.slopes import SlopesOfOutputs, places
from modeconn.symmetry.spec import PermutationSpec
from modeconn.symmetry.verify import VerificationError
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
    freedom is found by small steps on redrawn weights, and tried out by large ones: those before ReLU, leaky ReLU,
    PReLU and max pooling have it, those before GELU or tanh have not, nor those that a norm reads, and stay. Units of
    one group inside of another, as in heads, stay too.

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
        ValueError: If the model cannot be looked at, or is not of the spec.

    References:
        Neyshabur et al., 2015, https://arxiv.org/abs/1506.02617; Stock et al., 2019, https://arxiv.org/abs/1902.10416

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> even = balance(net, torch.rand(2, 4))
        >>> made = torch.cat([even[0].weight, even[0].bias[:, None]], 1).norm(dim=1)
        >>> torch.allclose(made, even[2].weight.norm(dim=0), rtol=1e-3)
        True
    """
    example = example_for(model, example_input)
    if spec is None:
        spec = discover(model, (example.args, example.kwargs) if example.kwargs else example.args, outputs=outputs)
    elif outputs is not None:
        raise ValueError("outputs= is for discovery, and spec= was discovered: pass it to discover.")
    spec.check_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device, so it has no weights to balance. Build it on a real one.")
    scaling = _scaled_groups(spec, model, example.args or example.kwargs)
    twin = copy_of(model)
    named = {name: x for name, x in named_state(twin) if name in spec.state}
    exact = {id(x): x.detach().double().cpu() for x in named.values()}
    _balance({name: exact[id(x)] for name, x in named.items()}, spec, scaling)
    with torch.no_grad():
        for x in named.values():
            x.copy_(exact[id(x)])
    return twin


Scaling = Mapping[str, Tensor]
"""By name of a group bool ``(P,)``: which of its places are divided by the scale; the others are multiplied."""


def _scaled_groups(spec: PermutationSpec, model: nn.Module, example: Any, *, seed: int = 0) -> Scaling:
    """Return the groups of which each unit may have any positive scale.

    Raises:
        VerificationError: If large scales change the function, though small changes of them do not.
    """
    generator = torch.Generator().manual_seed(seed)
    slopes = SlopesOfOutputs(spec, model, example, generator)
    found: dict[str, Tensor] = {}
    for group in spec.groups:
        if (
            group.rotates
            or len(group.shape) > 1
            or any(group.name == name for g in spec.groups for name, _ in g.parents)
        ):
            continue
        signs = slopes.signs(group, torch.rand(group.size, generator=generator, dtype=torch.float64).diag())
        if signs is not None:
            found[group.name] = signs
    scales = {name: torch.rand(spec[name].size, generator=generator, dtype=torch.float64) + 0.5 for name in found}

    def rescaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: x.clone() for name, x in tensors.items()}
        for name, signs in found.items():
            _scale(moved, spec, spec[name], signs, scales[name])
        return moved

    change = slopes.change(rescaled) if found else 0.0
    if not change < _LARGEST_CHANGE:
        raise VerificationError(
            f"scales of hidden units change the function by {change:.1e} standard deviations, though small changes of "
            f"them do not: this network cannot be balanced."
        )
    return found


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
                sums[is_read] += units.reshape(group.size, -1).square().sum(1)
            has_both = (sums[0] > 0) & (sums[1] > 0)
            scales = torch.where(has_both, sums[1] / sums[0].clamp(min=1e-300), 1.0) ** 0.25
            largest = max(largest, float(scales.log().abs().max()))
            _scale(tensors, spec, group, signs, scales)
        if largest < _BALANCED:
            return


_LARGEST_CHANGE = 1e-8
_MOST_SWEEPS, _BALANCED = 1_000, 1e-9
