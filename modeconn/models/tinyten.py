"""TinyTen, the small ten-layer network of Tatro et al. (2020)."""

from __future__ import annotations

from torch import Tensor, nn

from modeconn.models.zoo import ImageModel, Images, image_factory

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


class TinyTen(ImageModel):
    """Eight convolutions with batch norm and ReLU, global average pooling, one linear layer."""

    def __init__(self, num_classes: int, images: Images) -> None:
        super().__init__(images)
        images.check_size(_SMALLEST_IMAGE, "TinyTen")

        layers: list[nn.Module] = []
        in_channels = images.channels
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


tinyten = image_factory(
    "tinyten",
    TinyTen,
    "Make TinyTen, the small ten-layer network of neuron alignment: 92,628 parameters at 100 classes.",
    reference="Tatro et al., 2020, https://arxiv.org/abs/2009.02439",
    smallest=_SMALLEST_IMAGE,
)
