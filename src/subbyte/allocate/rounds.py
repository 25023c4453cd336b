"""Budgets that hold: a degradation limit is met as measured on the assembled model, not as predicted.

The prediction adds up layers that were measured alone. How far it is from the truth depends on the widths, so it is corrected where it
is used: solve for a predicted degradation `rhs`, assemble, measure, and move `rhs` to where the measured value should meet the limit. With
`v` the measured value over its limit (the largest, of several), `log v` is interpolated over `log rhs` between the nearest `rhs` that
met the limit and the nearest that missed it; with one side only, `v` is taken to grow like `rhs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from subbyte.allocate.allocation import Allocation
from subbyte.errors import InfeasibleError

Assembled = TypeVar("Assembled")

CLOSE = 0.003  # sizes that differ by less than this share are not worth another round
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
    search = _Search()
    rhs = start
    for _ in range(rounds):
        allocation = _solved(solve, rhs, search)
        if any(allocation.options == earlier.allocation.options for earlier in done):
            rhs = search.after_repeat(allocation.predicted)
            if rhs is None:
                break
            continue
        assembled = assemble(allocation)
        measured = dict(measure(assembled))
        here = Round(allocation, measured, excess_of(measured, limits))
        done.append(here)
        if best is None or _better(here, best[0]):
            best = (here, assembled)
        if rhs is None:
            break
        rhs = search.next(here)
        if rhs is None:
            break
    assert best is not None
    return Held(best[1], best[0], tuple(done))


def _solved(solve: Callable[[float | None], Allocation], rhs: float | None, search: _Search) -> Allocation:
    """The allocation for a right-hand side; where that is below what any allocation has, the one with the least."""
    try:
        return solve(rhs)
    except InfeasibleError as error:
        if error.limit != "degradation" or error.nearest is None:
            raise
        search.least = error.nearest * (1 + 1e-9) + 1e-300
        return solve(search.least)


def _better(here: Round, there: Round) -> bool:
    if here.met != there.met:
        return here.met
    if here.met:
        return (here.allocation.value, here.excess) < (there.allocation.value, there.excess)
    return here.excess < there.excess


class _Search:
    """Where the measured value meets the limit, on the axis of predicted degradation."""

    def __init__(self) -> None:
        self.met: Round | None = None
        self.missed: Round | None = None
        self.least = 0.0

    def next(self, here: Round) -> float | None:
        """The right-hand side of the next round, or None if none is worth it."""
        predicted = here.allocation.predicted
        if here.met and (self.met is None or predicted > self.met.allocation.predicted):
            self.met = here
        if not here.met and (self.missed is None or predicted < self.missed.allocation.predicted):
            self.missed = here
        met, missed = self.met, self.missed
        if missed is not None and missed.allocation.predicted <= self.least * (1 + 1e-6):
            return None  # nothing has less degradation than what missed
        if met is not None and missed is not None:
            if met.allocation.predicted >= missed.allocation.predicted:
                return None  # noise: more predicted degradation met the limit, less missed it
            values = met.allocation.value, missed.allocation.value
            return None if values[0] - values[1] <= CLOSE * values[0] else self._between(met, missed)
        if missed is not None:
            return predicted * max(0.1, min(0.8, AIM / max(missed.excess, 1e-12))) if math.isfinite(missed.excess) else predicted * 0.25
        return predicted * min(8.0, max(1.25, AIM / max(here.excess, 1e-12)))

    def after_repeat(self, predicted: float) -> float | None:
        """The right-hand side after an allocation that was tried already: nothing lies between, or a step beyond."""
        if self.met is not None and self.missed is not None:
            return None
        return None if self.met is None else predicted * 2.0

    @staticmethod
    def _between(met: Round, missed: Round) -> float:
        low, high = math.log(max(met.allocation.predicted, 1e-300)), math.log(missed.allocation.predicted)
        share = 0.5
        if 0 < met.excess < 1 < missed.excess < math.inf:
            share = (math.log(AIM) - math.log(met.excess)) / (math.log(missed.excess) - math.log(met.excess))
        return math.exp(low + min(0.85, max(0.15, share)) * (high - low))
