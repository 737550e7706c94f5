"""The small convolutional network of Garipov et al. (2018)."""

from __future__ import annotations

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.zoo import ImageModel, Images, wide_image_factory

_CHANNELS = (32, 64, 128)
_HIDDEN = 1000
_SMALLEST_IMAGE = 15


class ConvFC(ImageModel):
    """Three 5x5 convolutions with overlapping max-pooling, then three linear layers."""

    def __init__(self, num_classes: int, images: Images, *, width: float = 1) -> None:
        super().__init__(images)
        images.check_size(_SMALLEST_IMAGE, "ConvFC")
        *widths, hidden = (round(width * units) for units in (*_CHANNELS, _HIDDEN))
        if widths[0] < 1:
            raise ValueError(f"width must leave at least 1 of the first convolution's 32 channels, got width={width}.")

        layers: list[nn.Module] = []
        in_channels, side = images.channels, images.size
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


conv_fc = wide_image_factory(
    "conv_fc",
    ConvFC,
    "Make ConvFC, a network without norm layers: 2.4 million parameters.",
    width="Factor on the number of channels, 32, 64 and 128, and on that of hidden units, 1000.",
    reference="Garipov et al., 2018, https://arxiv.org/abs/1802.10026",
    smallest=_SMALLEST_IMAGE,
)
