"""MobileNetV1: thirteen pairs of a depthwise 3x3 and a pointwise 1x1 convolution.

The hard case of low-bit quantization: a depthwise filter sums nine products only, so that an error has nothing to average out against, and
the ranges of neighbouring channels differ by orders of magnitude.

Padding is 'same' as TensorFlow counts it, out = ceil(in / stride), with the odd row and column below and to the right:

    total = max((ceil(in / stride) - 1) stride + 3 - in, 0)      before = floor(total / 2)      after = total - before

which for stride 1 is the usual padding of 1, and for stride 2 on an even side is 0 before and 1 after.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.errors import OptionError

__all__ = ["MobileNetV1"]

STEM_CHANNELS = 32
BLOCK_CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # at width 1
HALVING_BLOCKS = frozenset({1, 3, 5, 11})
BATCH_NORM_EPSILON = 1e-3


class _ConvNorm(nn.Module):
    """A convolution and its batch norm; `MobileNetV1.forward` runs them."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0  # with a stride, the network pads by the size of the input
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPSILON)


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """TensorFlow's 'same' padding of (batch, channels, height, width) for a convolution with a stride."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if stride == 1:
        return x
    return F.pad(x, _same_padding(x.shape[-1], kernel, stride) + _same_padding(x.shape[-2], kernel, stride))


def _same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


class _SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution; `MobileNetV1.forward` runs them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = _ConvNorm(in_channels, in_channels, 3, stride=stride, groups=in_channels)
        self.pointwise = _ConvNorm(in_channels, out_channels, 1)


class MobileNetV1(nn.Module):
    """MobileNetV1 at any width.

    Takes float32 (batch, 3, height, width), RGB in -1..1; gives float32 (batch, classes), logits.

    Args:
        width: factor on the channels of every layer, above 0.
        classes: length of the output.

    Raises:
        OptionError: if `width` or `classes` is not positive.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017, table 1.

    Example:
        >>> import torch
        >>> MobileNetV1(width=0.25, classes=10).eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: float = 0.75, classes: int = 1000) -> None:
        if width <= 0 or classes < 1:
            raise OptionError(f"width and classes must be positive, not {width} and {classes}")
        super().__init__()
        stem, *channels = (max(8, int(count * width)) for count in (STEM_CHANNELS, *BLOCK_CHANNELS))
        self.stem = _ConvNorm(3, stem, 3, stride=2)
        self.blocks = nn.ModuleList(
            [
                _SeparableBlock(in_channels, out_channels, stride=2 if index in HALVING_BLOCKS else 1)
                for index, (in_channels, out_channels) in enumerate(zip([stem, *channels], channels, strict=False))
            ]
        )
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 (batch, classes), of pictures, float32 (batch, 3, height, width), RGB in -1..1."""
        blocks = cast(Iterable[_SeparableBlock], self.blocks)  # to the type checker a ModuleList holds any modules
        layers = [self.stem, *(layer for block in blocks for layer in (block.depthwise, block.pointwise))]
        for layer in layers:  # in one frame, with one name for what flows, so that no caller keeps a layer's input alive
            x = _padded(x, layer.conv)
            x = layer.conv(x)
            x = F.relu6(layer.bn(x))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
