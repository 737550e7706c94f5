"""Residual networks for small images, with basic blocks (He et al., 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from modeconn.models.init import he_init_convolutions
from modeconn.models.stages import stages
from modeconn.models.zoo import Statistic, ZooModel
from modeconn.network.registry import factory


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


class ResNet(ZooModel):
    """A stem, three stages of basic blocks with 16, 32 and 64 channels times ``width``, pooling, one linear layer."""

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int,
        width: float,
        in_channels: int,
        image_size: int,
        mean: Statistic = None,
        std: Statistic = None,
    ) -> None:
        super().__init__((in_channels, image_size, image_size), mean, std)
        stage_channels = [round(width * channels) for channels in (16, 32, 64)]
        if stage_channels[0] < 1:
            raise ValueError(f"width must leave at least 1 of the stem's 16 channels, got width={width}.")

        channels = stage_channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.stages = stages(BasicBlock, channels, [[channels] * blocks_per_stage for channels in stage_channels])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(stage_channels[-1], num_classes)
        he_init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(self.normalize(x)))).flatten(1))


@factory
def resnet20(
    num_classes: int = 10,
    *,
    width: float = 1,
    in_channels: int = 3,
    image_size: int = 32,
    mean: Statistic = None,
    std: Statistic = None,
    seed: int = 0,
) -> ResNet:
    """Make a ResNet with 3 basic blocks in each of 3 stages; arguments as for `resnet32`."""
    return ResNet(3, num_classes, width, in_channels, image_size, mean, std)


@factory
def resnet32(
    num_classes: int = 10,
    *,
    width: float = 1,
    in_channels: int = 3,
    image_size: int = 32,
    mean: Statistic = None,
    std: Statistic = None,
    seed: int = 0,
) -> ResNet:
    """Make a ResNet with 5 basic blocks in each of 3 stages: 472,756 parameters at 100 classes.

    Shortcuts that change shape are 1x1 convolutions with batch norm, as Tatro et al. (2020) have them.

    Args:
        num_classes: Number of logits.
        width: Factor on the number of channels, 16 in the stem.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        mean: Per channel, for the first layer; see `modeconn.models.Normalize`.
        std: Likewise.
        seed: Of the initial weights.

    References:
        He et al., 2016, https://arxiv.org/abs/1512.03385
    """
    return ResNet(5, num_classes, width, in_channels, image_size, mean, std)
