"""Centred second moments of a layer's rows: all that least squares needs, in a size that does not depend on the number of rows.

    H = Cov(x, x),  c = Cov(x, y)

Moments are sums, so they add up over batches and over machines (`merge`). Products are taken in float32 on centred rows and added in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and centred products of inputs `x` and targets `y`.

    Args:
        count: number of rows R.
        mean_x: float64 (G, n).
        mean_y: float64 (G, O).
        xx: `sum (x - mean x)(x - mean x)^T`, float64 (G, n, n).
        xy: `sum (x - mean x)(y - mean y)^T`, float64 (G, n, O).
        yy: `sum (y - mean y)^2`, float64 (G, O).
    """

    count: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """Moments of some rows.

    Args:
        x: inputs, float32 (G, R, n), R at least 1.
        y: targets, float32 (G, R, O).

    Example:
        >>> m = moments_of(torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[1.0], [5.0]]]))
        >>> m.xx.item(), m.xy.item(), m.mean_y.item()
        (2.0, 4.0, 3.0)
    """
    chunks = [_one_chunk(x[:, at : at + CHUNK_ROWS], y[:, at : at + CHUNK_ROWS]) for at in range(0, x.shape[1], CHUNK_ROWS)]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = merge(total, chunk)
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both.

    Args:
        a: of some rows.
        b: of other rows of the same layer.

    Source:
        Chan, Golub, LeVeque 1979, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*.
    """
    count = a.count + b.count
    share = b.count / count
    dx, dy = b.mean_x - a.mean_x, b.mean_y - a.mean_y
    weight = a.count * share
    return Moments(
        count=count,
        mean_x=a.mean_x + share * dx,
        mean_y=a.mean_y + share * dy,
        xx=a.xx + b.xx + weight * dx[:, :, None] * dx[:, None, :],
        xy=a.xy + b.xy + weight * dx[:, :, None] * dy[:, None, :],
        yy=a.yy + b.yy + weight * dy.square(),
    )


def _one_chunk(x: Tensor, y: Tensor) -> Moments:
    mean_x, mean_y = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    x, y = x - mean_x, y - mean_y
    return Moments(
        count=x.shape[1],
        mean_x=mean_x[:, 0].double(),
        mean_y=mean_y[:, 0].double(),
        xx=(x.mT @ x).double(),
        xy=(x.mT @ y).double(),
        yy=y.square().sum(dim=1, dtype=torch.float64),
    )
