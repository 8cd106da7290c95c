"""The residual networks for images of 32×32 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.zoo.residual import Block

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56 or 110: [batch, 3, 32, 32] → logits [batch, classes].

    ``depth`` = 6 n + 2: a first convolution, three stages of n blocks of two convolutions, and a linear layer. Where
    the width changes the shortcut is a 1×1 convolution (option B). Raises InputError for other depths.
    Source: He et al. 2015 (arXiv 1512.03385), section 4.2, who pad the shortcut with zeros (option A).
    """

    def __init__(self, depth: int = 20, classes: int = 10):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise InputError("no such depth", where="CifarResNet.depth", got=depth, expected="6 n + 2: 20, 32, 56 …")
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages, width = [], WIDTHS[0]
        for number, channels in enumerate(WIDTHS):
            for index in range(blocks):
                stages.append(Block(width, channels, 2 if number > 0 and index == 0 else 1))
                width = channels
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layers(x).mean(dim=(2, 3)))
