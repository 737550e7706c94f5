"""A model as one flat vector of weights, and back, without copying."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.network.copies import copy_of
from modeconn.tools.door import check, looked_at
from modeconn.tools.shown import Shown


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies in the flat vector; ``order`` lists its dimensions from the slowest in memory."""

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int
    trainable: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, theta: Tensor) -> Tensor:
        """Return the parameter as a view into ``theta``, with the memory order the model gave it."""
        segment = theta[self.offset : self.offset + self.numel]
        dense = segment.view([self.shape[dim] for dim in self.order])
        return dense.permute([self.order.index(dim) for dim in range(len(self.shape))])


class WeightSpace(Shown):
    r"""The space :math:`\mathbb{R}^P` in which every point is one network of a given architecture.

    Each parameter takes one stretch of the vector, in the order of ``model.named_parameters()``; tied parameters take
    one stretch together, frozen ones (``requires_grad=False``) are part of it and marked in `trainable`. Inside its
    stretch a parameter keeps the memory order the model gave it, so the weights of a ``channels_last`` model stay
    ``channels_last`` as views. Flat vectors are therefore comparable within one space only: flatten both networks with
    the same one. Buffers are no part of the space.

    Args:
        model: Any module; all its parameters of one floating dtype, on one device.

    Attributes:
        names: Parameter names, tied ones once.
        aliases: For tied parameters, every further name and the one it stands for in ``names``.
        num_parameters: ``P``, scalars counted once.
        dtype, device: Those of the parameters.

    Raises:
        ValueError: If there is no parameter, or dtypes or devices are mixed, or a parameter is not floating.

    Example:
        >>> space = WeightSpace(nn.Linear(3, 2))
        >>> space
        WeightSpace(8 weights in 2 parameters, torch.float32, cpu)
        >>> {name: tuple(view.shape) for name, view in space.unflatten(torch.zeros(8)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """

    @looked_at
    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        if not parameters:
            raise ValueError(f"{type(model).__name__} has no parameters, so there is no curve between two of it.")
        self.dtype, self.device = _common_kind(parameters)
        self.aliases = _aliases(model)
        self._slots = tuple(_lay_out(parameters))
        self.names = tuple(slot.name for slot in self._slots)
        self.num_parameters = sum(slot.numel for slot in self._slots)
        self._buffers = _describe(dict(model.named_buffers()))
        self._modules = _module_types(model)

    def __repr__(self) -> str:
        return (
            f"WeightSpace({self.num_parameters} weights in {len(self.names)} parameters, {self.dtype}, {self.device})"
        )

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype for what small steps are added to: that of the parameters, at least single precision."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name, in the order of the flat vector."""
        return {slot.name: slot.shape for slot in self._slots}

    @property
    def layout(self) -> dict[str, str]:
        """All that gives an entry of a flat vector its meaning, by parameter, as a text to compare."""
        return {
            slot.name: f"{slot.shape}, {self.dtype}, memory order {slot.order}{'' if slot.trainable else ', frozen'}"
            for slot in self._slots
        }

    @property
    def trainable(self) -> Tensor:
        """Bool mask ``(P,)``, on `device`: False where the weight belongs to a frozen parameter."""
        mask = torch.empty(self.num_parameters, dtype=torch.bool, device=self.device)
        for slot in self._slots:
            mask[slot.offset : slot.offset + slot.numel] = slot.trainable
        return mask

    @property
    def all_trainable(self) -> bool:
        """Whether no parameter is frozen."""
        return all(slot.trainable for slot in self._slots)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Name the parts of ``theta (P,)``: views into it, no copies, tied parameters under their first name.

        ``torch.func.functional_call(model, space.unflatten(theta), ...)`` evaluates the network at ``theta``, and lets
        gradients flow to it.
        """
        self._check_vector(theta, "theta")
        return {slot.name: slot.view(theta) for slot in self._slots}

    def flatten(self, model: nn.Module, *, name: str = "model") -> Tensor:
        """Copy the weights of a model of this architecture into one new vector ``(P,)``.

        Raises:
            ValueError: If the model is of another architecture, dtype or device, or holds NaN or infinite weights;
                ``name`` is what the message calls it.
        """
        self.check(model, name=name)
        theta = torch.empty(self.num_parameters, dtype=self.dtype, device=self.device)
        self._copy(dict(model.named_parameters()), self.unflatten(theta))
        return theta

    def load(self, theta: Tensor, model: nn.Module) -> None:
        """Write ``theta (P,)`` into the parameters of a model of this architecture, in place."""
        check("model", model, nn.Module)
        parameters = dict(model.named_parameters())
        if {name: tuple(parameter.shape) for name, parameter in parameters.items()} != self.shapes:
            self.check(model, name="model", reference="this weight space")  # which says what differs
        self._copy(self.unflatten(theta), parameters)

    def to_canonical(self, theta: Tensor) -> Tensor:
        """Return a copy of ``theta (P,)`` with every parameter row by row, as files hold it: no memory format."""
        return torch.cat([view.reshape(-1) for view in self.unflatten(theta).values()])

    def from_canonical(self, vector: Tensor) -> Tensor:
        """Invert `to_canonical`; the result is in this space's dtype and on its device."""
        self._check_vector(vector, "vector")
        theta = torch.empty(self.num_parameters, dtype=self.dtype, device=self.device)
        for slot in self._slots:
            slot.view(theta).copy_(vector[slot.offset : slot.offset + slot.numel].view(slot.shape))
        return theta

    def check(self, model: nn.Module, *, name: str = "b", reference: str = "a") -> None:
        """Raise unless ``model`` has exactly these parameters, buffers and kinds of modules, all weights finite.

        Settings of modules may differ: the share of a dropout does not change what a network is. So may what a
        ``forward`` calls outside of modules, which cannot be seen.

        Args:
            model: Any module.
            name: What the message calls it.
            reference: What the message calls the model that this space is of.

        Raises:
            ValueError: Naming the first parameter or module that differs and both sides, or the parameter that is not
                finite.
        """
        check(name, model, nn.Module)
        parameters = dict(model.named_parameters())
        own = {slot.name: (slot.shape, self.dtype, self.device) for slot in self._slots}
        _check_same(own, _describe(parameters), "parameter", name, reference)
        _check_same(self._buffers, _describe(dict(model.named_buffers())), "buffer", name, reference)
        if _aliases(model) != self.aliases:
            raise ValueError(
                f"endpoints tie different parameters: {self.aliases or 'none'} in {reference}, "
                f"{_aliases(model) or 'none'} in {name}. Both must come from one architecture."
            )
        _check_modules(self._modules, _module_types(model), name, reference)
        for key, parameter in parameters.items():
            if are_finite(parameter):
                continue
            if bad := int((~torch.isfinite(parameter)).sum()):
                raise ValueError(f"{key!r} of {name} holds NaN or infinite weights ({bad} of {parameter.numel()}).")

    def _check_vector(self, vector: Tensor, name: str) -> None:
        check(name, vector, Tensor)
        if vector.shape != (self.num_parameters,):
            raise ValueError(f"{name} must have shape ({self.num_parameters},), got {tuple(vector.shape)}.")

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])


class Workspace:
    """A private copy of a model whose parameters are views into one flat buffer.

    Writing into `theta` moves the model. After ``loss.backward()``, `gather_grad` brings the gradient into a second
    buffer. Gradients are no views into it: ``backward`` would have to add to them, which takes three passes over memory
    after one to zero them, and gathering takes two. And with nothing left allocated between steps, glibc returns the
    pages of the activations to the system at every step, and asks for them again.

    Args:
        model: The model to copy; it is not changed.
        space: Its weight space, if known.

    Attributes:
        space: The weight space that names the parts of both buffers.
        model: The copy, an ordinary module.
        theta: The weights, ``(P,)``.
        grad: The gradient last gathered, ``(P,)``.
    """

    def __init__(self, model: nn.Module, space: WeightSpace | None = None) -> None:
        self.space = space or WeightSpace(model)
        self.theta = self.space.flatten(model)
        self.model = copy_of(model)
        self._parameters = list(self.model.parameters())
        for parameter, view in zip(self._parameters, self.space.unflatten(self.theta).values(), strict=True):
            parameter.data = view
        self.zero_grad()
        self.gather_in(torch.zeros_like(self.theta))

    def gather_in(self, buffer: Tensor) -> None:
        """Make ``buffer (P,)`` the place where gradients are gathered."""
        self.grad = buffer
        self._grad_views = list(self.space.unflatten(buffer).values())

    def zero_grad(self) -> None:
        """Forget the gradient of the step before."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def gather_grad(self, *, weight_decay: float = 0.0) -> Tensor:
        r"""Bring the gradient of the model's parameters into `grad` and return it.

        Args:
            weight_decay: Strength of a penalty :math:`\tfrac{\lambda}{2} \lVert \theta \rVert^2` whose gradient is
                added on the way.

        Returns:
            `grad`, 0 for parameters without gradient, as frozen ones.
        """
        for parameter, view in zip(self._parameters, self._grad_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif view.dtype != parameter.dtype:  # gathered in more precision than the model has
                view.copy_(parameter.grad).add_(parameter, alpha=weight_decay)
            else:
                torch.add(parameter.grad, parameter, alpha=weight_decay, out=view)
        return self.grad


@torch.no_grad()
def are_finite(values: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy: by sums, and one by one where a sum overflows."""
    parts = values.view(-1).split(_PART) if values.is_contiguous() else (values,)
    if values.is_floating_point() and values.dtype.itemsize == 1:  # types of 8 bits have neither sums nor wider twins
        return all(bool(part.float().isfinite().all()) for part in parts)
    wide = torch.promote_types(values.dtype, torch.float32)
    return all(bool(part.sum(dtype=wide).isfinite()) or bool(part.isfinite().all()) for part in parts)


_PART = 1 << 20  # entries that are looked at together, of which half precision is widened


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def check_eval_mode(model: nn.Module) -> None:
    """Raise a ValueError if any module is in train mode, in which a network is another function."""
    for name, module in model.named_modules():
        if module.training:
            where = f" (in {name!r})" if name else ""
            raise ValueError(f"the model is in train mode{where}, in which it is not used. Call model.eval() first.")


@torch.no_grad()
def write_weights(tensors: Mapping[str, Tensor], theta: Tensor, space: WeightSpace) -> None:
    """Write named weights into their places in ``theta (P,)``."""
    for name, view in space.unflatten(theta).items():
        view.copy_(tensors[name])


def pull_back(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> None:
    """Add to the gradients of what weights are made of, from the gradient of a loss for the weights."""
    moving = [name for name in weights if weights[name].requires_grad]
    torch.autograd.backward([weights[name] for name in moving], [slopes[name].to(weights[name]) for name in moving])


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all buffers of a model, by name, buffers outside its ``state_dict`` included."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def load_buffers(buffers: dict[str, Tensor], model: nn.Module) -> None:
    """Write `named_buffers` of a model of the same architecture into ``model``, in place."""
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def named_places(model: nn.Module) -> dict[str, str]:
    """Return every place of a parameter or buffer in the module, each module once, and the name that its tensor has.

    `functional_call` ties weights by itself, but leaves its own tensors in a module that has two names.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        f"{path}.{name}" if path else name: names[id(tensor)]
        for path, module in model.named_modules()
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }


def _common_kind(parameters: dict[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    first, reference = next(iter(parameters.items()))
    if not reference.dtype.is_floating_point:
        raise ValueError(f"parameter {first!r} is {reference.dtype}; every parameter must be of one floating dtype.")
    for name, parameter in parameters.items():
        for kind in ("dtype", "device"):
            ours, theirs = getattr(reference, kind), getattr(parameter, kind)
            if ours != theirs:
                raise ValueError(
                    f"parameters must share one floating dtype and one device, but {first!r} is {ours} and {name!r} "
                    f"is {theirs}. Convert the model first: model.to({ours!r})."
                )
    return reference.dtype, reference.device


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def _lay_out(parameters: dict[str, Tensor]) -> list[_Slot]:
    slots, offset = [], 0
    for name, parameter in parameters.items():
        slots.append(_Slot(name, tuple(parameter.shape), _memory_order(parameter), offset, parameter.requires_grad))
        offset += parameter.numel()
    return slots


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions from slowest to fastest, or the plain order if the tensor has gaps or overlaps."""
    order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), dim))
    return tuple(order) if tensor.permute(order).is_contiguous() else tuple(range(tensor.ndim))


def _module_types(model: nn.Module) -> dict[str, str]:
    """Return the class's name of every module by its names: each parametrized module has a class of its own."""
    return {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}


def _check_modules(ours: dict[str, str], theirs: dict[str, str], name: str, reference: str) -> None:
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            left, right = ours.get(key, "missing"), theirs.get(key, "missing")
            raise ValueError(
                f"endpoints differ: module {key!r} is {left} in {reference}, {right} in {name}. "
                f"Both must come from one architecture."
            )


_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


def _describe(tensors: dict[str, Tensor]) -> dict[str, _Kind]:
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in tensors.items()}


def _check_same(ours: dict[str, _Kind], theirs: dict[str, _Kind], what: str, name: str, reference: str) -> None:
    same = "Both must come from one architecture."
    for key in [*ours, *theirs]:
        if ours.get(key) == theirs.get(key):
            continue
        if key not in ours or key not in theirs:
            there, here = (reference, name) if key in ours else (name, reference)
            raise ValueError(f"endpoints differ: {what} {key!r} is in {there} but not in {here}. {same}")
        left, right = next((x, y) for x, y in zip(ours[key], theirs[key], strict=True) if x != y)
        way_out = same if isinstance(left, tuple) else "Bring both to one dtype and device first, with .to(...)."
        raise ValueError(f"endpoints differ at {key!r}: {left} in {reference}, {right} in {name}. {way_out}")
