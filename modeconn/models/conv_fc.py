"""The small convolutional network of Garipov et al. (2018)."""

from __future__ import annotations

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.zoo import Statistic, ZooModel
from modeconn.network.registry import factory

_CHANNELS = (32, 64, 128)
_HIDDEN = 1000
_SMALLEST_IMAGE = 15


class ConvFC(ZooModel):
    """Three 5x5 convolutions with overlapping max-pooling, then three linear layers."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: float = 1,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__((in_channels, image_size, image_size), mean, std)
        if image_size < _SMALLEST_IMAGE:
            raise ValueError(f"image_size must be at least {_SMALLEST_IMAGE} for ConvFC, got {image_size}.")
        *widths, hidden = (round(width * units) for units in (*_CHANNELS, _HIDDEN))
        if widths[0] < 1:
            raise ValueError(f"width must leave at least 1 of the first convolution's 32 channels, got width={width}.")

        layers: list[nn.Module] = []
        side = image_size
        for channels in widths:
            layers += [nn.Conv2d(in_channels, channels, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)]
            in_channels = channels
            side = (side - 3) // 2 + 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(in_channels * side**2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        he_init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalize(x)).flatten(1))


@factory
def conv_fc(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1,
    mean: Statistic = None,
    std: Statistic = None,
    seed: int = 0,
) -> ConvFC:
    """Make ConvFC (Garipov et al., 2018, https://arxiv.org/abs/1802.10026): no norm layers, 2.4 million parameters.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 15.
        width: Factor on the number of channels, 32, 64 and 128, and on that of hidden units, 1000.
        mean: Per channel, for the first layer; see `modeconn.models.Normalize`.
        std: Likewise.
        seed: Of the initial weights.
    """
    return ConvFC(num_classes, in_channels, image_size, width, mean, std)
