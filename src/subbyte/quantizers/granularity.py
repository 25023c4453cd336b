"""Granularity: which weights of an output channel share a step and zero-point.

All `n` of them, or every `group` consecutive ones: a *column group*. The last one is shorter where `n` is no multiple of `group`. Steps of
all output channels have the shape (..., ) or, with `K = ceil(n / group)` column groups, (..., K).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by


def group_count(columns: int, group: int | None) -> int:
    """Number K of column groups.

    Args:
        columns: weights of an output channel, n.
        group: weights that share a step; None: all.

    Example:
        >>> group_count(100, 64), group_count(100, None)
        (2, 1)
    """
    return 1 if group is None else -(-columns // group)


def column_groups(columns: int, group: int | None) -> list[slice]:
    """The columns of each group.

    Args:
        columns: weights of an output channel, n.
        group: weights that share a step; None: all.

    Example:
        >>> column_groups(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = columns if group is None else group
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def per_weight(steps: Tensor, group: int | None, columns: int) -> Tensor:
    """Steps or zero-points laid out so that they broadcast against the weights of their output channels.

    Args:
        steps: any dtype, (...,), or with a group (..., K).
        group: weights that share a step; None: all.
        columns: weights of an output channel, n.

    Returns:
        (..., 1), or with a group (..., n); the dtype of `steps`.

    Example:
        >>> import torch
        >>> per_weight(torch.tensor([[1, 2]]), 2, 3), per_weight(torch.tensor([1]), None, 3)
        (tensor([[1, 1, 2]]), tensor([[1]]))
    """
    if group is None:
        return steps[..., None]
    return steps[..., None].expand(*steps.shape, group).flatten(-2)[..., :columns]


def group_sums(values: Tensor, group: int | None) -> Tensor:
    """Sum over each column group.

    Args:
        values: (..., n), any dtype.
        group: columns that are summed; None: all.

    Returns:
        (..., K).

    Example:
        >>> import torch
        >>> group_sums(torch.tensor([1, 2, 3]), 2)
        tensor([3, 3])
    """
    if group is None:
        return values.sum(dim=-1, keepdim=True)
    columns = values.shape[-1]
    padded = F.pad(values, (0, -columns % group))
    return padded.view(*values.shape[:-1], -1, group).sum(dim=-1)
