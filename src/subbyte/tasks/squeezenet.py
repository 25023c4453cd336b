"""SqueezeNet 1.1: eight fire modules, no batch norm and no linear layer.

A fire module squeezes its input to few channels with a 1x1 convolution and expands them again, one part with 1x1, the other with 3x3
filters; both parts read the same tensor. The last convolution has one channel a class, and the average over the picture is the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.errors import OptionError

__all__ = ["SqueezeNet11"]


class _Fire(nn.Module):
    """concat(relu(expand1x1(s)), relu(expand3x3(s))) with s = relu(squeeze1x1(x))."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeNet11(nn.Module):
    """SqueezeNet 1.1.

    Takes float32 (batch, 3, height, width), BGR in 0..255 less the mean; gives float32 (batch, classes), logits, none of them below 0,
    because the last convolution is followed by a ReLU too.

    Args:
        classes: length of the output.

    Raises:
        OptionError: if `classes` is not positive.

    Source: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016; the layers of
    version 1.1 as in the authors' public release.

    Example:
        >>> SqueezeNet11(classes=10).eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 1000) -> None:
        if classes < 1:
            raise OptionError(f"classes must be positive, not {classes}")
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire2 = _Fire(64, 16, 64)
        self.fire3 = _Fire(128, 16, 64)
        self.fire4 = _Fire(128, 32, 128)
        self.fire5 = _Fire(256, 32, 128)
        self.fire6 = _Fire(256, 48, 192)
        self.fire7 = _Fire(384, 48, 192)
        self.fire8 = _Fire(384, 64, 256)
        self.fire9 = _Fire(512, 64, 256)
        self.conv10 = nn.Conv2d(512, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 (batch, classes), of pictures, float32 (batch, 3, height, width)."""
        x = _halve(F.relu(self.conv1(x)))
        x = _halve(self.fire3(self.fire2(x)))
        x = _halve(self.fire5(self.fire4(x)))
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))
        return F.adaptive_avg_pool2d(F.relu(self.conv10(x)), 1).flatten(1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
