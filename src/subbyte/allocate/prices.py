"""What scipy's HiGHS does for the integer programme: the best prices of the limits, and cores that are too large to search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from subbyte.allocate.core_search import Array, Indices

CUTS = 150
MOST_PRICE = 1e6
MOST_SECONDS = 60.0


def best_prices(objective: Array, costs: Array, limits: Array) -> Array:
    """Prices with the greatest `phi(lambda)`, by cutting planes: each allocation that some prices ask for is a cut.

    Args:
        objective: (groups, options), infinite where there is no option.
        costs: (limits, groups, options).
        limits: (limits,).

    Returns:
        (limits,), none negative. Whatever they are, they give a valid bound; the best give the highest.

    Source:
        Kelley 1960, *The cutting-plane method for solving convex programs*.
    """
    count, rows = len(limits), np.arange(len(objective))
    if not count:
        return np.zeros(0)
    scale = np.maximum(np.abs(limits), np.abs(costs).max(axis=(1, 2), initial=1e-300))
    finite = np.where(np.isfinite(objective), objective, np.nan)
    spread = float((np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)).sum()) or 1.0
    prices, best, best_prices_so_far = np.zeros(count), -np.inf, np.zeros(count)
    cuts: list[Array] = []
    for _ in range(CUTS):
        chosen = (objective + np.tensordot(prices / scale, costs, axes=1) * spread).argmin(axis=1)
        slope = (costs[:, rows, chosen].sum(axis=1) - limits) / scale
        value = float(objective[rows, chosen].sum()) / spread
        phi = value + float(prices @ slope)
        if phi > best:
            best, best_prices_so_far = phi, prices
        cuts.append(np.array([*slope, value]))  # phi <= value + prices slope
        upper, prices = _highest(cuts)
        if upper - best <= 1e-10 * (1.0 + abs(best)):
            break
    found: Array = best_prices_so_far / scale * spread
    return found


def _highest(cuts: Sequence[Array]) -> tuple[float, Array]:
    """The highest point under all cuts."""
    stacked = np.array(cuts)
    if stacked.shape[1] == 2:
        return _highest_on_a_line(stacked)
    count = stacked.shape[1] - 1
    under = np.column_stack([-stacked[:, :-1], np.ones(len(stacked))])
    bounds = [(0.0, MOST_PRICE)] * count + [(None, None)]
    found = linprog(np.array([*np.zeros(count), -1.0]), A_ub=under, b_ub=stacked[:, -1], bounds=bounds, method="highs-ds")
    return (-np.inf, np.zeros(count)) if found.x is None else (float(-found.fun), found.x[:-1])


def _highest_on_a_line(cuts: Array) -> tuple[float, Array]:
    """Likewise for one limit: where the lowest rising and the lowest falling line meet, in one step for each pair of neighbours."""
    slope, value = cuts.T
    rising, falling = slope > 0, slope <= 0
    if not falling.any():
        return float((value + MOST_PRICE * slope).min()), np.array([MOST_PRICE])
    if not rising.any():
        return float(value.min()), np.zeros(1)
    crossing = (value[falling][None, :] - value[rising][:, None]) / (slope[rising][:, None] - slope[falling][None, :])
    candidates = np.append(np.clip(crossing.ravel(), 0.0, MOST_PRICE), 0.0)
    heights = (value[:, None] + slope[:, None] * candidates).min(axis=0)
    at = int(heights.argmax())
    return float(heights[at]), candidates[at : at + 1]


def prices_around(prices: Array, changes: Array, delta: float) -> Array:
    """The best prices, and others around them: for each limit dearer and cheaper by what is worth about `delta` in a typical change.

    Args:
        prices: the best, (limits,).
        changes: of costs, in the core, (limits, options).
        delta: distance in objective that matters.

    Returns:
        (number, limits), the best first, none negative.
    """
    found = [prices]
    for i in range(len(prices)):
        sizes = np.abs(changes[i])[np.abs(changes[i]) > 0]
        typical = float(np.median(sizes)) if len(sizes) else 0.0
        for share in (0.1, 0.5, -0.1, -0.5) if typical > 0 and delta > 0 else ():
            moved = prices.copy()
            moved[i] = max(0.0, prices[i] + share * delta / typical)
            found.append(moved)
    return np.array(found)


def solve_by_highs(gains: Sequence[Array], changes: Sequence[Array], room: Array, unit: float) -> tuple[Indices, float, bool] | None:
    """The optimum of a core by branch and bound, where it is too large to be searched.

    Args:
        gains: for each layer, the objective of its options relative to the start, (options,) each.
        changes: likewise the costs, (limits, options) each.
        room: what the start leaves of the limits, (limits,).
        unit: of the objective: what HiGHS takes as 1, its tolerances being absolute.

    Returns:
        Index of each layer's option, what bounds the objective from below, and whether it is proved; None if nothing is within the limits.
    """
    sizes = [len(options) for options in gains]
    layer, starts = np.repeat(np.arange(len(sizes)), sizes), np.cumsum([0, *sizes[:-1]])
    gain, change = np.concatenate(gains) / (unit or 1.0), np.concatenate(changes, axis=1)
    scale = np.maximum(np.abs(change).max(axis=1), 1e-300)
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))), shape=(len(sizes), len(layer)))
    slack = np.zeros(len(room))
    for _ in range(8):
        limits = LinearConstraint(change / scale[:, None], -np.inf, (room - slack) / scale)
        options = {"mip_rel_gap": 0.0, "time_limit": MOST_SECONDS}
        answer = milp(gain, constraints=[LinearConstraint(one_each, 1.0, 1.0), limits], integrality=1, bounds=Bounds(0, 1), options=options)
        if answer.x is None:
            return None
        picked = np.flatnonzero(answer.x > 0.5)
        over = change[:, picked].sum(axis=1) - room
        if bool((over <= 0).all()):
            return picked - starts, (unit or 1.0) * float(answer.mip_dual_bound), answer.status == 0
        slack += np.maximum(2.0 * over, 0.0)  # beyond the limit by less than HiGHS' tolerance: keep away from it
    return None
