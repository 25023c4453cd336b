"""The core of an integer programme, searched exactly: layer by layer, partial allocations that could still be optimal go on.

A partial allocation with objective `D` and costs `C` cannot end below

    D + lambda (C - b) + sum over undecided layers of min_k (d_lk + lambda c_lk)          for any prices lambda >= 0

The greatest of these bounds for several prices decides: the best ones, and others around them, under which an allocation that has used
too much of one limit looks as bad as it is. A first pass keeps a few thousand and finds a good allocation; the second keeps all that could
beat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

BEAM = 2000
MOST_STATES = 1_000_000


@dataclass(frozen=True, eq=False)
class Core:
    """What is left of a programme, relative to the options it starts from.

    Args:
        gains: for each layer, the objective of its options minus that of the one it starts from, (options,) each.
        changes: likewise the costs, (limits, options) each.
        room: what the starting options leave of the limits, (limits,); may be negative.
        prices: (number, limits), the best first.
    """

    gains: Sequence[Array]
    changes: Sequence[Array]
    room: Array
    prices: Array


@dataclass(frozen=True, eq=False)
class CoreAnswer:
    """What a search found.

    Args:
        chosen: index of each layer's option; None if nothing within the limits was found.
        gain: its objective, relative to the start.
        complete: whether nothing was left out, so that it is the optimum (or there is none below `least`).
    """

    chosen: Indices | None
    gain: float
    complete: bool


def search_core(core: Core, least: float = np.inf) -> CoreAnswer:
    """The allocation with the least objective, if it is below `least`.

    Args:
        core: what to search.
        least: only allocations with a smaller gain count.

    Source:
        Dynamic programming over an expanding core: Pisinger 1995; several multipliers for pruning: as in Hifi, Michrafi, Sbihi 2006.
    """
    first = _sweep(core, least, BEAM)
    return first if first.complete else _sweep(core, first.gain, MOST_STATES, first.chosen)


def _sweep(core: Core, least: float, most: int, known: Indices | None = None) -> CoreAnswer:
    """One pass with at most so many partial allocations."""
    ends = _Ends.of(core)
    objective, costs = np.zeros(1), np.zeros((len(core.room), 1))
    steps: list[tuple[Indices, Indices]] = []
    best: tuple[int, int, int] | None = None
    complete = True
    for stage in range(len(core.gains) + 1):
        value, at, price = ends.best_end(stage, objective, costs, core.room)
        if value < least:
            least, best = value, (stage, at, price)
        if stage == len(core.gains):
            break
        gains, changes = core.gains[stage], core.changes[stage]
        objective = (objective[:, None] + gains).ravel()
        costs = (costs[:, :, None] + changes[:, None, :]).reshape(len(core.room), -1)
        bound = ends.bound(stage + 1, objective, costs, core.room)
        keep = np.flatnonzero(bound < least)
        if len(keep) > most:
            complete = False
            keep = keep[np.argpartition(bound[keep], most)[:most]]
        steps.append((keep // len(gains), keep % len(gains)))
        objective, costs = objective[keep], costs[:, keep]
        if not len(keep):
            break
    return CoreAnswer(known if best is None else _trace(steps, best, ends), least, complete)


def _trace(steps: Sequence[tuple[Indices, Indices]], best: tuple[int, int, int], ends: _Ends) -> Indices:
    """The options of the best allocation: those decided, then the ones that prices ask for."""
    stage, at, price = best
    chosen = ends.asked[:, price].copy()
    for layer in reversed(range(stage)):
        parents, options = steps[layer]
        chosen[layer] = options[at]
        at = int(parents[at])
    return chosen


@dataclass(frozen=True, eq=False)
class _Ends:
    """What undecided layers add, from each stage on: bounds (stages, prices), and completions that the prices ask for."""

    prices: Array
    rest: Array
    least_costs: Array
    asked: Indices
    end_gains: Array
    end_costs: Array

    @classmethod
    def of(cls, core: Core) -> _Ends:
        layers, (count, limits) = len(core.gains), core.prices.shape
        rest, least_costs = np.zeros((layers + 1, count)), np.zeros((layers + 1, limits))
        end_gains, end_costs = np.zeros((layers + 1, count)), np.zeros((layers + 1, limits, count))
        asked = np.zeros((layers, count), dtype=np.int64)
        for layer in reversed(range(layers)):
            gains, changes = core.gains[layer], core.changes[layer]
            priced = gains + core.prices @ changes
            asked[layer] = priced.argmin(axis=1)
            rest[layer] = rest[layer + 1] + priced.min(axis=1)
            least_costs[layer] = least_costs[layer + 1] + changes.min(axis=1)
            end_gains[layer] = end_gains[layer + 1] + gains[asked[layer]]
            end_costs[layer] = end_costs[layer + 1] + changes[:, asked[layer]]
        return cls(core.prices, rest, least_costs, asked, end_gains, end_costs)

    def bound(self, stage: int, objective: Array, costs: Array, room: Array) -> Array:
        """What partial allocations cannot end below; infinite where a limit cannot be met any more."""
        over = costs - room[:, None]
        bound = objective + (self.prices @ over + self.rest[stage][:, None]).max(axis=0)
        return np.where((over + self.least_costs[stage][:, None] <= 0).all(axis=0), bound, np.inf)

    def best_end(self, stage: int, objective: Array, costs: Array, room: Array) -> tuple[float, int, int]:
        """The least objective of all completions within the limits: its value, the partial allocation, the prices."""
        best = (np.inf, 0, 0)
        for price in range(len(self.prices)):
            within = (costs + self.end_costs[stage][:, price, None] <= room[:, None]).all(axis=0)
            if within.any():
                values = np.where(within, objective + self.end_gains[stage, price], np.inf)
                at = int(values.argmin())
                best = min(best, (float(values[at]), at, price))
        return best
