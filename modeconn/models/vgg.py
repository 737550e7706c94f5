"""VGG networks for small images, with and without batch norm (Simonyan & Zisserman, 2015)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.zoo import ImageModel, Images, image_factory

_STAGE_CHANNELS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_SMALLEST_IMAGE = 2 ** len(_STAGE_CHANNELS)


class VGG(ImageModel):
    """Five stages of 3x3 convolutions, each ended by max-pooling; two hidden linear layers of 512 with dropout."""

    def __init__(self, depth: int, batch_norm: bool, num_classes: int, images: Images) -> None:
        super().__init__(images)
        images.check_size(_SMALLEST_IMAGE, "VGG")

        layers: list[nn.Module] = []
        in_channels = images.channels
        for channels, count in zip(_STAGE_CHANNELS, _CONVOLUTIONS[depth], strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(in_channels * (images.size // _SMALLEST_IMAGE) ** 2, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
        he_init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalize(x)).flatten(1))


def _vgg_factory(depth: int, *, batch_norm: bool) -> Callable[..., ImageModel]:
    return image_factory(
        f"vgg{depth}_bn" if batch_norm else f"vgg{depth}",
        partial(VGG, depth, batch_norm),
        f"""Make a VGG{depth} {"with" if batch_norm else "without"} batch norm, head 512-512-classes.

    The head is that of Garipov et al. (2018, https://arxiv.org/abs/1802.10026).""",
        reference="Simonyan & Zisserman, 2015, https://arxiv.org/abs/1409.1556",
        smallest=_SMALLEST_IMAGE,
    )


vgg11, vgg16, vgg19 = (_vgg_factory(depth, batch_norm=False) for depth in (11, 16, 19))
vgg11_bn, vgg16_bn, vgg19_bn = (_vgg_factory(depth, batch_norm=True) for depth in (11, 16, 19))
