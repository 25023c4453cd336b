"""Convolutions as operators.

`rows` cuts rows out of an input without unfolding all of it. Padding (of any mode) and the zeros that a transposed convolution inserts
between its inputs are all handled by one map for each dimension, from the padded coordinate to the coordinate it was copied from, or to -1
where there is a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from subbyte.model.operator import Operator


@dataclass(frozen=True)
class Convolution(Operator):
    """Convolution in 1, 2 or 3 dimensions, plain or transposed, with any stride, padding, dilation and groups.

    Args:
        kernel_size: one number for each spatial dimension D.
        stride: likewise.
        padding: `(before, after)` for each dimension, of the plain convolution.
        dilation: likewise.
        groups: G.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        transposed: whether this is a transposed convolution; `padding` then holds what the layer calls padding.
        output_padding: of a transposed convolution.

    Example:
        >>> conv = Convolution.of(nn.Conv1d(1, 1, 3, padding=1))
        >>> conv.rows(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([[[0., 1., 2.],
                 [1., 2., 3.]]])
    """

    channel_dimension: ClassVar[int] = 1
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.modules.conv._ConvNd) -> Convolution:
        """The operator of a torch convolution module.

        Args:
            module: nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d.
        """
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in totals)
        elif isinstance(module.padding, str):
            padding = tuple((0, 0) for _ in module.kernel_size)
        else:
            padding = tuple((p, p) for p in module.padding)
        return cls(
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=padding,
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            transposed=module.transposed,
            output_padding=tuple(module.output_padding) if module.transposed else (),
        )

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Operator`.

        Args:
            x: float (samples, C_in, ...) or one sample (C_in, ...).
            weight: float, as torch lays it out for this kind of convolution.
            bias: float (C_out,) or None.
        """
        if self.transposed:
            padding = [before for before, _ in self.padding]
            transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dimensions - 1]
            return transpose(x, weight, bias, self.stride, padding, self.output_padding, self.groups, self.dilation)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        if self.padding_mode == "zeros" and all(before == after for before, after in self.padding):
            return convolve(x, weight, bias, self.stride, [before for before, _ in self.padding], self.dilation, self.groups)
        return convolve(self._padded(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def layout(self, x: Tensor) -> tuple[int, ...]:
        """See `Operator`.

        Args:
            x: float (samples, C_in, ...) or (C_in, ...).
        """
        samples = x.shape[0] if x.dim() == self.dimensions + 2 else 1
        return samples, *self._output_sizes(tuple(x.shape[-self.dimensions :]))

    def macs(self, x: Tensor, weight: Tensor) -> int:
        """See `Operator`. A transposed convolution multiplies every input, not every output, with its kernel.

        Args:
            x: float (samples, C_in, ...) or (C_in, ...).
            weight: float (C_out, C_in/G, ...) or, transposed, (C_in, C_out/G, ...).
        """
        return weight.numel() * (math.prod(x.shape[-self.dimensions :]) if self.transposed else self.count(x)[1])

    def rows(self, x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """See `Operator`; `n` runs over input channels of the group, then over the kernel.

        Args:
            x: float (samples, C_in, ...) or (C_in, ...).
            samples: int64 (R,).
            positions: int64 (R,).
        """
        if x.dim() == self.dimensions + 1:
            x = x[None]
        sizes = tuple(x.shape[2:])
        index, inside = self._gather_index(sizes, positions)
        channels = x.flatten(2).transpose(1, 2)  # (samples, S, C_in)
        picked = channels[samples[:, None], index]  # (R, K, C_in)
        if not bool(inside.all()):
            picked = picked * inside[..., None]
        count, taps, width = picked.shape
        grouped = picked.view(count, taps, self.groups, width // self.groups)
        return grouped.permute(2, 0, 3, 1).reshape(self.groups, count, -1)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            weight: (C_out, C_in/G, ...) or, transposed, (C_in, C_out/G, ...).
        """
        if self.transposed:
            grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], *self.kernel_size)
            weight = grouped.transpose(1, 2).flip(tuple(range(3, 3 + self.dimensions)))
        return weight.reshape(self.groups, -1, weight.shape[2 if self.transposed else 1] * math.prod(self.kernel_size))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            matrix: (G, O, n).
        """
        groups, outputs, _ = matrix.shape
        if not self.transposed:
            return matrix.reshape(groups * outputs, -1, *self.kernel_size)
        split = matrix.reshape(groups, outputs, -1, *self.kernel_size).flip(tuple(range(3, 3 + self.dimensions))).transpose(1, 2)
        return split.reshape(-1, outputs, *self.kernel_size)

    def per_channel(self, values: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            values: (C_out,).
            weight: (C_out, C_in/G, ...) or, transposed, (C_in, C_out/G, ...).
        """
        ones = (1,) * self.dimensions
        if not self.transposed:
            return values.reshape(-1, 1, *ones)
        return values.view(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, dim=0).reshape(*weight.shape[:2], *ones)

    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            values: (C_in,).
            weight: (C_out, C_in/G, ...) or, transposed, (C_in, C_out/G, ...).
        """
        ones = (1,) * self.dimensions
        if self.transposed:
            return values.reshape(-1, 1, *ones)
        return values.view(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, dim=0).reshape(*weight.shape[:2], *ones)

    def weight_gradients(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`. One convolution with a group for each sample and group; `y` of a transposed one is linear in the weight as the
        input of the plain one is: input and gradient change places.

        Args:
            x: float (samples, C_in, ...).
            gradient: float (samples, C_out, ...).
            weight: float (C_out, C_in/G, ...) or, transposed, (C_in, C_out/G, ...).
        """
        padding = [before for before, _ in self.padding]
        if self.transposed:
            x, gradient = gradient, x
            sizes = replace(self, transposed=False)._output_sizes(tuple(x.shape[2:]))  # at least what there is: zeros behind it
            gradient = F.pad(gradient, [w for n, have in zip(sizes, gradient.shape[2:], strict=True) for w in (n - have, 0)][::-1])
        elif self.padding_mode != "zeros" or any(before != after for before, after in self.padding):
            x, padding = self._padded(x), [0] * self.dimensions
        samples, shape = len(x), (len(x) * weight.shape[0], *weight.shape[1:])
        gradient_of = (conv1d_weight, conv2d_weight, conv3d_weight)[self.dimensions - 1]
        folded = x.reshape(1, -1, *x.shape[2:]), gradient.reshape(1, -1, *gradient.shape[2:])
        found: Tensor = gradient_of(  # type: ignore[no-untyped-call]
            folded[0], shape, folded[1], self.stride, padding, self.dilation, samples * self.groups
        )
        return found.view(samples, *weight.shape)

    def _padded(self, x: Tensor) -> Tensor:
        """The input of a plain convolution with its padding, (..., padded sizes)."""
        pads = [width for pair in reversed(self.padding) for width in pair]
        return F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _output_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output."""
        outputs = []
        for axis, size in enumerate(sizes):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            before, after = self.padding[axis]
            if self.transposed:
                outputs.append((size - 1) * self.stride[axis] - before - after + reach + self.output_padding[axis] + 1)
            else:
                outputs.append((size + before + after - reach - 1) // self.stride[axis] + 1)
        return tuple(outputs)

    def _sources(self, axis: int, size: int, device: torch.device) -> Tensor:
        """For each padded coordinate of one axis the input coordinate it holds, or -1 for a zero; int64."""
        coordinates = torch.arange(size, device=device)
        before, after = self.padding[axis]
        if self.transposed:
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            spread = torch.full(((size - 1) * self.stride[axis] + 1,), -1, device=device)
            spread[:: self.stride[axis]] = coordinates
            return F.pad(spread, (reach - before, reach - after + self.output_padding[axis]), value=-1)
        if self.padding_mode == "zeros":
            return F.pad(coordinates, (before, after), value=-1)
        return F.pad(coordinates.float()[None, None], (before, after), mode=self.padding_mode)[0, 0].long()

    def _gather_index(self, sizes: tuple[int, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Flat input coordinate under each position and kernel tap, and whether it is one; int64 and bool, (R, K) each."""
        outputs = self._output_sizes(sizes)
        index = torch.zeros(len(positions), 1, dtype=torch.int64, device=positions.device)
        inside = torch.ones_like(index, dtype=torch.bool)
        rest = positions
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(self.dimensions)]
        for axis in range(self.dimensions):
            below = math.prod(outputs[axis + 1 :])
            coordinate, rest = rest // below, rest % below
            step = 1 if self.transposed else self.stride[axis]
            taps = torch.arange(self.kernel_size[axis], device=positions.device) * self.dilation[axis]
            source = self._sources(axis, sizes[axis], positions.device)[(coordinate * step)[:, None] + taps]
            index = (index[:, :, None] + source.clamp(min=0)[:, None, :] * strides[axis]).flatten(1)
            inside = (inside[:, :, None] & (source >= 0)[:, None, :]).flatten(1)
        return index, inside
