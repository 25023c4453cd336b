"""What a runtime's int8 kernels compute, to the last bit.

A kernel adds up exactly, in int32, and then brings the sum to the grid of its output in float32. How it does that differs, and it matters:
of some million numbers in a network for images, a few lie so near the middle between two codes that float64 rounds them to the other
side. Each changes a few percent of the codes that are computed from it by one, and at the end of a deep network one class in a hundred.

    sum                n = Q_w (q_x - z_x)
    ONNX Runtime       q = clip(round((n + b_q) m) + z)                       b_q = round(b / (s_x s_w)),  m = (s_x s_w) / s
    OpenVINO           q = clip(round(fma(n (s_x s_w) + b_q (s_x s_w), k, k_0)))  k = 255 / (h - l),  k_0 = -255 l / (h - l)

with `l`, `h` the ends of the output's grid. Sums of two tensors, one step and zero-point each:

    ONNX Runtime       q = clip(round(fma(q_a, m_a, fma(q_b, m_b, z - (m_a z_a + m_b z_b)))))     m_a = s_a / s,  m_b = s_b / s

All in float32, rounded where it is written, ties to even; `fma` rounds once.

Source:
    Found by comparing the kernels of ONNX Runtime 1.32 (MLAS, AVX-512) and OpenVINO 2026.4 (oneDNN) with candidates on some million
    random sums; `tests/export/test_arithmetic.py` does so again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from subbyte.export.markers import TensorGrid

LEVELS = 255


class Arithmetic(ABC):
    """How a runtime brings exact sums to a grid.

    Example:
        >>> isinstance(OnnxRuntimeArithmetic(), Arithmetic)
        True
    """

    @abstractmethod
    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid) -> Tensor:
        """Codes of a convolution's output.

        Args:
            sums: `n`, whole numbers, float64 (N, C, ...).
            bias_codes: `b_q`, whole numbers, float64, broadcastable to `sums`.
            unit: `s_x s_w`, float32, likewise.
            grid: of the output.
        """

    @abstractmethod
    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """Codes of a sum of two tensors.

        Args:
            a: codes, whole numbers, float64, any shape, and their grid.
            b: likewise, broadcastable to `a`.
            grid: of the output.
        """


@dataclass(frozen=True)
class OnnxRuntimeArithmetic(Arithmetic):
    """That of MLAS: biases are added as whole numbers, one multiplier for each channel.

    Example:
        >>> from subbyte.export.markers import TensorGrid
        >>> grid, unit = TensorGrid(0.5, 3, 0, 255), torch.tensor([0.25])
        >>> OnnxRuntimeArithmetic().of_convolution(torch.tensor([[7.0]]), torch.tensor([2.0]), unit, grid)
        tensor([[7.]])
    """

    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            sums: float64 (N, C, ...).
            bias_codes: float64, broadcastable.
            unit: float32, broadcastable.
            grid: of the output.
        """
        multiplier = unit / torch.tensor(grid.scale)
        return _clipped(((sums + bias_codes).float() * multiplier).round() + grid.zero_point, grid)

    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            a: float64, any shape, and its grid.
            b: likewise.
            grid: of the output.
        """
        ratios = [torch.tensor(part.scale) / torch.tensor(grid.scale) for _, part in (a, b)]
        zeros = [ratio * torch.tensor(float(part.zero_point)) for ratio, (_, part) in zip(ratios, (a, b), strict=True)]
        rest = torch.tensor(float(grid.zero_point)) - (zeros[0] + zeros[1])
        return _clipped(_fma(a[0], ratios[0], _fma(b[0], ratios[1], rest)).round(), grid)


@dataclass(frozen=True)
class OpenVINOArithmetic(Arithmetic):
    """That of oneDNN as OpenVINO calls it: sums become real numbers, and these codes.

    Example:
        >>> from subbyte.export.markers import TensorGrid
        >>> grid, unit = TensorGrid(0.5, 3, 0, 255), torch.tensor([0.25])
        >>> OpenVINOArithmetic().of_convolution(torch.tensor([[7.0]]), torch.tensor([2.0]), unit, grid)
        tensor([[8.]])
    """

    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            sums: float64 (N, C, ...).
            bias_codes: float64, broadcastable.
            unit: float32, broadcastable.
            grid: of the output.
        """
        return self._to_grid(sums.float() * unit + bias_codes.float() * unit, grid)

    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            a: float64, any shape, and its grid.
            b: likewise.
            grid: of the output.
        """
        first, second = ((codes - one.zero_point).float() * torch.tensor(one.scale) for codes, one in (a, b))
        return self._to_grid(first + second, grid)

    def _to_grid(self, x: Tensor, grid: TensorGrid) -> Tensor:
        """Codes of real numbers, float32, any shape."""
        step, levels = torch.tensor(grid.scale), torch.tensor(float(LEVELS))
        low, high = step * -grid.zero_point, step * (LEVELS - grid.zero_point)
        return _clipped(_fma(x, levels / (high - low), -low * levels / (high - low)).round(), grid)


def _clipped(codes: Tensor, grid: TensorGrid) -> Tensor:
    return codes.clamp(grid.low, grid.high)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a b + c`, float32, rounded once: the product of two float32 numbers is exact in float64."""
    return (a.double() * b.double() + c.double()).float()
