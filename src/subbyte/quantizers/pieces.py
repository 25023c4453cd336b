"""Pieces of a tensor that a processor's cache holds, so that several operations in a row read them from there."""

from __future__ import annotations

import torch
from torch import Tensor

IN_CACHE = 2**18  # numbers


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts along its first dimension; on another device than the CPU it is one.

    Args:
        x: any dtype, any shape with at least one dimension.

    Returns:
        Views of it. None is empty, unless it is.

    Example:
        >>> [len(piece) for piece in pieces(torch.zeros(5, 2**17))]
        [2, 2, 1]
    """
    if x.device.type != "cpu" or not x.numel():
        return (x,)
    return torch.split(x, max(1, IN_CACHE // x[:1].numel()))
