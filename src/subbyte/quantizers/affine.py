"""The affine equations, on tensors: from real numbers to codes and back.

    q  = clip(round(x / s) + z, lowest, highest)
    x^ = s (q - z)

Rounding is to the nearest integer, ties to even, as in ONNX QuantizeLinear.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from subbyte.quantizers.grid import Grid
from subbyte.quantizers.pieces import pieces


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of `x`: `clip(round(x / s) + z, lowest, highest)`.

    Args:
        x: real numbers, float, any shape.
        scale: step `s > 0`, float, broadcastable to `x`.
        zero_point: integer-valued `z`, any dtype, broadcastable to `x`.
        grid: the codes that exist.

    Returns:
        Codes, the shape and dtype of `x`, integer-valued.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), eq. 1; ONNX QuantizeLinear.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(2), Grid(3))
        tensor([0., 3., 7.])
    """
    return torch.clamp(torch.round(x / scale) + zero_point, grid.lowest, grid.highest)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The numbers that codes stand for: `s (q - z)`.

    Args:
        codes: `q`, integer-valued, any dtype, any shape.
        scale: step `s`, float, broadcastable to `codes`.
        zero_point: integer-valued `z`, any dtype, broadcastable to `codes`.

    Returns:
        Numbers in the shape of `codes` and the dtype of `scale`.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), eq. 1; ONNX DequantizeLinear.

    Example:
        >>> dequantize(torch.tensor([0, 3, 7]), torch.tensor(0.5), torch.tensor(2))
        tensor([-1.0000,  0.5000,  2.5000])
    """
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers on a per-tensor grid, `x^ = dequantize(quantize(x))`, with one new tensor and no mask for a backward pass.

    Args:
        x: real numbers, float32, any shape.
        scale: step `s > 0`, float32, scalar shape ().
        zero_point: integer-valued `z` among the grid's codes, int32, scalar shape ().
        grid: the codes that exist.

    Returns:
        Numbers on the grid, the shape of `x`, float32.

    Source:
        ONNX QuantizeLinear followed by DequantizeLinear.

    Example:
        >>> fake_quantize(torch.tensor([-3.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), Grid(3))
        tensor([-1.0000,  0.5000,  2.5000])
    """
    zero = zero_point.to(x.dtype)
    if not _plain(x):
        # numbers as ends of the clip: with tensors it takes three times as long
        return (x / scale).round_().add_(zero).clamp_(grid.lowest, grid.highest).sub_(zero).mul_(scale)
    result, code_of_zero = torch.empty_like(x), float(zero)
    both = (x.view(-1), result.view(-1)) if x.is_contiguous() else (x, result)
    for numbers, out in zip(*map(pieces, both), strict=True):
        torch.div(numbers, scale, out=out).round_().clamp_(grid.lowest - code_of_zero, grid.highest - code_of_zero).mul_(scale)
    return result


def _plain(x: Tensor) -> bool:
    """Whether a tensor is on the CPU, is neither traced nor wants a gradient, and may be worked on in pieces."""
    traced = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not traced and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def soft_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`x^ = s (clip(round(x / s) + z, lowest, highest) - z)` with gradients for `x`, `s` and `z`: rounding is taken as the identity.

    The gradient for the step is LSQ's: `round(x / s) - x / s` inside the range, the distance of the range's end from `z` outside.

    Args:
        x: real numbers, float, any shape.
        scale: step `s > 0`, float, broadcastable to `x`.
        zero_point: `z`, float, broadcastable to `x`; is rounded to an integer, straight through.
        grid: the codes that exist.

    Returns:
        Numbers on the grid, the shape and dtype of `x`.

    Source:
        Straight-through estimator: Bengio et al. 2013 (arXiv 1308.3432); steps: LSQ (Esser et al. 2020, arXiv 1902.08153), eq. 3.

    Example:
        >>> step = torch.tensor(0.5, requires_grad=True)
        >>> soft_quantize(torch.tensor([0.7]), step, torch.tensor(0.0), Grid(2)).sum().backward()
        >>> round(step.grad.item(), 6)
        -0.4
    """
    return cast(Tensor, _SoftQuantize.apply(x, scale, zero_point, grid))  # type: ignore[no-untyped-call]


class _SoftQuantize(torch.autograd.Function):
    """The equation and gradients of `soft_quantize` in about half the time that autograd takes for them operation by operation.

    With `m` 1 inside the range and 0 outside, and `g` the gradient for `x^`:

        dx = m g        ds = sum (g x^ - dx x) / s        dz = -s sum (g - dx)

    Where `dx` alone is wanted, of one step on the CPU, `m` is never written down: it is found from `x` and the range's ends.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        zero = zero_point.round()
        ctx.ends = None
        if not any(ctx.needs_input_grad[1:3]) and scale.dim() == zero.dim() == 0 and x.device.type == "cpu":
            step, code_of_zero = float(scale), float(zero)
            ctx.ends = (grid.lowest - code_of_zero - 0.5) * step, (grid.highest - code_of_zero + 0.5) * step
            ctx.save_for_backward(x)
            return fake_quantize(x, scale, zero, grid)
        rounded = (x / scale).round_().add_(zero)
        codes = rounded.clamp(grid.lowest, grid.highest)
        inside = codes == rounded
        quantized = codes.sub_(zero).mul_(scale)
        ctx.save_for_backward(x, scale, zero_point, quantized, inside)
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if ctx.ends is not None:
            return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.ends), None, None, None
        x, scale, zero_point, quantized, inside = ctx.saved_tensors
        for_x = gradient * inside
        for_scale = for_zero = None
        if ctx.needs_input_grad[1]:
            for_scale = (_product_sum(gradient, quantized, scale.shape) - _product_sum(for_x, x, scale.shape)) / scale
        if ctx.needs_input_grad[2]:
            for_zero = (scale * (for_x - gradient)).sum_to_size(zero_point.shape)
        return for_x if ctx.needs_input_grad[0] else None, for_scale, for_zero, None


def _product_sum(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    return torch.dot(a.flatten(), b.flatten()) if len(shape) == 0 else (a * b).sum_to_size(shape)


def scale_and_zero_point(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Step and integer zero-point of the grid that spans `[low, high]`, after widening the range to hold zero.

    Symmetric: `s = max(-low / -lowest, high / highest)`, the smallest step under which neither end is clipped. Affine: `s = (high - low)
    / (2^b - 1)`, `z = round(-low / s)`.

    Args:
        low: lower ends, float, any shape.
        high: upper ends, float, the shape of `low`.
        grid: the codes that exist.

    Returns:
        `(s, z)`, both in the shape of `low`; `s` float and never 0 (an empty range gets the smallest normal number), `z` int32.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3.

    Example:
        >>> scale_and_zero_point(torch.tensor(-1.0), torch.tensor(2.0), Grid(2))
        (tensor(1.), tensor(1, dtype=torch.int32))
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    tiny = torch.finfo(low.dtype).tiny
    if grid.symmetric:
        scale = torch.maximum(low / grid.lowest, high / grid.highest).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (grid.highest - grid.lowest)).clamp(min=tiny)
    return scale, torch.round(-low / scale).clamp(grid.lowest, grid.highest).to(torch.int32)
