"""A second opinion on a spec, which knows nothing of graphs: relabel a copy, run both, compare all they return."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn import PermutationSpec


def largest_change(spec: PermutationSpec, model: nn.Module, inputs: Any, *, training: bool = False) -> float:
    """Return by how much a random relabelling changes any output in float64, relative to its size."""
    model = _generic(model).train(training)
    relabelled = spec.random(torch.Generator().manual_seed(1)).apply(model).train(training)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    args = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    found = []
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for network in (model, relabelled):
            torch.manual_seed(0)
            with torch.no_grad():
                found.append(_tensors(network(*copy.deepcopy(args))))
    finally:
        torch.set_default_dtype(default)
    assert len(found[0]) == len(found[1]) > 0
    return max(_change(x, y) for x, y in zip(*found, strict=True))


def _generic(model: nn.Module) -> nn.Module:
    """Return a copy in float64 without dropout, whose parameters are not at the special values of an initialisation."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += 0.1 * noise
    return model


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    inside = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and hasattr(leaf, "__slots__")]
    return [x for x in leaves if isinstance(x, Tensor)] + [getattr(o, n) for o in inside for n in o.__slots__]


def _change(x: Tensor, y: Tensor) -> float:
    x, y = x.detach(), y.detach()  # where a model records gradients whatever it is told
    if not (x.is_floating_point() or x.is_complex()):
        return float(not torch.equal(x, y))
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) if x.numel() else 0.0
