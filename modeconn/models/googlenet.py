"""GoogLeNet for small images, with auxiliary classifiers (Szegedy et al., 2015)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modeconn.models.zoo import ImageModel, Images, image_factory


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps the image size, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(channels, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class Inception(nn.Module):
    """Four branches over one input, concatenated: 1x1; 1x1 then 3x3; 1x1 then 3x3; 3x3 max-pooling then 1x1.

    The third branch is the "5x5" of the paper; like everywhere since the TensorFlow port, it is 3x3.

    Args:
        in_channels: Channels of the input.
        single: Channels of the first branch.
        reduce2: Channels inside the second branch, then ``out2`` at its end.
        out2: See ``reduce2``.
        reduce3: Channels inside the third branch, then ``out3`` at its end.
        out3: See ``reduce3``.
        pooled: Channels of the fourth branch.
    """

    def __init__(
        self, in_channels: int, single: int, reduce2: int, out2: int, reduce3: int, out3: int, pooled: int
    ) -> None:
        super().__init__()
        self.branch1 = ConvNormReLU(in_channels, single, 1)
        self.branch2 = nn.Sequential(ConvNormReLU(in_channels, reduce2, 1), ConvNormReLU(reduce2, out2, 3))
        self.branch3 = nn.Sequential(ConvNormReLU(in_channels, reduce3, 1), ConvNormReLU(reduce3, out3, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvNormReLU(in_channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Sequential):
    """A classifier on an inner layer, used in training only: pooling to 4x4, 1x1 convolution, two linear layers."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(4),
            ConvNormReLU(in_channels, 128, 1),
            nn.Flatten(1),
            nn.Linear(128 * 4 * 4, 1024),
            nn.ReLU(inplace=True),
            nn.Dropout(0.7),
            nn.Linear(1024, num_classes),
        )


class Outputs(NamedTuple):
    """What GoogLeNet returns in train mode: scores ``(N, C)``, and those of its auxiliary heads."""

    logits: Tensor
    aux1: Tensor
    aux2: Tensor


class GoogLeNet(ImageModel):
    """Nine inception blocks after a stem that keeps small images large.

    Against the paper's network for 224 pixels, the stem's first convolution has stride 1, and the poolings after it
    and before the last two blocks are left out (Tatro et al., 2020): 32 pixels become 16, then 8.

    Returns logits ``(N, C)`` in eval mode, and in train mode `Outputs`.
    """

    def __init__(self, num_classes: int, images: Images) -> None:
        super().__init__(images)
        self.stem = nn.Sequential(
            ConvNormReLU(images.channels, 64, 7),
            ConvNormReLU(64, 64, 1),
            ConvNormReLU(64, 192, 3),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
        )
        self.to_auxiliary1 = nn.Sequential(
            Inception(192, 64, 96, 128, 16, 32, 32),
            Inception(256, 128, 128, 192, 32, 96, 64),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Inception(480, 192, 96, 208, 16, 48, 64),
        )
        self.to_auxiliary2 = nn.Sequential(
            Inception(512, 160, 112, 224, 24, 64, 64),
            Inception(512, 128, 128, 256, 24, 64, 64),
            Inception(512, 112, 144, 288, 32, 64, 64),
        )
        self.to_end = nn.Sequential(
            Inception(528, 256, 160, 320, 32, 128, 128),
            Inception(832, 256, 160, 320, 32, 128, 128),
            Inception(832, 384, 192, 384, 48, 128, 128),
        )
        self.auxiliary1 = AuxiliaryHead(512, num_classes)
        self.auxiliary2 = AuxiliaryHead(528, num_classes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1024, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor | Outputs:
        inner1 = self.to_auxiliary1(self.stem(self.normalize(x)))
        inner2 = self.to_auxiliary2(inner1)
        logits = self.classifier(self.dropout(self.pool(self.to_end(inner2)).flatten(1)))
        if self.training:
            return Outputs(logits, self.auxiliary1(inner1), self.auxiliary2(inner2))
        return logits


googlenet = image_factory(
    "googlenet",
    GoogLeNet,
    """Make GoogLeNet as Tatro et al. (2020) train it: 10,237,388 parameters at 100 classes, auxiliary heads included.

    In train mode it returns a tuple named ``logits``, ``aux1``, ``aux2``, which `modeconn.cross_entropy` weighs.""",
    reference="Szegedy et al., 2015, https://arxiv.org/abs/1409.4842",
)
