"""The integer programme against brute force, its proof, and what it says when nothing is within the limits."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from subbyte.allocate.core_search import Core, search_core
from subbyte.allocate.integer_program import Program, solve
from subbyte.allocate.prices import solve_by_highs
from subbyte.errors import InfeasibleError, OptionError


def brute_force(objective: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> float:
    """The least objective of all allocations within the limits; infinite if there is none."""
    groups, options = objective.shape
    best, rows = np.inf, np.arange(groups)
    for chosen in itertools.product(range(options), repeat=groups):
        if (costs[:, rows, chosen].sum(axis=1) <= limits).all():
            best = min(best, float(objective[rows, chosen].sum()))
    return best


def random_instance(chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most 4 groups, 4 options, 3 limits; ties, negative objectives and limits that nothing meets among them."""
    groups, options, limits = chance.integers(1, 5), chance.integers(1, 5), chance.integers(0, 4)
    objective = np.round(chance.normal(0, 1, (groups, options)), int(chance.integers(0, 6)))
    costs = chance.integers(0, 20, (limits, groups, options)).astype(float)
    if chance.random() < 0.3:
        costs = costs * 1e6 + chance.integers(0, 3, costs.shape)
    room = chance.uniform(costs.min(axis=2).sum(axis=1) * 0.9 - 1, costs.max(axis=2).sum(axis=1) + 1)
    return objective, costs, np.round(room)


@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_is_that_of_brute_force(seed: int) -> None:
    chance = np.random.default_rng(seed)
    for _ in range(100):
        objective, costs, limits = random_instance(chance)
        names = [f"limit {i}" for i in range(len(limits))]
        best = brute_force(objective, costs, limits)
        program = Program(objective, dict(zip(names, costs, strict=True)), dict(zip(names, limits, strict=True)))
        if best == np.inf:
            with pytest.raises(InfeasibleError) as caught:
                solve(program)
            assert_nearest(caught.value, names, objective, costs, limits)
            continue
        solved = solve(program)
        rows = np.arange(len(objective))
        assert solved.status == "optimal" and solved.gap <= 1e-9
        assert abs(solved.objective - best) <= 1e-9 and solved.bound <= best + 1e-9
        assert (costs[:, rows, solved.chosen].sum(axis=1) <= limits).all()


def assert_nearest(error: InfeasibleError, names: list[str], objective: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> None:
    """The named limit is in the way, and raised to the nearest value it is no more; a hair below, it still is."""
    if error.nearest is None:
        assert len(limits) > 1
        return
    at = names.index(error.limit)
    others = limits if error.where else np.full_like(limits, np.inf)
    raised = others.copy()
    raised[at] = error.nearest
    assert brute_force(objective, costs, raised) < np.inf
    raised[at] = error.nearest - 1e-6
    assert brute_force(objective, costs, raised) == np.inf


def test_a_core_that_is_too_large_to_search_goes_to_highs() -> None:
    chance = np.random.default_rng(0)
    for _ in range(30):
        gains = [np.append(0.0, chance.uniform(0, 1, 3)) for _ in range(4)]
        changes = [np.column_stack([np.zeros(2), chance.integers(-9, 9, (2, 3))]) for _ in range(4)]
        room = chance.integers(-12, 3, 2).astype(float)
        searched = search_core(Core(gains, changes, room, np.zeros((1, 2))))
        picked = solve_by_highs(gains, changes, room, 1.0)
        assert searched.complete and (picked is None) == (searched.chosen is None)
        if picked is not None:
            chosen, bound, proved = picked
            assert proved and abs(sum(g[k] for g, k in zip(gains, chosen, strict=True)) - searched.gain) < 1e-9
            assert bound <= searched.gain + 1e-6


def large_instance(groups: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """Layers of all sizes with 7 x 7 widths, and three limits that all bind, near 4 bits."""
    chance = np.random.default_rng(seed)
    weight, inputs = np.tile(np.arange(2, 9), 7), np.repeat(np.arange(2, 9), 7)
    count = np.exp(chance.uniform(np.log(500), np.log(2e6), (groups, 1))).round()
    macs = count * np.exp(chance.uniform(0, 6, (groups, 1)))
    loss = np.exp(chance.normal(0, 1.5, (groups, 1))) * 4.0**-weight + np.exp(chance.normal(0, 1.5, (groups, 1))) * 4.0**-inputs
    loss *= np.exp(chance.normal(0, 0.1, loss.shape))
    seconds = np.exp(chance.normal(0, 0.5, (groups, 1))) * (weight + inputs) * np.exp(chance.normal(0, 0.05, loss.shape))
    costs = {"bytes": np.floor(count * weight / 8), "bit_operations": macs * weight * inputs, "latency": seconds}
    return loss, costs, {name: float(table[:, (weight == 4) & (inputs == 4)].sum()) for name, table in costs.items()}


def test_a_thousand_layers_with_three_limits_take_seconds() -> None:
    loss, costs, limits = large_instance(1000, seed=0)
    started = time.perf_counter()
    solved = solve(Program(loss, costs, limits))
    assert time.perf_counter() - started < 20, "benchmarks/integer_program.py has the time on an idle machine, about a second"
    assert solved.status == "optimal" and solved.gap <= 1e-9 * solved.objective
    for name, table in costs.items():
        assert table[np.arange(1000), solved.chosen].sum() <= limits[name]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(OptionError, match="NaN or infinite"):
        Program([[number, 1.0]], {}, {})


def test_an_empty_programme_is_refused() -> None:
    with pytest.raises(OptionError, match="at least one group"):
        Program([], {}, {})
    with pytest.raises(OptionError, match="one number for each option"):
        Program([[1.0, 2.0]], {"bytes": [[1.0]]}, {"bytes": 1.0})
