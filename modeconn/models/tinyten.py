"""TinyTen, the small ten-layer network of Tatro et al. (2020)."""

from __future__ import annotations

from torch import Tensor, nn

from modeconn.models.zoo import Statistic, ZooModel
from modeconn.network.registry import factory

# (channels, kernel size, stride, padding); the seventh convolution is unpadded.
_LAYERS = (
    (16, 3, 1, 1),
    (16, 3, 1, 1),
    (32, 3, 2, 1),
    (32, 3, 1, 1),
    (32, 3, 1, 1),
    (64, 3, 2, 1),
    (64, 3, 1, 0),
    (64, 1, 1, 0),
)
_SMALLEST_IMAGE = 9


class TinyTen(ZooModel):
    """Eight convolutions with batch norm and ReLU, global average pooling, one linear layer."""

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, mean: Statistic = None, std: Statistic = None
    ) -> None:
        super().__init__((in_channels, image_size, image_size), mean, std)
        if image_size < _SMALLEST_IMAGE:
            raise ValueError(f"image_size must be at least {_SMALLEST_IMAGE} for TinyTen, got {image_size}.")

        layers: list[nn.Module] = []
        for channels, kernel_size, stride, padding in _LAYERS:
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size, stride, padding),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(self.normalize(x))).flatten(1))


@factory
def tinyten(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    mean: Statistic = None,
    std: Statistic = None,
    seed: int = 0,
) -> TinyTen:
    """Make TinyTen (Tatro et al., 2020, https://arxiv.org/abs/2009.02439): 92,628 parameters at 100 classes.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 9.
        mean: Per channel, for the first layer; see `modeconn.models.Normalize`.
        std: Likewise.
        seed: Of the initial weights.
    """
    return TinyTen(num_classes, in_channels, image_size, mean, std)
