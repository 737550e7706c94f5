"""The verb: fold the gains of a network's norms into the layers beside them."""

from __future__ import annotations

from typing import Any

from torch import nn

from modeconn.symmetry.discover import discover
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools.door import checked


@checked
def fold_gains(
    model: nn.Module,
    example_input: Any = None,
    *,
    spec: PermutationSpec | None = None,
    untie: bool = False,
    outputs: Selection = None,
) -> nn.Module:
    """Return a copy of a network in which gains of norms and layer scales are one: the same function, other weights.

    A gain that scales what linear layers read goes into their weights, one that scales what a linear layer makes into
    that layer's. A bias that a norm adds after its gain goes into the biases of the layers that read it, else it is
    divided by the gain. The copy is of the same class, with parameters of the same names; of a float64 network the
    outputs agree to 1e-10, of a float32 one to 1e-5 of their size. Folded networks have rotations: see
    ``symmetries="orthogonal"`` of `modeconn.discover`. Gains that cannot be folded stay as they are.

    Args:
        model: Any module; it is not changed.
        example_input: What ``model(...)`` takes: a tensor, a tuple of positional inputs or a dict of keyword inputs.
            Default: ``model.example_input()``, where the model has that method. Not needed with ``spec``.
        spec: What `modeconn.discover` found with ``symmetries="orthogonal"``. Default: it is discovered here.
        untie: Give tied weights a tensor for each of their names first, so that more gains can be folded: the copy then
            has more parameters.
        outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of them.

    Raises:
        ValueError: If the model cannot be looked at (see `modeconn.discover`), the spec is of permutations alone or of
            another model, or a bias would have to be divided by a gain that is zero.

    References:
        Ashkboos et al., 2024 (SliceGPT), https://arxiv.org/abs/2401.15024

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> with torch.no_grad():
        ...     _ = net[1].weight.fill_(2.0)
        >>> folded = fold_gains(net, torch.zeros(2, 4))
        >>> folded[1].weight.unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """
    if spec is None:
        spec = discover(model, example_input, symmetries="orthogonal", untie=untie, outputs=outputs)
    elif untie or outputs is not None:
        raise ValueError("untie= and outputs= are for discovery, and spec= was discovered: pass them to discover.")
    if spec.symmetries == "permutation":
        raise ValueError(
            "spec is of permutations alone, which need no gains folded. Pass one of "
            "modeconn.discover(symmetries='orthogonal')."
        )
    return spec.prepared(model)
