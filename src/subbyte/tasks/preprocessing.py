"""What happens to a picture before the network sees it, as one value.

    x = (value_range  pixel / 255  -  mean) / std          per channel, channels in the model's order

Three customs are in use: 0..1 less the mean by the standard deviation of the training set, RGB (torch); -1..1, RGB (TensorFlow: mean 0.5,
std 0.5); 0..255 less the mean, BGR (Caffe: value_range 255, std 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from subbyte.errors import DataError, OptionError

__all__ = ["ChannelOrder", "Preprocessing"]


class ChannelOrder(Enum):
    """The order in which a model takes the three colours."""

    RGB = "rgb"
    BGR = "bgr"


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become what a model takes; the defaults give RGB in 0..1.

    Attributes:
        size: height and width in pixels, or one number for both; None leaves pictures as large as they are.
        mean: subtracted, one number a channel, in the model's channel order and after scaling to `value_range`; one number means grey
            pictures.
        std: divided by, one number a channel, like `mean`.
        channel_order: the order in which the model takes colours; files and byte arrays are in RGB.
        value_range: value of the brightest pixel before `mean` and `std`, usually 1.0 or 255.0.

    Raises:
        OptionError: if `mean` and `std` differ in length or are empty, if a number is out of range, or if BGR is asked of other than 3
            channels.

    Example:
        >>> caffe = Preprocessing(size=224, mean=(104, 117, 123), channel_order=ChannelOrder.BGR, value_range=255.0)
        >>> caffe.apply(torch.zeros(2, 224, 224, 3, dtype=torch.uint8)).shape
        torch.Size([2, 3, 224, 224])
    """

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channel_order: ChannelOrder = ChannelOrder.RGB
    value_range: float = 1.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise OptionError(f"mean and std need one number a channel each, but have {len(self.mean)} and {len(self.std)}")
        if not all(map(math.isfinite, self.mean)):
            raise OptionError(f"mean must be finite, not {self.mean}")
        if not all(math.isfinite(number) and number > 0 for number in (*self.std, self.value_range)):
            raise OptionError(f"std and value_range must be positive, not {self.std} and {self.value_range}")
        if self.height_and_width is not None and min(self.height_and_width) < 1:
            raise OptionError(f"size must be positive, not {self.size}")
        if self.channel_order is ChannelOrder.BGR and len(self.mean) != 3:
            raise OptionError(f"BGR needs 3 channels, but mean has {len(self.mean)}")

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """`size` as a pair of pixels, or None."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def apply(self, images: Tensor) -> Tensor:
        """What the model takes, of pictures that have their final size.

        Args:
            images: uint8 (images, height, width, channels), RGB or grey, 0 to 255.

        Returns:
            float32 (images, channels, height, width), on the same device.

        Raises:
            DataError: if `images` is of another type, or has not as many channels as `mean`.

        Example:
            >>> Preprocessing(mean=(0.5,), std=(0.5,)).apply(torch.tensor([[[[0], [255]]]], dtype=torch.uint8)).flatten()
            tensor([-1.,  1.])
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"expected uint8 (images, height, width, channels), but got {images.dtype} {tuple(images.shape)}")
        if images.shape[-1] != len(self.mean):
            raise DataError(_channel_mismatch(images.shape[-1], len(self.mean)))
        ordered = images.flip(-1) if self.channel_order is ChannelOrder.BGR else images
        return self.normalise(ordered.permute(0, 3, 1, 2).float() * (self.value_range / 255))

    def normalise(self, images: Tensor) -> Tensor:
        """The equation's second half, (images - mean) / std, for pictures that have the model's range and channel order already.

        Args:
            images: float32 (images, channels, height, width).

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            DataError: if `images` has another number of dimensions, or not as many channels as `mean`.

        Example:
            >>> Preprocessing(mean=(1.0,), std=(2.0,)).normalise(torch.tensor([[[[5.0]]]])).item()
            2.0
        """
        if images.ndim != 4:
            raise DataError(f"mean and std need (images, channels, height, width), but got {tuple(images.shape)}")
        if images.shape[1] != len(self.mean):
            raise DataError(_channel_mismatch(images.shape[1], len(self.mean)))
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
        return ((images - mean) / std).contiguous()


def _channel_mismatch(channels: int, expected: int) -> str:
    return f"the pictures have {channels} channels, but mean and std have {expected} numbers; give one number a channel"
