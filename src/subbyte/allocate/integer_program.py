"""The integer programme: one option for every group of layers, the least objective under any number of cost limits, with proof.

    minimise    sum_l d_lk x_lk
    subject to  sum_l c_ilk x_lk <= b_i  for every limit i,    sum_k x_lk = 1,    x_lk in {0, 1}

Handing all of it to a solver takes seconds at 1,000 layers with 49 options. Nearly all options can be ruled out first, exactly:

1. an option that is nowhere better than another of the same layer goes (*dominated*);
2. for any prices `lambda >= 0`, `phi(lambda) = sum_l min_k (d_lk + lambda c_lk) - lambda b` bounds the optimum from below; the best prices
   are found by cutting planes in as many dimensions as there are limits;
3. an allocation that takes option k in layer l costs at least `phi + r_lk`, with `r_lk = d_lk + lambda c_lk - min_k (...)`. So only options
   with `r_lk <= delta` are given to the solver. If its optimum is at most `phi + delta`, it is the optimum of the whole; otherwise delta
   becomes the distance that it showed, and the second answer is.

HiGHS (through scipy) solves what is left, in units of delta, in which its tolerances are small.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from subbyte.allocate.core_search import Array, Core, Indices, search_core
from subbyte.allocate.prices import best_prices, prices_around, solve_by_highs
from subbyte.errors import InfeasibleError, OptionError

CORE_OPTIONS = 100  # options beside the cheapest of every layer that are searched at first
OPTIMAL = "optimal"
TIME_LIMIT = "time limit"


@dataclass(frozen=True, eq=False)
class Program:
    """An integer programme.

    Args:
        objective: for each group, one number for each of its options.
        costs: by the limit's name, likewise, what a limit counts.
        limits: by name, what the sum may be at most.

    Raises:
        OptionError: if a number is NaN or infinite, or the tables do not have the same shape.

    Example:
        >>> program = Program([[9.0, 1.0], [5.0, 2.0]], {"bytes": [[1.0, 3.0], [1.0, 3.0]]}, {"bytes": 4.0})
        >>> solve(program).chosen
        (1, 0)
    """

    objective: Sequence[Sequence[float]]
    costs: Mapping[str, Sequence[Sequence[float]]]
    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        sizes = [len(options) for options in self.objective]
        if not sizes or min(sizes) == 0:
            raise OptionError("an integer programme needs at least one group, and an option in each")
        for name, table in (("objective", self.objective), *self.costs.items()):
            if [len(options) for options in table] != sizes:
                raise OptionError(f"'{name}' has not one number for each option of each group")
            if not all(np.isfinite(options).all() for options in table):
                raise OptionError(f"'{name}' holds NaN or infinite numbers")
        if set(self.limits) - set(self.costs) or not all(np.isfinite(limit) for limit in self.limits.values()):
            raise OptionError("every limit is a finite number with a cost of its name")


@dataclass(frozen=True)
class Solved:
    """An optimum and its proof.

    Args:
        chosen: index of the option of each group.
        objective: its sum.
        bound: no allocation within the limits has a smaller objective.
        status: `"optimal"`, or `"time limit"` where the search was cut off.
        seconds: it took.

    Example:
        >>> Solved((0,), 1.0, 1.0, "optimal", 0.0).gap
        0.0
    """

    chosen: tuple[int, ...]
    objective: float
    bound: float
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """How far the objective may be above the optimum."""
        return max(0.0, self.objective - self.bound)


def solve(program: Program) -> Solved:
    """The optimum of an integer programme.

    Args:
        program: what to solve.

    Raises:
        InfeasibleError: if no allocation is within the limits; it names the binding limit and the nearest value that could be met.

    Source:
        Lagrangian bounds and reduced costs: Geoffrion 1974; the core: Pisinger 1995, *A minimal algorithm for the multiple-choice knapsack
        problem*; HiGHS: Huangfu, Hall 2018.

    Example:
        >>> solve(Program([[3.0, 1.0]], {"bytes": [[2.0, 4.0]]}, {"bytes": 1.0}))
        Traceback (most recent call last):
        subbyte.errors.InfeasibleError: no allocation has bytes within 1; the least is 2
    """
    started = time.perf_counter()
    tables = _Tables.of(program)
    for i, name in enumerate(tables.names):
        least = float(tables.costs[i].min(axis=1).sum())
        if least > tables.limits[i]:
            raise InfeasibleError(name, program.limits[name], least)
    found = _search(tables)
    if found is None:
        raise _nearest(program, tables)
    chosen, bound, status = found
    objective = float(tables.objective[np.arange(len(chosen)), chosen].sum())
    return Solved(tuple(int(k) for k in chosen), objective, min(bound, objective), status, time.perf_counter() - started)


def _nearest(program: Program, tables: _Tables) -> InfeasibleError:
    """Which limit stands in the way: the first that could be met beside all others if it were raised, and to what."""
    for i, name in enumerate(tables.names):
        others = _Tables(
            (*tables.names[:i], *tables.names[i + 1 :]),
            np.where(np.isfinite(tables.objective), tables.costs[i], np.inf),
            np.delete(tables.costs, i, axis=0),
            np.delete(tables.limits, i),
        )
        found = _search(others)
        if found is not None:
            least = float(tables.costs[i][np.arange(len(found[0])), found[0]].sum())
            return InfeasibleError(name, program.limits[name], least, "beside the other limits")
    return InfeasibleError(" and ".join(tables.names), None, None)


@dataclass(frozen=True, eq=False)
class _Tables:
    """The programme as arrays: objective (L, K), infinite where there is no option; costs (m, L, K); limits (m,)."""

    names: tuple[str, ...]
    objective: Array
    costs: Array
    limits: Array

    @classmethod
    def of(cls, program: Program) -> _Tables:
        groups, most = len(program.objective), max(len(options) for options in program.objective)
        names = tuple(program.limits)
        objective, costs = np.full((groups, most), np.inf), np.full((len(names), groups, most), np.inf)
        for row, options in enumerate(program.objective):
            objective[row, : len(options)] = options
            for i, name in enumerate(names):
                costs[i, row, : len(options)] = program.costs[name][row]
        return cls(names, objective, costs, np.array([program.limits[name] for name in names], dtype=np.float64))


def _search(tables: _Tables) -> tuple[Indices, float, str] | None:
    """Chosen options, bound and status; None if nothing is within the limits."""
    if not len(tables.limits):
        return tables.objective.argmin(axis=1), float(tables.objective.min(axis=1).sum()), OPTIMAL
    objective = _without_dominated(tables.objective, tables.costs)
    costs = np.where(np.isfinite(objective), tables.costs, 0.0)
    prices = best_prices(objective, costs, tables.limits)
    priced = objective + np.tensordot(prices, costs, axes=1)
    least = priced.min(axis=1, keepdims=True)
    bound = float(least.sum() - prices @ tables.limits)
    reduced = priced - least
    ordered = np.sort(reduced[np.isfinite(reduced)])
    delta = float(ordered[min(len(ordered) - 1, len(objective) + CORE_OPTIONS)])
    while True:
        core = reduced <= delta
        whole = bool(core.sum() == len(ordered))
        found = _solve_core(_Tables(tables.names, objective, costs, tables.limits), core, reduced, prices, delta)
        if found is None and whole:
            return None
        if found is None:
            delta = float(ordered[min(len(ordered) - 1, 4 * int(core.sum()))])
            continue
        chosen, core_bound, status = found
        distance = float(objective[np.arange(len(chosen)), chosen].sum()) - bound
        if status != OPTIMAL:
            return chosen, bound, status
        if whole or distance <= delta:
            return chosen, core_bound, status
        delta = distance


def _without_dominated(objective: Array, costs: Array) -> Array:
    """The objective, infinite for every option that another one of its group is nowhere worse than; of equals the first stays."""
    options = objective.shape[1]
    no_worse = np.ones((len(objective), options, options), dtype=bool)
    equal = np.ones_like(no_worse)
    for values in (objective, *costs):
        no_worse &= values[:, :, None] <= values[:, None, :]
        equal &= values[:, :, None] == values[:, None, :]
    earlier = np.triu(np.ones((options, options), dtype=bool), 1)
    dominated = (no_worse & (~equal | earlier)).any(axis=1)
    return np.where(dominated, np.inf, objective)


def _solve_core(
    tables: _Tables, core: npt.NDArray[np.bool_], reduced: Array, prices: Array, delta: float
) -> tuple[Indices, float, str] | None:
    """The optimum over the options of the core, what bounds it from below, and the status; None if nothing is within the limits."""
    objective, costs, limits, rows = tables.objective, tables.costs, tables.limits, np.arange(len(core))
    start = np.where(core, reduced, np.inf).argmin(axis=1)
    room = limits - costs[:, rows, start].sum(axis=1)
    span = np.where(core, np.abs(costs - costs[:, rows, start][:, :, None]) / np.maximum(np.abs(limits), 1e-300)[:, None, None], 0.0)
    free = np.flatnonzero(core.sum(axis=1) > 1)
    free = free[np.argsort(-span.max(axis=(0, 2))[free], kind="stable")]  # what decides most comes first
    options = [np.flatnonzero(core[layer]) for layer in free]
    gains = [objective[layer, ks] - objective[layer, start[layer]] for layer, ks in zip(free, options, strict=True)]
    changes = [costs[:, layer, ks] - costs[:, layer, start[layer]][:, None] for layer, ks in zip(free, options, strict=True)]
    around = prices_around(prices, np.concatenate(changes, axis=1) if changes else costs[:, :, 0], delta)
    answer = search_core(Core(gains, changes, room, around))
    base = float(objective[rows, start].sum())
    if answer.complete:
        if answer.chosen is None:
            return None
        return _with(start, free, options, answer.chosen), base + answer.gain, OPTIMAL
    picked = solve_by_highs(gains, changes, room, delta)
    if picked is None:
        return None
    chosen, gain_bound, optimal = picked
    return _with(start, free, options, chosen), base + gain_bound, OPTIMAL if optimal else TIME_LIMIT


def _with(start: Indices, free: Indices, options: Sequence[Indices], chosen: Indices) -> Indices:
    """The starting options with those of the free layers exchanged."""
    changed = start.copy()
    changed[free] = [ks[k] for ks, k in zip(options, chosen, strict=True)]
    return changed
