"""Residual networks for small images, with basic blocks (He et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.stages import stages
from modeconn.models.zoo import ImageModel, Images, wide_image_factory


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(ImageModel):
    """A stem, three stages of basic blocks with 16, 32 and 64 channels times ``width``, pooling, one linear layer."""

    def __init__(self, blocks_per_stage: int, num_classes: int, images: Images, *, width: float = 1) -> None:
        super().__init__(images)
        stage_channels = [round(width * channels) for channels in (16, 32, 64)]
        if stage_channels[0] < 1:
            raise ValueError(f"width must leave at least 1 of the stem's 16 channels, got width={width}.")

        channels = stage_channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(images.channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.stages = stages(BasicBlock, channels, [[channels] * blocks_per_stage for channels in stage_channels])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(stage_channels[-1], num_classes)
        he_init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(self.normalize(x)))).flatten(1))


def _resnet_factory(name: str, blocks_per_stage: int, size: str) -> Callable[..., ImageModel]:
    return wide_image_factory(
        name,
        partial(ResNet, blocks_per_stage),
        f"""Make a ResNet with {blocks_per_stage} basic blocks in each of 3 stages: {size} parameters at 100 classes.

    Shortcuts that change shape are 1x1 convolutions with batch norm, as Tatro et al. (2020) have them.""",
        width="Factor on the number of channels, 16 in the stem.",
        reference="He et al., 2016, https://arxiv.org/abs/1512.03385",
    )


resnet20 = _resnet_factory("resnet20", 3, "278,324")
resnet32 = _resnet_factory("resnet32", 5, "472,756")
