"""What every model of the zoo shares: normalisation first, and an example input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.registry import factory

Statistic = float | Sequence[float] | Tensor | None
"""A mean or standard deviation of the inputs: one number, one per channel (or feature), or None for the default."""

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)


class Normalize(nn.Module):
    """Map pixels in [0, 1] to ``(x - mean) / std``, with fixed values that are saved with the model.

    Because this is a layer, every other part of the package (attacks above all) sees plain pixels.

    Args:
        num_channels: Size of dimension 1 of the inputs: channels of images, features of vectors.
        mean: Subtracted; default CIFAR-10's values for images of 3 channels, otherwise 0.5.
        std: Divided by; default CIFAR-10's values for images of 3 channels, otherwise 0.25.
        spatial_dims: Number of dimensions after the channels, 2 for images, 0 for vectors.

    Raises:
        ValueError: If a statistic has another length than ``num_channels``, is not finite, or ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: int, mean: Statistic = None, std: Statistic = None, spatial_dims: int = 2) -> None:
        super().__init__()
        rgb = num_channels == 3 and spatial_dims == 2
        mean = _statistic("mean", (CIFAR10_MEAN if rgb else 0.5) if mean is None else mean, num_channels)
        std = _statistic("std", (CIFAR10_STD if rgb else 0.25) if std is None else std, num_channels)
        if not (std > 0).all():
            raise ValueError(f"std must be positive for every channel, got a smallest value of {std.min().item():g}.")
        shape = (num_channels,) + (1,) * spatial_dims
        device = torch.get_default_device()
        self.register_buffer("mean", mean.to(device).expand(num_channels).reshape(shape).clone())
        self.register_buffer("std", std.to(device).expand(num_channels).reshape(shape).clone())

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
    return values  # not yet one for each channel: of a file's number of channels no memory is taken on "meta"


@dataclass(frozen=True)
class Images:
    """What images a network takes.

    Args:
        channels: How many channels.
        size: Height and width, in pixels.
        mean: Subtracted from each channel before the first layer; default CIFAR-10's for 3 channels, otherwise 0.5.
        std: What each channel is divided by after that; default CIFAR-10's for 3 channels, otherwise 0.25.
    """

    channels: int = 3
    size: int = 32
    mean: Statistic = None
    std: Statistic = None

    def check_size(self, smallest: int, what: str) -> None:
        """Raise a ValueError if images are too small for a network called ``what``."""
        if self.size < smallest:
            raise ValueError(f"image_size must be at least {smallest} for {what}, got {self.size}.")


class ZooModel(nn.Module):
    """A classifier of inputs of one shape, whose first layer normalises them.

    Args:
        input_shape: Shape of one input, ``(channels, height, width)`` or ``(features,)``.
        mean: Subtracted from inputs; default CIFAR-10's values for images of 3 channels, otherwise 0.5.
        std: What they are divided by; default CIFAR-10's values for images of 3 channels, otherwise 0.25.
    """

    zoo_entry: tuple[str, dict[str, Any]]  # set by `modeconn.network.registry.factory`, read by its `describe`

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


class ImageModel(ZooModel):
    """A classifier of square images, whose first layer normalises them."""

    def __init__(self, images: Images) -> None:
        super().__init__((images.channels, images.size, images.size), images.mean, images.std)


_ARGUMENTS = """
    Args:
        num_classes: Number of logits.{width}
        in_channels: Channels of the images.
        image_size: Height and width of the images{smallest}.
        mean: Subtracted from each channel before the first layer; default CIFAR-10's for 3 channels, otherwise 0.5.
        std: What each channel is divided by after that; default CIFAR-10's for 3 channels, otherwise 0.25.
        seed: Of the initial weights.
"""


def image_factory(
    name: str, make: Callable[[int, Images], ImageModel], about: str, *, reference: str, smallest: int | None = None
) -> Callable[..., ImageModel]:
    """Enter a factory of a network for images into the zoo.

    Args:
        name: The factory's name.
        make: From the number of classes and the images to the network.
        about: The first paragraphs of the factory's docstring.
        reference: The paper.
        smallest: The smallest images that the network takes, if any are too small.
    """

    def network(
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        mean: Statistic = None,
        std: Statistic = None,
        seed: int = 0,
    ) -> ImageModel:
        return make(num_classes, Images(in_channels, image_size, mean, std))

    return _entered(network, name, about, reference, smallest, "")


def wide_image_factory(
    name: str, make: Callable[..., ImageModel], about: str, *, width: str, reference: str, smallest: int | None = None
) -> Callable[..., ImageModel]:
    """Enter a factory of a network of any width into the zoo; ``width`` says what the argument of that name does.

    The network is made by ``make(num_classes, images, width=...)``; see `image_factory` for the other arguments.
    """

    def network(
        num_classes: int = 10,
        *,
        width: float = 1,
        in_channels: int = 3,
        image_size: int = 32,
        mean: Statistic = None,
        std: Statistic = None,
        seed: int = 0,
    ) -> ImageModel:
        return make(num_classes, Images(in_channels, image_size, mean, std), width=width)

    return _entered(network, name, about, reference, smallest, f"\n        width: {width}")


def _entered(
    network: Callable[..., ImageModel], name: str, about: str, reference: str, smallest: int | None, width: str
) -> Callable[..., ImageModel]:
    at_least = "" if smallest is None else f", at least {smallest}"
    network.__name__ = network.__qualname__ = name
    network.__module__ = "modeconn.models"  # registered under the module where users import it from
    arguments = _ARGUMENTS.format(width=width, smallest=at_least)
    network.__doc__ = f"{about}\n{arguments}\n    References:\n        {reference}\n    "
    return factory(network)
