"""Ranges: which interval a grid should span. One interface: `Range.candidates`; who calls it keeps the candidate with the least error.

`MinMax` clips nothing, `Percentile` clips a fixed share of the values, `LeastOutputError` offers many clippings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.errors import OptionError


class Range(ABC):
    """How an interval is chosen from the values that it should hold.

    Example:
        >>> isinstance(MinMax(), Range)
        True
    """

    @abstractmethod
    def candidates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals to choose from, for each row of values.

        Args:
            values: float32 (C, N), C independent channels.

        Returns:
            `(low, high)`, float32 (K, C) each, `low <= high`: K intervals for each channel. K does not depend on the values.
        """


@dataclass(frozen=True)
class MinMax(Range):
    """The whole range: nothing is clipped. Good at 8 bits without outliers.

    Example:
        >>> MinMax().candidates(torch.tensor([[-1.0, 0.0, 3.0]]))
        (tensor([[-1.]]), tensor([[3.]]))
    """

    def candidates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """One interval: smallest to largest value.

        Args:
            values: float32 (C, N).
        """
        low, high = _ends(values)
        return low[None], high[None]


@dataclass(frozen=True)
class Percentile(Range):
    """Clips the same share of the values at both ends.

    Args:
        percent: share of the values inside the interval, above 50 and at most 100.

    Raises:
        OptionError: if `percent` is outside that range.

    Source:
        McKinstry et al. 2018 (arXiv 1809.04191).

    Example:
        >>> Percentile(80.0).candidates(torch.arange(11.0)[None])
        (tensor([[1.]]), tensor([[9.]]))
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 50.0 < self.percent <= 100.0:
            raise OptionError(f"a percentile range keeps more than 50 and at most 100 percent of the values, not {self.percent}")

    def candidates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """One interval: from the `(100 - percent) / 2` to the `(100 + percent) / 2` percentile, by linear interpolation.

        Args:
            values: float32 (C, N).
        """
        ordered = values.sort(dim=1).values  # torch.quantile refuses more than 16 million values
        position = (ordered.shape[1] - 1) * (100.0 - self.percent) / 200.0
        below, share = int(position), position - int(position)
        above = min(below + 1, ordered.shape[1] - 1)
        low = ordered[:, below].lerp(ordered[:, above], share)
        high = ordered[:, -1 - below].lerp(ordered[:, -1 - above], share)
        return low[None], high[None]


@dataclass(frozen=True)
class LeastOutputError(Range):
    """Shares of the whole range, from all of it down to a fraction: whoever asked keeps the one with the least output error.

    Args:
        count: number K of intervals, at least 2.
        smallest: smallest share of the whole range, above 0 and below 1.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        The clipping search of LAPQ (Nahshan et al. 2019, arXiv 1911.07190), with the layer's output error instead of the p-norm.

    Example:
        >>> LeastOutputError(count=3, smallest=0.5).candidates(torch.tensor([[-2.0, 4.0]]))[1]
        tensor([[4.],
                [3.],
                [2.]])
    """

    count: int = 40
    smallest: float = 0.15

    def __post_init__(self) -> None:
        if self.count < 2 or not 0.0 < self.smallest < 1.0:
            raise OptionError(f"LeastOutputError needs count >= 2 and 0 < smallest < 1, not {self.count} and {self.smallest}")

    def candidates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`count` intervals: the whole range times shares from 1 down to `smallest`, in equal steps.

        Args:
            values: float32 (C, N).
        """
        low, high = _ends(values)
        share = torch.linspace(1.0, self.smallest, self.count, device=values.device, dtype=values.dtype)[:, None]
        return low[None] * share, high[None] * share


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, (C,) each: what `aminmax` gives, in a tenth of its time."""
    return values.amin(dim=1), values.amax(dim=1)
