"""What every model of the zoo shares: normalisation first, an example input, a seed, and a name to be rebuilt by."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from modeconn.tools.rng import seeded

Statistic = float | Sequence[float] | Tensor | None
"""A mean or standard deviation of the inputs: one number, one per channel (or feature), or None for the default."""

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)

P = ParamSpec("P")
M = TypeVar("M", bound="ZooModel")


class Normalize(nn.Module):
    """Map pixels in [0, 1] to ``(x - mean) / std``, with fixed values that are saved with the model.

    Because this is a layer, every other part of the package (attacks above all) sees plain pixels.

    Args:
        num_channels: Size of dimension 1 of the inputs: channels of images, features of vectors.
        mean: Subtracted; default CIFAR-10's values for 3 channels, otherwise 0.5.
        std: Divided by; default CIFAR-10's values for 3 channels, otherwise 0.25.
        spatial_dims: Number of dimensions after the channels, 2 for images, 0 for vectors.

    Raises:
        ValueError: If a statistic has another length than ``num_channels``, is not finite, or ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: int, mean: Statistic = None, std: Statistic = None, spatial_dims: int = 2) -> None:
        super().__init__()
        rgb = num_channels == 3
        mean = _statistic("mean", (CIFAR10_MEAN if rgb else 0.5) if mean is None else mean, num_channels)
        std = _statistic("std", (CIFAR10_STD if rgb else 0.25) if std is None else std, num_channels)
        if not (std > 0).all():
            raise ValueError(f"std must be positive for every channel, got a smallest value of {std.min().item():g}.")
        shape = (num_channels,) + (1,) * spatial_dims
        device = torch.get_default_device()
        self.register_buffer("mean", mean.reshape(shape).to(device))
        self.register_buffer("std", std.reshape(shape).to(device))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _statistic(name: str, value: Statistic, num_channels: int) -> Tensor:
    # On the CPU, so that the values can be checked also while a model is made on the meta device.
    values = torch.as_tensor(value, dtype=torch.get_default_dtype(), device="cpu").detach()
    if values.dim() > 1 or (values.dim() == 1 and len(values) not in (1, num_channels)):
        raise ValueError(
            f"{name} must be one number or one for each of the {num_channels} channels, "
            f"got shape {tuple(values.shape)}."
        )
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value}.")
    return values.expand(num_channels).clone()


class ZooModel(nn.Module):
    """A classifier of inputs of one shape, whose first layer normalises them.

    Args:
        input_shape: Shape of one input, ``(channels, height, width)`` or ``(features,)``.
        mean: See `Normalize`.
        std: See `Normalize`.
    """

    zoo_entry: tuple[str, dict[str, Any]]  # set by `factory`, read by `describe`

    def __init__(self, input_shape: tuple[int, ...], mean: Statistic, std: Statistic) -> None:
        super().__init__()
        if min(input_shape) < 1:
            raise ValueError(f"every size of an input must be at least 1, got an input shape of {input_shape}.")
        self.input_shape = input_shape
        self.normalize = Normalize(input_shape[0], mean, std, spatial_dims=len(input_shape) - 1)

    def example_input(self) -> Tensor:
        """Return two inputs, a fixed ramp from 0 to 1, on the device and in the dtype of the model."""
        like = self.normalize.mean
        ramp = torch.linspace(0, 1, 2 * torch.Size(self.input_shape).numel(), device=like.device, dtype=like.dtype)
        return ramp.reshape(2, *self.input_shape)


_FACTORIES: dict[str, Callable[..., ZooModel]] = {}


def factory(make: Callable[P, M]) -> Callable[P, M]:
    """Enter a function that makes a model into the zoo, under its own name.

    The decorated function initialises the model with its argument ``seed`` and leaves the global random state as it
    was; the model remembers its name and its other arguments, for `describe`.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_seeded(*args: P.args, **kwargs: P.kwargs) -> M:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: _json_value(value) for name, value in bound.arguments.items() if name != "seed"}
        with seeded(bound.arguments["seed"], torch.get_default_device()):
            model = make(*args, **kwargs)
        model.zoo_entry = (make.__name__, arguments)
        return model

    _FACTORIES[make.__name__] = make_seeded
    return make_seeded


def _json_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value


def names() -> tuple[str, ...]:
    """Return the names of all models of the zoo, sorted.

    Example:
        >>> from modeconn import models
        >>> "tinyten" in models.names()
        True
    """
    return tuple(sorted(_FACTORIES))


def build(name: str, **arguments: Any) -> ZooModel:
    """Make the zoo's model ``name``: ``build("mlp", num_inputs=64, ...)`` is ``mlp(num_inputs=64, ...)``.

    Raises:
        ValueError: If the zoo has no model of that name, or the model no such argument.
    """
    if name not in _FACTORIES:
        raise ValueError(f"the zoo has no model {name!r}; it has {', '.join(names())}.")
    try:
        inspect.signature(_FACTORIES[name]).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} cannot be made from {arguments}: {error}.") from None
    return _FACTORIES[name](**arguments)


def describe(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return name and arguments from which `build` makes the same architecture; None for a model not of the zoo.

    The seed is left out: two endpoints of one architecture have equal descriptions. The arguments are plain numbers,
    strings and lists, and go through JSON unchanged.

    Example:
        >>> from modeconn import models
        >>> name, arguments = models.describe(models.resnet20(100, width=2, seed=7))
        >>> name, arguments["num_classes"], arguments["width"]
        ('resnet20', 100, 2)
    """
    entry = getattr(model, "zoo_entry", None)
    return None if entry is None else (entry[0], dict(entry[1]))
