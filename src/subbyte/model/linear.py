"""Operators that multiply vectors with a matrix as it stands, and that look vectors up in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by

from subbyte.model.operator import Operator


@dataclass(frozen=True)
class Linear(Operator):
    """`y = x W^T + b` over the last dimension; one group.

    Args:
        transposed: whether the weight is laid out (n, O), as in the Conv1D of GPT-2.

    Example:
        >>> import torch
        >>> Linear().rows(torch.arange(6.0).view(1, 3, 2), torch.tensor([0]), torch.tensor([2]))
        tensor([[[4., 5.]]])
    """

    channel_dimension: ClassVar[int] = -1
    transposed: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Operator`.

        Args:
            x: float (..., n).
            weight: float (O, n), or (n, O).
            bias: float (O,) or None.
        """
        return F.linear(x, weight.mT if self.transposed else weight, bias)

    def layout(self, x: Tensor) -> tuple[int, ...]:
        """See `Operator`.

        Args:
            x: float (..., n); one dimension is one sample.
        """
        return tuple(x.shape[:-1]) or (1,)

    def macs(self, x: Tensor, weight: Tensor) -> int:
        """See `Operator`.

        Args:
            x: float (..., n).
            weight: float (O, n), or (n, O).
        """
        return weight.numel() * self.count(x)[1]

    def rows(self, x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            x: float (..., n).
            samples: int64 (R,).
            positions: int64 (R,).
        """
        count, each = self.count(x)
        return x.reshape(count * each, x.shape[-1])[samples * each + positions][None]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            weight: (O, n), or (n, O).
        """
        return (weight.mT.contiguous() if self.transposed else weight)[None]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            matrix: (1, O, n).
        """
        return matrix[0].mT.contiguous() if self.transposed else matrix[0]

    def per_channel(self, values: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            values: (C_out,).
            weight: (C_out, n), or (n, C_out).
        """
        return values if self.transposed else values[:, None]

    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            values: (n,).
            weight: (C_out, n), or (n, C_out).
        """
        return values[:, None] if self.transposed else values

    def weight_gradients(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            x: float (samples, ..., n).
            gradient: float (samples, ..., O).
            weight: float (O, n), or (n, O).
        """
        x, gradient = (values.reshape(values.shape[0], -1, values.shape[-1]) for values in (x, gradient))
        return x.mT @ gradient if self.transposed else gradient.mT @ x


@dataclass(frozen=True)
class Lookup(Operator):
    """`y = W[i]`: a table of vectors, such as an embedding. Every row has a step of its own, as an output channel has elsewhere.

    As a matrix the table is (1, O, n): O rows of n numbers. There is nothing to fit: no row of it is ever mixed with another.

    Example:
        >>> import torch
        >>> Lookup()(torch.tensor([2, 0]), torch.arange(6.0).view(3, 2), None)
        tensor([[4., 5.],
                [0., 1.]])
    """

    channel_dimension: ClassVar[int] = -1
    multiplies: ClassVar[bool] = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Operator`.

        Args:
            x: int64 or int32 (...), indices.
            weight: float (O, n).
            bias: is not read.
        """
        return F.embedding(x, weight)

    def layout(self, x: Tensor) -> tuple[int, ...]:
        """See `Operator`.

        Args:
            x: int64 or int32 (...), indices.
        """
        return tuple(x.shape) or (1,)

    def macs(self, x: Tensor, weight: Tensor) -> int:
        """None: nothing is multiplied.

        Args:
            x: int64 or int32 (...).
            weight: float (O, n).
        """
        return 0

    def rows(self, x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """There are none.

        Args:
            x: int64 or int32 (...).
            samples: int64 (R,).
            positions: int64 (R,).

        Raises:
            TypeError: always; ask `multiplies` first.
        """
        raise TypeError("a table is looked up in; it has no rows of inputs")

    def to_matrix(self, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            weight: (O, n).
        """
        return weight[None]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            matrix: (1, O, n).
        """
        return matrix[0]

    def per_channel(self, values: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            values: (O,).
            weight: (O, n).
        """
        return values[:, None]

    def per_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """There are no input channels.

        Args:
            values: (C_in,).
            weight: (O, n).

        Raises:
            TypeError: always; ask `multiplies` first.
        """
        raise TypeError("a table is looked up in; it has no input channels")

    def weight_gradients(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """See `Operator`.

        Args:
            x: int64 or int32 (samples, ...).
            gradient: float (samples, ..., n).
            weight: float (O, n).
        """
        index, rows = x.reshape(x.shape[0], -1), gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])
        found = gradient.new_zeros(x.shape[0], *weight.shape)
        return found.scatter_add_(1, index.long()[:, :, None].expand_as(rows), rows)
