"""Pre-activation residual networks: deep with bottlenecks (He et al., 2016), or wide (Zagoruyko & Komodakis, 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.stages import stages
from modeconn.models.zoo import ImageModel, Images, image_factory

Branch = Callable[[int, int, int], list[nn.Conv2d]]
"""``branch(in_channels, out_channels, stride)`` lists the convolutions of one residual branch."""


def bottleneck(in_channels: int, out_channels: int, stride: int) -> list[nn.Conv2d]:
    """1x1 to a quarter of the channels, 3x3, 1x1 back; none has a bias."""
    channels = out_channels // 4
    return [
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
        nn.Conv2d(channels, out_channels, 1, bias=False),
    ]


def wide(in_channels: int, out_channels: int, stride: int) -> list[nn.Conv2d]:
    """Two 3x3 convolutions with bias; the second one strides, as Garipov et al. (2018) have it."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.Conv2d(out_channels, out_channels, 3, stride, padding=1),
    ]


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU *before* each convolution of the branch; the shortcut carries the raw stream."""

    def __init__(self, branch: Branch, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for convolution in branch(in_channels, out_channels, stride):
            layers += [nn.BatchNorm2d(convolution.in_channels), nn.ReLU(inplace=True), convolution]
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            biased = convolution.bias is not None
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=biased))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class PreActivationResNet(ImageModel):
    """A 16-channel stem, three stages of `PreActivationBlock`, batch norm, ReLU, pooling, one linear layer."""

    def __init__(self, branch: Branch, layout: Sequence[Sequence[int]], num_classes: int, images: Images) -> None:
        super().__init__(images)
        channels = 16
        biased = branch(channels, channels, 1)[0].bias is not None
        self.stem = nn.Conv2d(images.channels, channels, 3, padding=1, bias=biased)
        self.stages = stages(partial(PreActivationBlock, branch), channels, layout)
        channels = layout[-1][-1]
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(channels, num_classes)
        he_init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.stages(self.stem(self.normalize(x)))).flatten(1))


def _preresnet_factory(name: str, blocks_per_stage: int, about: str) -> Callable[..., ImageModel]:
    return image_factory(
        name,
        partial(PreActivationResNet, bottleneck, [[channels] * blocks_per_stage for channels in (64, 128, 256)]),
        f"Make a pre-activation ResNet with {blocks_per_stage} bottlenecks in each of 3 stages{about}.",
        reference="He et al., 2016, https://arxiv.org/abs/1603.05027",
    )


preresnet110 = _preresnet_factory("preresnet110", 12, "")
preresnet164 = _preresnet_factory("preresnet164", 18, ", as Garipov et al. (2018) train it")
wideresnet28x10 = image_factory(
    "wideresnet28x10",
    partial(PreActivationResNet, wide, [[channels] * 4 for channels in (160, 320, 640)]),
    """Make a wide ResNet, 28 layers deep and 10 times as wide, without dropout: 36.5 million parameters.

    The last batch norm has the usual momentum (Garipov et al. give that one 0.9); the initialisation is He's for all
    convolutions.""",
    reference="Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146",
)
