"""What a runtime's int8 kernels compute, to the last bit.

A kernel adds up exactly, in int32, and then brings the sum to the grid of its output in float32. How it does that differs, and it matters:
of some million numbers in a network for images, a few lie so near the middle between two codes that float64 rounds them to the other
side. Each changes a few percent of the codes that are computed from it by one, and at the end of a deep network one class in a hundred.

    sum                n = Q_w (q_x - z_x)
    ONNX Runtime       q = clip(round((n + b_q) m) + z)                       b_q = round(b / (s_x s_w)),  m = (s_x s_w) / s
    OpenVINO           q = clip(round(fma(n (s_x s_w) + b_q (s_x s_w), k, k_0)))  k = 255 / (h - l),  k_0 = -255 l / (h - l)

with `l`, `h` the ends of the output's grid. Real numbers:

    ONNX Runtime       q = clip(round(x / s) + z)
    OpenVINO           q = clip(round(fma(x, k, k_0)))

Sums of two tensors, one step and zero-point each:

    ONNX Runtime       q = clip(round(fma(q_a, m_a, fma(q_b, m_b, z - (m_a z_a + m_b z_b)))))     m_a = s_a / s,  m_b = s_b / s
    OpenVINO           q = clip(round(fma(fma(q_a, r, -z_a r) + (q_b - z_b), k, k_0)))           r = s_a / s_b,  l and h over s_b

OpenVINO fuses a sum into a convolution that it alone reads: `q_a`, the convolution's code, is clipped but not rounded then. (There, one
code in some hundred thousand still comes out otherwise.)

All in float32, rounded where it is written, ties to even; `fma` rounds once.

Source:
    Found by comparing the kernels of ONNX Runtime 1.32 (MLAS, AVX-512) and OpenVINO 2026.4 (oneDNN) with candidates on some million
    random sums; `tests/export/test_arithmetic.py` does so again, and `studies/openvino_multiplier.py` for `k`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from subbyte.export.markers import TensorGrid

LEVELS = 255.0


class Arithmetic(ABC):
    """How a runtime brings exact sums to a grid.

    Args:
        fuses_sums: whether a convolution's output is not rounded where a sum alone reads it.

    Example:
        >>> isinstance(OnnxRuntimeArithmetic(), Arithmetic)
        True
    """

    fuses_sums: bool = False

    @abstractmethod
    def of_real(self, x: Tensor, grid: TensorGrid) -> Tensor:
        """Codes of real numbers.

        Args:
            x: float32, any shape.
            grid: of the output.
        """

    @abstractmethod
    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid, *, rounded: bool = True) -> Tensor:
        """Codes of a convolution's output.

        Args:
            sums: `n`, whole numbers, float64 (N, C, ...).
            bias_codes: `b_q`, whole numbers, float64, broadcastable to `sums`.
            unit: `s_x s_w`, float32, broadcastable to `sums`.
            grid: of the output.
            rounded: to whole numbers; otherwise codes are only clipped.
        """

    @abstractmethod
    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """Codes of a sum of two tensors.

        Args:
            a: codes, float64, any shape, and their grid; whole numbers, except where sums are fused.
            b: codes, whole numbers, broadcastable to `a`, and their grid.
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

    def of_real(self, x: Tensor, grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            x: float32, any shape.
            grid: of the output.
        """
        return grid.codes(x)

    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid, *, rounded: bool = True) -> Tensor:
        """See `Arithmetic`.

        Args:
            sums: float64 (N, C, ...).
            bias_codes: float64, broadcastable.
            unit: float32, broadcastable to `sums`.
            grid: of the output.
            rounded: to whole numbers.
        """
        multiplier = unit / torch.tensor(grid.scale)
        steps = (sums + bias_codes).float() * multiplier
        return _clipped((steps.round() if rounded else steps) + grid.zero_point, grid)

    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            a: float64, any shape, and its grid.
            b: float64, the shape of `a`, likewise.
            grid: of the output.
        """
        ratios = [torch.tensor(part.scale) / torch.tensor(grid.scale) for _, part in (a, b)]
        zeros = [ratio * torch.tensor(float(part.zero_point)) for ratio, (_, part) in zip(ratios, (a, b), strict=True)]
        rest = torch.tensor(float(grid.zero_point)) - (zeros[0] + zeros[1])
        return _clipped(_fma(a[0], ratios[0], _fma(b[0], ratios[1], rest)).round(), grid)


@dataclass(frozen=True)
class OpenVINOArithmetic(Arithmetic):
    """That of oneDNN as OpenVINO calls it: exact sums become real numbers, and these codes.

    Example:
        >>> from subbyte.export.markers import TensorGrid
        >>> grid, unit = TensorGrid(0.5, 3, 0, 255), torch.tensor([0.25])
        >>> OpenVINOArithmetic().of_convolution(torch.tensor([[7.0]]), torch.tensor([2.0]), unit, grid)
        tensor([[8.]])
    """

    fuses_sums = True

    def of_real(self, x: Tensor, grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            x: float32, any shape.
            grid: of the output.
        """
        return _clipped(_fma(x, *_levels(grid)).round(), grid)

    def of_convolution(self, sums: Tensor, bias_codes: Tensor, unit: Tensor, grid: TensorGrid, *, rounded: bool = True) -> Tensor:
        """See `Arithmetic`.

        Args:
            sums: float64 (N, C, ...).
            bias_codes: float64, broadcastable.
            unit: float32, broadcastable to `sums`.
            grid: of the output.
            rounded: to whole numbers.
        """
        codes = _fma(sums.float() * unit + bias_codes.float() * unit, *_levels(grid))
        return _clipped(codes.round() if rounded else codes, grid)

    def of_sum(self, a: tuple[Tensor, TensorGrid], b: tuple[Tensor, TensorGrid], grid: TensorGrid) -> Tensor:
        """See `Arithmetic`.

        Args:
            a: float64, any shape, and its grid.
            b: float64, the shape of `a`, likewise.
            grid: of the output.
        """
        (first, one), (second, other) = a, b
        ratio = torch.tensor(one.scale) / torch.tensor(other.scale)
        total = _fma(first, ratio, -one.zero_point * ratio) + (second - other.zero_point).float()
        return _clipped(_fma(total, *_levels(grid, other.scale)).round(), grid)


def _levels(grid: TensorGrid, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """`k` and `k_0` of OpenVINO's grids, float32 (), for numbers in units of `unit`."""
    step = torch.tensor(grid.scale)
    low, high = (step * end / torch.tensor(unit) for end in (-grid.zero_point, LEVELS - grid.zero_point))
    levels = torch.tensor(LEVELS)  # a Python number over a tensor would be its reciprocal times the number, rounded twice
    return levels / (high - low), -low * levels / (high - low)


def _clipped(codes: Tensor, grid: TensorGrid) -> Tensor:
    return codes.clamp(grid.low, grid.high)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a b + c`, float32, rounded once: the product of two float32 numbers is exact in float64."""
    return (a.double() * b.double() + c.double()).float()
