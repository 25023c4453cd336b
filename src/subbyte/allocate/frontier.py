"""The frontier: the least predicted degradation for every size, from one table."""

from __future__ import annotations

import math

from subbyte.allocate.allocation import Allocation, Market, allocate
from subbyte.budget import Budget
from subbyte.errors import OptionError

POINTS = 40


def frontier(market: Market, points: int = POINTS) -> tuple[Allocation, ...]:
    """Allocations from the smallest file to the largest, each with the least predicted degradation of all that are no larger.

    Args:
        market: what there is to choose from.
        points: sizes to solve for, evenly spaced on a logarithmic axis between the smallest and the largest file.

    Returns:
        Each allocation once, by increasing size and decreasing predicted degradation.

    Raises:
        OptionError: if there are fewer than 2 points.
    """
    if points < 2:
        raise OptionError(f"a frontier has at least 2 points, not {points}")
    costs = market.costs
    sizes = [
        [sum(costs.layers[name].bytes(option) for name in group) for option in row]
        for group, row in zip(market.groups, market.usable(), strict=True)
    ]
    ends = [costs.constant_bytes + sum(map(pick, sizes)) for pick in (min, max)]
    found: list[Allocation] = []
    for k in range(points):
        size = ends[1] if k == points - 1 else math.floor(ends[0] * (ends[1] / ends[0]) ** (k / (points - 1)))
        allocation = allocate(market, Budget(bytes=size))
        if not found or allocation.size_bytes > found[-1].size_bytes and allocation.predicted < found[-1].predicted:
            found.append(allocation)
    return tuple(found)
