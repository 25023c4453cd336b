"""The integer programme: time at 1,000 layers with 49 options and three limits, time of a frontier, and 10,000 instances by brute force.

python benchmarks/integer_program.py      # a minute or two on an idle core
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from subbyte.allocate.integer_program import Program, solve
from subbyte.errors import InfeasibleError

OPTIONS = [(weight, inputs) for inputs in range(2, 9) for weight in range(2, 9)]


def main() -> None:
    for seed in range(5):
        loss, costs, limits = instance(1000, seed)
        started = time.process_time()  # one thread: on an idle core, the time that passes
        solved = solve(Program(loss, costs, limits))
        seconds = time.process_time() - started
        print(
            f"1000 layers x 49 options, 3 limits, instance {seed}: {seconds:.2f} s of processor time, {solved.status}, gap {solved.gap:.1e}"
        )
    loss, costs, _ = instance(60, 0)
    sizes = np.linspace(costs["bytes"].min(axis=1).sum(), costs["bytes"].max(axis=1).sum(), 200)
    started = time.process_time()
    for size in sizes:
        assert solve(Program(loss, {"bytes": costs["bytes"]}, {"bytes": float(size)})).status == "optimal"
    print(f"frontier of 200 points, 60 layers x 49 options: {time.process_time() - started:.2f} s")
    print(f"10,000 random instances by brute force: {different(10_000)} differ")


def instance(groups: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """Layers of all sizes; bytes, bit operations and a noisy latency, each limited to what 4 bits everywhere take."""
    chance = np.random.default_rng(seed)
    weight, inputs = np.array(OPTIONS).T
    count = np.exp(chance.uniform(np.log(500), np.log(2e6), (groups, 1))).round()
    macs = count * np.exp(chance.uniform(0, 6, (groups, 1)))
    loss = np.exp(chance.normal(0, 1.5, (groups, 1))) * 4.0**-weight + np.exp(chance.normal(0, 1.5, (groups, 1))) * 4.0**-inputs
    loss *= np.exp(chance.normal(0, 0.1, loss.shape))
    seconds = np.exp(chance.normal(0, 0.5, (groups, 1))) * (weight + inputs) * np.exp(chance.normal(0, 0.05, loss.shape))
    costs = {"bytes": np.floor(count * weight / 8), "bit_operations": macs * weight * inputs, "latency": seconds}
    return loss, costs, {name: float(table[:, OPTIONS.index((4, 4))].sum()) for name, table in costs.items()}


def different(count: int) -> int:
    """How many of so many small random instances have another optimum by brute force."""
    chance, wrong = np.random.default_rng(0), 0
    for _ in range(count):
        groups, options, limits = chance.integers(1, 5), chance.integers(1, 5), chance.integers(1, 4)
        objective = np.round(chance.normal(0, 1, (groups, options)), int(chance.integers(1, 5)))
        costs = chance.integers(0, 20, (limits, groups, options)).astype(float)
        room = np.round(chance.uniform(costs.min(axis=2).sum(axis=1) - 2, costs.max(axis=2).sum(axis=1)))
        best, rows = np.inf, np.arange(groups)
        for chosen in itertools.product(range(options), repeat=int(groups)):
            if (costs[:, rows, chosen].sum(axis=1) <= room).all():
                best = min(best, float(objective[rows, chosen].sum()))
        names = [str(i) for i in range(limits)]
        try:
            found = solve(Program(objective, dict(zip(names, costs, strict=True)), dict(zip(names, room, strict=True)))).objective
        except InfeasibleError:
            found = np.inf
        wrong += not (found == best or abs(found - best) <= 1e-9)
    return wrong


if __name__ == "__main__":
    main()
