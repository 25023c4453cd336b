"""Budgets that hold: a degradation limit is met as measured on the assembled model, not as predicted.

The prediction adds up layers that were measured alone. How far it is from the truth depends on the widths, so it is corrected where it
is used: solve for a predicted degradation `rhs`, assemble, measure, and move `rhs` to where the measured value should meet the limit. With
`v` the measured value over its limit (the largest, of several), `log v` is interpolated over `log rhs` between the nearest `rhs` that
met the limit and the nearest that missed it; with one side only, `v` is taken to grow like `rhs`. Measured values scatter around their
trend, so that a miss does not prove that nothing smaller would meet the limit: the rounds that are left try a little beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from subbyte.allocate.allocation import DEGRADATION, Allocation
from subbyte.errors import InfeasibleError

Assembled = TypeVar("Assembled")

CLOSE = 0.015  # values that differ by less than this share are taken to be neighbours
BEYOND = (1.25, 1.6, 2.2, 3.0, 4.5, 7.0)  # times the predicted degradation of the nearest miss: what is tried beyond it
MOST_REPEATS = 16
AIM = 0.97  # of the limit: what is aimed at exactly is missed half of the time


@dataclass(frozen=True)
class Round:
    """One round.

    Args:
        allocation: that was assembled.
        measured: degradations of the assembled model on held-out samples, by name.
        excess: the largest of the measured values over their limits; at most 1 if all are met.

    Example:
        >>> Round(Allocation({}, 0.1, 9, 4.0, 9, "size", 9.0, 9.0, 0.0, "optimal", 0.0), {"kl": 0.02}, 2.0).met
        False
    """

    allocation: Allocation
    measured: Mapping[str, float]
    excess: float

    @property
    def met(self) -> bool:
        """Whether all limits are met."""
        return self.excess <= 1.0


@dataclass(frozen=True, eq=False)
class Held(Generic[Assembled]):
    """What the rounds led to.

    Args:
        assembled: the model that is kept.
        kept: the round that it is of: the best that met the limits, or the one that missed them least.
        rounds: all of them, in order.
    """

    assembled: Assembled
    kept: Round
    rounds: tuple[Round, ...]


def excess_of(measured: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """The largest of the measured values over their limits: at most 1 if all are met, infinite for NaN or above a limit of 0.

    Args:
        measured: by name.
        limits: by name.

    Example:
        >>> excess_of({"kl": 0.02, "disagreement": 0.0}, {"kl": 0.01, "disagreement": 0.0})
        2.0
    """
    shares = []
    for name, limit in limits.items():
        value = measured[name]
        if value <= limit:
            shares.append(max(0.0, value / limit) if limit > 0 else 0.0)
        else:
            shares.append(value / limit if limit > 0 and not math.isnan(value) else math.inf)
    return max(shares, default=0.0)


def hold(
    solve: Callable[[float | None], Allocation],
    assemble: Callable[[Allocation], Assembled],
    measure: Callable[[Assembled], Mapping[str, float]],
    limits: Mapping[str, float],
    start: float | None,
    rounds: int,
) -> Held[Assembled]:
    """Solve, assemble, measure, correct, and again.

    Args:
        solve: the best allocation with at most this predicted degradation, None for no limit on it; raises InfeasibleError.
        assemble: gives the model its codes.
        measure: its degradations, by name.
        limits: on them.
        start: predicted degradation to start with; None: no limit on it is of use, so that one round is all.
        rounds: at most.

    Raises:
        InfeasibleError: if a limit on a cost cannot be met.
    """
    done: list[Round] = []
    best: tuple[Round, Assembled] | None = None
    least, rhs, repeats = 0.0, start, 0
    while len(done) < rounds and repeats < MOST_REPEATS:
        try:
            allocation = solve(rhs)
        except InfeasibleError as error:
            if error.limit != DEGRADATION or error.nearest is None:
                raise
            rhs = least = error.nearest * (1 + 1e-9) + 1e-300
            allocation = solve(least)
        if rhs is not None and any(allocation.options == earlier.allocation.options for earlier in done):
            repeats += 1
            rhs = _after_repeat(done, rhs)
        else:
            assembled = assemble(allocation)
            measured = dict(measure(assembled))
            here = Round(allocation, measured, excess_of(measured, limits))
            done.append(here)
            if best is None or _better(here, best[0]):
                best = (here, assembled)
            rhs = None if rhs is None else _next(done, least)
        if rhs is None:
            break
    assert best is not None
    return Held(best[1], best[0], tuple(done))


def _better(here: Round, there: Round) -> bool:
    if here.met != there.met:
        return here.met
    if here.met:
        return (here.allocation.value, here.excess) < (there.allocation.value, there.excess)
    return here.excess < there.excess


def _sides(done: Sequence[Round]) -> tuple[Round | None, list[Round]]:
    """The round that met the limits with the most predicted degradation, and those that missed them with more, by predicted degradation."""
    met = max((one for one in done if one.met), key=lambda one: one.allocation.predicted, default=None)
    least = -math.inf if met is None else met.allocation.predicted
    missed = [one for one in done if not one.met and one.allocation.predicted > least]
    return met, sorted(missed, key=lambda one: one.allocation.predicted)


def _next(done: Sequence[Round], least: float) -> float | None:
    """The right-hand side of the next round, or None if none is worth it; `least` is the smallest that any allocation has, if known."""
    met, missed = _sides(done)
    if met is None:
        nearest = missed[0]
        predicted = nearest.allocation.predicted
        if predicted <= least * (1 + 1e-6):
            return None  # nothing has less degradation than what missed
        return predicted * (max(0.1, min(0.8, AIM / nearest.excess)) if nearest.excess < math.inf else 0.25)
    if not missed:
        return met.allocation.predicted * min(8.0, max(1.25, AIM / max(met.excess, 1e-12)))
    nearest = missed[0]
    if met.allocation.value - nearest.allocation.value > CLOSE * abs(met.allocation.value):
        return _between(met, nearest)
    return _beyond(missed)


def _after_repeat(done: Sequence[Round], rhs: float) -> float | None:
    """The right-hand side after one whose allocation was tried already."""
    met, missed = _sides(done)
    if met is not None and not missed:
        return rhs * 1.5
    if met is not None and 1.02 * rhs < missed[0].allocation.predicted:  # nothing between what met the limit and here: go on to the miss
        return math.sqrt(rhs * missed[0].allocation.predicted)
    return _beyond([one for one in missed if one.allocation.predicted >= rhs / max(BEYOND)] or missed, above=rhs)


def _beyond(missed: Sequence[Round], above: float = 0.0) -> float | None:
    """A right-hand side a little above the nearest miss, where none was tried yet."""
    tried = [one.allocation.predicted for one in missed]
    for factor in BEYOND:
        rhs = tried[0] * factor
        if rhs > above * (1 + 1e-9) and not any(0.9 * rhs < other <= rhs for other in tried):
            return rhs
    return None


def _between(met: Round, missed: Round) -> float:
    low, high = math.log(max(met.allocation.predicted, 1e-300)), math.log(missed.allocation.predicted)
    share = 0.5
    if 0 < met.excess < 1 < missed.excess < math.inf:
        share = (math.log(AIM) - math.log(met.excess)) / (math.log(missed.excess) - math.log(met.excess))
    return math.exp(low + min(0.85, max(0.15, share)) * (high - low))
