"""Budgets that hold: a degradation limit is met as measured on the assembled model, not as predicted.

The prediction adds up layers that were measured alone. How far it is from the truth depends on the widths, so it is corrected where it
is used: solve for a predicted degradation `rhs`, assemble, measure, and move `rhs` to where the measured value should meet the limit. With
`v` the measured value over its limit (the largest, of several), `log v` is interpolated over `log rhs` between the nearest `rhs` that
met the limit and the nearest that missed it; with one side only, `v` is taken to grow like `rhs`.

Measured values scatter around their trend, so that a miss does not prove that nothing smaller would meet the limit. Once nothing is left
between the two sides, the frontier is walked on from the smallest that meets the limit: what is smaller by a step each is assembled and
measured, until the rounds are used up, or the scatter of what was measured makes it improbable that anything further on meets the limit;
then once more in steps of half the size. Sizes are walked, not degradations: where two widths of a large layer cost nearly the same, a
percent of degradation is many percent of size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Generic, TypeVar

from subbyte.allocate.allocation import DEGRADATION, Allocation
from subbyte.errors import InfeasibleError

Assembled = TypeVar("Assembled")

CLOSE = 0.015  # values that differ by less than this share are taken to be neighbours
STEP = 1.002  # of the predicted degradation, by which the frontier is walked
MOST_STEPS = 120
MOST_REPEATS = 16
LEAST_SCATTER = 0.2  # of the logarithm of measured over predicted degradation
UNKNOWN_SCATTER = 0.5  # the same, while fewer than `ENOUGH` have been measured and none of them meets the limit
ENOUGH = 4
IMPROBABLE = 3.0  # times the scatter: how far below its trend nothing is hoped to be
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
    search = _Search(solve, done)
    while len(done) < rounds:
        allocation = search.first(start) if not done else search.next()
        if allocation is None:
            break
        assembled = assemble(allocation)
        measured = dict(measure(assembled))
        here = Round(allocation, measured, excess_of(measured, limits))
        done.append(here)
        if best is None or _better(here, best[0]):
            best = (here, assembled)
        if start is None:
            break
    assert best is not None
    return Held(best[1], best[0], tuple(done))


def _better(here: Round, there: Round) -> bool:
    if here.met != there.met:
        return here.met
    if here.met:
        return (here.allocation.value, here.excess) < (there.allocation.value, there.excess)
    return here.excess < there.excess


@dataclass(eq=False)
class _Search:
    """Which allocation is tried next.

    Args:
        solve: see `hold`.
        done: the rounds so far; others add to it.
        least: the smallest predicted degradation that any allocation has, once it is known.
        frontier: what was solved on walks, by the power of `STEP`.
    """

    solve: Callable[[float | None], Allocation]
    done: list[Round]
    least: float = 0.0
    frontier: dict[int, Allocation] = field(default_factory=dict)

    def first(self, rhs: float | None) -> Allocation:
        """The best with at most this predicted degradation, or the one with the least there is."""
        try:
            return self.solve(rhs)
        except InfeasibleError as error:
            if error.limit != DEGRADATION or error.nearest is None:
                raise
            self.least = error.nearest * (1 + 1e-9) + 1e-300
            return self.solve(self.least)

    def next(self) -> Allocation | None:
        """The next one, none of those tried, or None if none is worth it."""
        met, missed = _sides(self.done)
        if met is None:
            nearest, lower = missed[0], None
            if nearest.allocation.predicted > self.least * (1 + 1e-6):
                share = max(0.02, min(0.8, AIM / nearest.excess)) if nearest.excess < math.inf else 0.25
                lower = self._new(self.first(nearest.allocation.predicted * share))
            return lower or self._walk(nearest.allocation, CLOSE)  # nothing has less degradation: what has more may still do by chance
        if not missed:
            return self._onwards(met.allocation.predicted * min(8.0, max(1.25, AIM / max(met.excess, 1e-12))), 1.5, most=MOST_REPEATS)
        if met.allocation.value - missed[0].allocation.value > CLOSE * abs(met.allocation.value):
            between = self._onwards(_between(met, missed[0]), STEP, before=missed[0].allocation.predicted)
            if between is not None:
                return between
        return next(filter(None, (self._walk(met.allocation, spacing) for spacing in (CLOSE, CLOSE / 2))), None)

    def _new(self, allocation: Allocation) -> Allocation | None:
        """The allocation, unless it was tried."""
        return None if any(allocation.options == one.allocation.options for one in self.done) else allocation

    def _onwards(self, rhs: float, factor: float, *, before: float = math.inf, most: int = MOST_STEPS) -> Allocation | None:
        """The first that was not tried from this predicted degradation on."""
        for _ in range(most):
            if rhs >= before:
                return None
            allocation = self._new(self.solve(rhs))
            if allocation is not None:
                return allocation
            rhs *= factor
        return None

    def _walk(self, met: Allocation, spacing: float) -> Allocation | None:
        """The next one along the frontier: smaller than what meets the limits, by some times this share of it, and none of those tried."""
        mean, scatter = self._trend()
        first, last = (math.ceil(math.log(max(one, 1e-300), STEP)) for one in (met.predicted, math.exp(IMPROBABLE * scatter - mean)))
        tried = [one.allocation.value for one in self.done]
        value = met.value
        for _ in range(MOST_STEPS):
            value -= spacing * abs(met.value)
            step = first + bisect_left(range(first, last), True, key=lambda step: self._at(step).value <= value)
            if step >= last:
                return None
            first, allocation = step, self._at(step)
            value = min(value, allocation.value)
            if all(abs(allocation.value - other) >= spacing / 2 * abs(met.value) for other in tried):
                return allocation
        return None

    def _at(self, step: int) -> Allocation:
        """The frontier where its predicted degradation is at most `STEP` to this power."""
        if step not in self.frontier:
            self.frontier[step] = self.solve(STEP**step)
        return self.frontier[step]

    def _trend(self) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of measured over limit and over predicted degradation."""
        pairs = [(one.excess, one.allocation.predicted) for one in self.done]
        shifts = [math.log(excess / predicted) for excess, predicted in pairs if 0 < excess < math.inf and predicted > 0]
        least = LEAST_SCATTER if len(shifts) >= ENOUGH or any(one.met for one in self.done) else UNKNOWN_SCATTER
        return fmean(shifts or [0.0]), max(least, stdev(shifts) if len(shifts) > 1 else 0.0)


def _sides(done: Sequence[Round]) -> tuple[Round | None, list[Round]]:
    """The round that met the limits with the most predicted degradation, and those that missed them with more, by predicted degradation."""
    met = max((one for one in done if one.met), key=lambda one: one.allocation.predicted, default=None)
    least = -math.inf if met is None else met.allocation.predicted
    missed = [one for one in done if not one.met and one.allocation.predicted > least]
    return met, sorted(missed, key=lambda one: one.allocation.predicted)


def _between(met: Round, missed: Round) -> float:
    low, high = math.log(max(met.allocation.predicted, 1e-300)), math.log(missed.allocation.predicted)
    share = 0.5
    if 0 < met.excess < 1 < missed.excess < math.inf:
        share = (math.log(AIM) - math.log(met.excess)) / (math.log(missed.excess) - math.log(met.excess))
    return math.exp(low + min(0.85, max(0.15, share)) * (high - low))
