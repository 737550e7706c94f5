"""A second opinion on a relabelling: run the network itself before and after, and compare all that it returns.

Nothing of the graphs, rules and axes of modeconn is used here: only the state dicts before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-6
"""Of float64 outputs, relative to their largest entry; a wrong relabelling shows as more than a hundredth."""
_SINGLE_GROUPS = 5
"""How many groups are also relabelled alone, so that two mistakes cannot hide each other."""


class CannotJudgeError(Exception):
    """A network that does not do the same thing twice, or does not run in float64."""


def worst_change(model: nn.Module, spec: Any, inputs: Any, run: Any) -> float:
    """Return the largest relative change of any output, in eval and train mode, over several relabellings.

    Args:
        model: The network; it is not changed.
        spec: What `modeconn.discover` found in it.
        inputs: What it runs on.
        run: ``run(model, inputs)``, what it returns.

    Raises:
        AssertionError: If a relabelling does anything but rearrange the entries of tensors, or moves nothing.
        CannotJudgeError: If the network itself is no function of its state and inputs, in eval mode.
    """
    network = _calm(copy.deepcopy(model)).double()
    _redraw(network)
    inputs = _in_double(inputs)
    worst = 0.0
    for training in (False, True):
        try:
            before = _returned(network, network.state_dict(), inputs, run, training, seed=0)
            again = _returned(network, network.state_dict(), inputs, run, training, seed=1)
        except Exception as error:
            if training:
                continue
            raise CannotJudgeError(f"{type(error).__name__} in float64: {str(error)[:80]}") from error
        if not _difference(before, again) < TOLERANCE:
            if training:
                continue  # random numbers by position decide, which no relabelling moves
            raise CannotJudgeError("other outputs with another seed")
        shaken = _returned(network, _shaken(network.state_dict()), inputs, run, training, seed=0)
        if not _difference(before, shaken) < TOLERANCE:
            if training:
                continue
            raise CannotJudgeError("rounding decides: weights that differ by 1e-14 return something else")
        for state in _relabelled(network.state_dict(), spec):
            worst = max(worst, _difference(before, _returned(network, state, inputs, run, training, seed=0)))
    return worst


def _relabelled(state: Mapping[str, Tensor], spec: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the state after random relabellings of all groups, and of some groups alone."""
    drawn = [spec.random(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    step = max(len(spec.groups) // _SINGLE_GROUPS, 1)
    identity = spec.identity()
    alone = [
        type(identity)(spec, {**identity.perms, group.name: drawn[0].perms[group.name]})
        for group in spec.groups[::step][:_SINGLE_GROUPS]
    ]
    for relabelling in [*drawn, *alone]:
        moved = {**state, **relabelling.relabel({name: x for name, x in state.items() if name in spec.shapes})}
        for name, tensor in moved.items():
            before = state[name]
            assert tensor.shape == before.shape and tensor.dtype == before.dtype, name
            assert _same_entries(tensor, before), f"{name} is no rearrangement"
        moves = {group.name for group in spec.groups if not _is_identity(relabelling.perms[group.name])}
        changed = any(not torch.equal(moved[name], state[name]) for name in state)
        assert changed or not moves, "nothing moves"
        yield moved


def _shaken(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with noise at the level of rounding."""
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: 1 + 1e-14 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in state.items()
    }
    return {name: x * noise[name] if x.is_floating_point() else x for name, x in state.items()}


def _is_identity(perm: Tensor) -> bool:
    return torch.equal(perm, torch.arange(perm.shape[-1]).expand(perm.shape))


def _same_entries(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same entries in any order: sorted, or, where that takes long, by three sums."""
    if x.numel() < 10_000 and not x.is_complex():
        return torch.equal(x.flatten().sort().values, y.flatten().sort().values)
    pairs = [(function(x).sum(), function(y).sum()) for function in (torch.tanh, torch.sin, torch.square)]
    return all(bool((a - b).abs() <= 1e-9 * (1 + a.abs())) for a, b in pairs)


def _returned(
    network: nn.Module, state: Mapping[str, Tensor], inputs: Any, run: Any, training: bool, seed: int
) -> list[Tensor]:
    twin = copy.deepcopy(network).train(training)
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            tensor.copy_(state[name])
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            return list(_tensors(run(twin, copy.deepcopy(inputs)), ()))
    finally:
        torch.set_default_dtype(default)


class _Double(TorchFunctionMode):
    """Casts to single precision go to double, so that rounding is no difference."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        if function is torch._grouped_mm and args[0].dtype == torch.float64:  # which torch has in lower precision alone
            return _grouped(*args, **(kwargs or {}))
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        if function in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return function(*args, **kwargs)


def _grouped(x: Tensor, y: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """Multiply each range of rows, up to its offset, with the matrix of its own."""
    assert x.dim() == 2 and y.dim() == 3 and bias is None
    ends = offs.tolist()
    rows = [x[begin:end] @ y[number] for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(rows) if ends[-1] == len(x) else torch.cat([*rows, x.new_zeros(len(x) - ends[-1], y.shape[-1])])


def _tensors(value: Any, seen: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield every floating tensor in what a network returns, in containers and objects."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module)) or value is None:
        return
    seen = (*seen, id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    if len(before) != len(after):
        return float("inf")
    return max((_relative(x, y) for x, y in zip(before, after, strict=True)), default=0.0)


def _relative(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    finite = x.abs().isfinite()
    if not torch.equal(finite, y.abs().isfinite()):
        return float("inf")
    x, y = x[finite], y[finite]
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) if x.numel() else 0.0


def _calm(network: nn.Module) -> nn.Module:
    """Switch dropout of all names off."""
    for module in network.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or (name == "p" and "Drop" in type(module).__name__)
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)
    return network


def _redraw(network: nn.Module) -> None:
    """Give tensors generic values near those that they have: equal and zero entries would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in {**dict(network.named_parameters()), **dict(network.named_buffers())}.items():
        if not tensor.is_floating_point() or name not in network.state_dict():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        with torch.no_grad():
            tensor.copy_(tensor * (0.8 + 0.4 * noise) + 0.02 * noise.flip(0) if tensor.dim() else tensor)


def _in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _in_double(part) for name, part in value.items()}
    return type(value)(_in_double(part) for part in value) if isinstance(value, (list, tuple)) else value
