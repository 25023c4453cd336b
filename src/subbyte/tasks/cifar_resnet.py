"""The residual networks for CIFAR-10: three stages of basic blocks, 16, 32 and 64 channels wide.

    depth = 6 n + 2          one convolution, 3 stages of n blocks of 2 convolutions, one linear layer

A block adds its input to its output. Where a stage halves the picture and doubles the channels, the shortcut has no weights ("option A" of
the paper): every second pixel is kept and the missing channels are zeros, half of them before and half after.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.errors import OptionError

__all__ = ["CifarResNet"]


class _BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A residual network for 32x32 pictures in ten classes.

    Takes float32 (batch, 3, height, width), normalised; gives float32 (batch, 10), logits.

    Args:
        depth: layers with weights, 6 n + 2: 20, 32, 44, 56, 110.

    Raises:
        OptionError: if `depth` is not 6 n + 2 for an n of at least 1.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.

    Example:
        >>> import torch
        >>> CifarResNet(20).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise OptionError(f"a residual network for CIFAR has 6 n + 2 layers (8, 14, 20, ...), not {depth}")
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1, blocks=blocks)
        self.layer2 = _stage(16, 32, stride=2, blocks=blocks)
        self.layer3 = _stage(32, 64, stride=2, blocks=blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 (batch, 10), of normalised pictures, float32 (batch, 3, height, width)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = _BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(_BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
