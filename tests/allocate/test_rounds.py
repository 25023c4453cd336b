"""Rounds: on a frontier with a known answer, the limit is met and the size is near the smallest that meets it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from subbyte.allocate.allocation import Allocation
from subbyte.allocate.rounds import excess_of, hold
from subbyte.errors import InfeasibleError

LEAST = 1e-4


def allocation(predicted: float) -> Allocation:
    """A frontier in whole bytes: a quarter of the loss for 12 % more."""
    size = round(100_000 * (1.0 - 0.08 * math.log(predicted)))
    exact = math.exp((1.0 - size / 100_000) / 0.08)
    return Allocation({"fc": (size, None)}, exact, size, 4.0, 1, "size", float(size), float(size), 0.0, "optimal", 0.0)


def solve(most: float | None) -> Allocation:
    assert most is not None
    if most < LEAST:
        raise InfeasibleError("degradation", most, LEAST)
    return allocation(most)


@pytest.mark.parametrize("seed", range(40))
def test_the_limit_is_met_near_the_smallest_size(seed: int) -> None:
    chance = np.random.default_rng(seed)
    factor, power, limit = chance.uniform(0.2, 5.0), chance.uniform(0.6, 1.6), math.exp(chance.uniform(-6.5, -2.0))
    seen: list[float] = []

    def measure(assembled: Allocation) -> dict[str, float]:
        seen.append(assembled.predicted)
        return {"kl": factor * assembled.predicted**power}

    held = hold(solve, lambda one: one, measure, {"kl": limit}, limit, 8)
    meets = (limit / factor) ** (1.0 / power)
    assert len(seen) <= 8 and len(set(seen)) == len(seen)
    if meets < LEAST * 1.01:
        return
    assert held.kept.met and held.kept.measured["kl"] <= limit
    assert held.kept.allocation.size_bytes <= 1.02 * allocation(meets).size_bytes


def test_what_meets_the_limit_alone_among_larger_ones_that_do_not_is_found() -> None:
    over = []
    for seed in range(30):
        chance = np.random.default_rng(seed)
        noise, limit = np.exp(chance.normal(0.0, 0.45, 2000)), math.exp(chance.uniform(-6.5, -2.0))

        def measured(one: Allocation, noise: object = noise) -> float:
            return one.predicted * noise[int(100 * math.log(one.size_bytes))]  # type: ignore[index] # another draw for each percent

        held = hold(solve, lambda one: one, lambda one: {"kl": measured(one)}, {"kl": limit}, limit, 16)  # noqa: B023
        sweep = [allocation(predicted) for predicted in np.exp(np.linspace(math.log(LEAST), 0.0, 200))]
        meets = [one.size_bytes for one in sweep if measured(one) <= limit]
        if meets:
            assert held.kept.met
            over.append(held.kept.allocation.size_bytes / min(meets) - 1.0)
    assert np.mean(over) < 0.02 and np.mean(np.array(over) <= 0.03) >= 0.8


def test_few_rounds_do_where_measured_follows_predicted() -> None:
    held = hold(solve, lambda one: one, lambda one: {"kl": 2.0 * one.predicted}, {"kl": 0.01}, 0.01, 16)
    assert held.kept.met and len(held.rounds) <= 6


def test_what_cannot_be_met_ends_with_the_best() -> None:
    held = hold(solve, lambda one: one, lambda one: {"kl": 3.0 + one.predicted}, {"kl": 0.01}, 0.01, 8)
    assert not held.kept.met and held.kept.allocation.predicted == min(one.allocation.predicted for one in held.rounds)


def test_what_has_the_least_predicted_degradation_is_not_the_last_hope() -> None:
    chance = np.random.default_rng(0)
    noise = np.exp(chance.normal(0.0, 0.45, 2000))
    noise[int(100 * math.log(allocation(LEAST).size_bytes))] = 2.0
    held = hold(
        solve, lambda one: one, lambda one: {"kl": one.predicted * noise[int(100 * math.log(one.size_bytes))]}, {"kl": LEAST}, LEAST, 16
    )
    assert not held.rounds[0].met and held.kept.met


def test_one_round_where_no_limit_is_on_degradation() -> None:
    held = hold(lambda _: allocation(0.01), lambda one: one, lambda _: {}, {}, None, 8)
    assert held.kept.met and len(held.rounds) == 1


def test_nan_is_above_any_limit() -> None:
    assert excess_of({"kl": math.nan}, {"kl": 1.0}) == math.inf
    assert excess_of({"kl": 0.1, "disagreement": 0.01}, {"kl": 0.2, "disagreement": 0.0}) == math.inf
    assert excess_of({"drop": -0.3}, {"drop": 0.5}) == 0.0
