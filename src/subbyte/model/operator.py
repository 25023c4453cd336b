"""The interface of operators: the arithmetic of a layer, seen as one matrix problem on rows.

A layer computes, in each of its `G` groups and for each row `x` (the inputs under one output position),

    y = W x + b        W: (O, n),  x: (n,),  y: (O,)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Operator(ABC):
    """A layer's arithmetic without its weights."""

    channel_dimension: ClassVar[int]
    """Where the layer's output counts its channels."""
    multiplies: ClassVar[bool] = True
    """Whether the layer multiplies its input; else it looks rows of its weight up, has no bias, and its input is never quantized."""

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output.

        Args:
            x: input, float (samples, ...) as the layer accepts it.
            weight: float, the layer's weight shape.
            bias: float (C_out,) or None.
        """

    @abstractmethod
    def layout(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions that the output's rows are numbered in, samples first: the output's shape without its channels.

        Args:
            x: input, shape as the layer accepts it.
        """

    def count(self, x: Tensor) -> tuple[int, int]:
        """`(samples, output positions of each sample)` of an input.

        Args:
            x: input, shape as the layer accepts it.
        """
        samples, *positions = self.layout(x)
        return samples, math.prod(positions)

    @abstractmethod
    def macs(self, x: Tensor, weight: Tensor) -> int:
        """Multiply-accumulate operations for one sample.

        Args:
            x: input, shape as the layer accepts it.
            weight: the layer's weight shape.
        """

    @abstractmethod
    def rows(self, x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """The inputs under chosen output positions.

        Args:
            x: input, float, shape as the layer accepts it.
            samples: int64 (R,), index of each row's sample.
            positions: int64 (R,), index of each row's output position within its sample, row-major.

        Returns:
            Float (G, R, n).
        """

    @abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as matrices.

        Args:
            weight: any dtype, the layer's weight shape.

        Returns:
            (G, O, n), the dtype of `weight`.
        """

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`.

        Args:
            matrix: any dtype, (G, O, n).

        Returns:
            The layer's weight shape.
        """

    @abstractmethod
    def per_channel(self, values: Tensor, weight: Tensor) -> Tensor:
        """One number for each output channel, laid out so that it broadcasts against the weight.

        Args:
            values: any dtype, (C_out,) with C_out = G * O.
            weight: any dtype, the layer's weight shape.
        """

    @abstractmethod
    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """One number for each input channel, laid out so that it broadcasts against the weight.

        Args:
            values: any dtype, (C_in,).
            weight: any dtype, the layer's weight shape.
        """

    @abstractmethod
    def weight_gradients(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """For each sample by itself, the gradient of `sum gradient * y` for the weight.

        Args:
            x: input, float (samples, ...), as the layer accepts it, with a dimension of samples.
            gradient: float, the shape of the layer's output for `x`.
            weight: the layer's weight shape; its numbers are not read.

        Returns:
            Float (samples, ...), the weight's shape behind the samples.
        """


def beside_channels(x: Tensor, channel_dimension: int) -> list[int]:
    """Dimensions of a layer's input or output that count no channels.

    Args:
        x: any dtype, any shape.
        channel_dimension: where it counts its channels; may be negative.

    Example:
        >>> import torch
        >>> beside_channels(torch.zeros(2, 3, 4), 1), beside_channels(torch.zeros(2, 3, 4), -1)
        ([0, 2], [0, 1])
    """
    return [dimension for dimension in range(x.dim()) if dimension != channel_dimension % x.dim()]
