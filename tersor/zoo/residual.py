"""The residual network of the built-in tasks, written as one writes such a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: [batch, in_channels, h, w] → [batch, channels, h / stride, w / stride].

    Source: He et al. 2015 (arXiv 1512.03385), figure 2, with option B's projection where the shape changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.down = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.down(x))


class ResidualNet(nn.Module):
    """A small ResNet: [batch, in_channels, h, w] → logits [batch, classes].

    Args:
        widths: channels of each stage; every stage after the first halves height and width.
        blocks: residual blocks in each stage.
        in_channels, classes: of the data.
        stem_stride: stride of the first convolution.
    """

    def __init__(self, widths: Sequence[int], blocks: int, in_channels: int, classes: int, stem_stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages, width = [], widths[0]
        for number, channels in enumerate(widths):
            for index in range(blocks):
                stride = 2 if number > 0 and index == 0 else 1
                stages.append(Block(width, channels, stride))
                width = channels
        self.layers = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.pool(self.layers(x)).flatten(1)
        return self.fc(x)
