"""Budgets on the real networks: accuracy at equal bytes beside uniform widths and a greedy allocation, Fisher beside Measured, limits held.

    python benchmarks/allocation.py accuracy resnet20 --seeds 0,1,2     # programme, greedy, uniform at 4, 3 and 2.5 bits on average
    python benchmarks/allocation.py sensitivity resnet20 --threads 1    # rank correlation of Fisher with Measured, and their times
    python benchmarks/allocation.py limits digits                       # 20 random limits on KL: met? how near the smallest size?

Weights have 2 to 8 bits and no layer is pinned. Inputs have 8 bits, or with `--inputs same`, the paper's relaxed setting, as many as the
layer's weights; limits are measured in that setting. Times are of the processor, over all threads.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr

import subbyte
from subbyte import Bank, Budget, Choices, Fisher, KLDivergence, Measured, Recipe, RelativeSquaredError, Widths
from subbyte.allocate.allocation import Market
from subbyte.allocate.sensitivity import STAGE
from subbyte.calibrate.loss import measure
from subbyte.calibrate.whole import Judge
from subbyte.run.events import Event, StageFinished, StageStarted
from subbyte.tasks import TASKS, Task
from subbyte.widths import Option

TEST_SAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description="Budgets on the real networks.")
    parser.add_argument("what", choices=("accuracy", "sensitivity", "limits"))
    parser.add_argument("network", choices=sorted(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--bits", default="4,3,2.5")
    parser.add_argument("--size", type=float, help="accuracy: this share of the float bytes in place of --bits")
    parser.add_argument("--inputs", choices=("8", "same"), default="8", help="accuracy, sensitivity: bits of inputs")
    parser.add_argument("--loss", choices=("squared", "kl"), default="squared", help="accuracy: what sensitivities measure")
    parser.add_argument("--limits", type=int, default=20)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    choices = Choices() if options.inputs == "same" else Choices(activation_bits=(8,))
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](samples=options.samples, seed=seed)
        if options.what == "accuracy":
            loss = KLDivergence() if options.loss == "kl" else None
            budgets = [Budget(average_bits=float(bits), choices=choices, loss=loss) for bits in options.bits.split(",")]
            accuracy(task, [Budget(size=options.size, choices=choices, loss=loss)] if options.size else budgets, seed)
        elif options.what == "sensitivity":
            sensitivity(task, choices)
        else:
            limits(task, options.limits, seed)


def accuracy(task: Task, budgets: list[Budget], seed: int) -> None:
    """Top-1 of the programme's allocation, of a greedy one from the same table, and of uniform widths."""
    print(f"{task.name}, seed {seed}, float {task.score(task.model):.2f} %")
    bank = Bank()
    for budget in budgets:
        result = subbyte.quantize(task.model, task.calibration, budget=budget, seed=seed, bank=bank)
        assert result.plan is not None
        told(task, "programme", result)
        greedy = greedy_allocation(result.plan.market, result.size_bytes)
        told(task, "greedy   ", quantized(task, greedy, seed, bank))
        bits = int(result.plan.allocation.average_bits + 0.01)
        assert budget.choices is not None
        inputs = 8 if budget.choices.activation_bits else bits
        told(task, f"uniform {bits}", quantized(task, dict.fromkeys(greedy, (bits, inputs)), seed, bank))


def quantized(task: Task, options: dict[str, Option], seed: int, bank: Bank) -> subbyte.Result:
    return subbyte.quantize(task.model, task.calibration, widths=Widths(pinned=options), seed=seed, bank=bank)


def told(task: Task, name: str, result: subbyte.Result) -> None:
    line = f"  {name} {result.size_bytes:>9,} bytes ({result.size_bytes / result.float_bytes:.4f}): {task.score(result.model):.2f} %"
    if result.plan is not None:
        chosen = result.plan.allocation
        line += f", {chosen.average_bits:.2f} bits, predicted {chosen.predicted:.4g}, measured {result.plan.measured_loss:.4g}"
    print(line, flush=True)


def greedy_allocation(market: Market, size_bytes: int) -> dict[str, Option]:
    """From the widest options down: always the step that saves most bytes for the sensitivity that it adds, until the size is met."""
    losses, costs = market.sensitivity.losses, market.costs
    rows = {name: sorted(row, key=costs.layers[name].bytes) for name, row in market.options.items()}
    at = {name: len(row) - 1 for name, row in rows.items()}
    while costs.size_bytes({name: rows[name][k] for name, k in at.items()}) > size_bytes:
        prices = {}
        for name, k in at.items():
            if k:
                saved = costs.layers[name].bytes(rows[name][k]) - costs.layers[name].bytes(rows[name][k - 1])
                prices[name] = (losses[name][rows[name][k - 1]] - losses[name][rows[name][k]]) / saved
        at[min(prices, key=prices.__getitem__)] -= 1
    return {name: rows[name][k] for name, k in at.items()}


def sensitivity(task: Task, choices: Choices) -> None:
    """Fisher against Measured, on the same solutions, by two losses."""
    bank, clock = Bank(), list[float]()

    def note(event: Event) -> None:
        if isinstance(event, StageStarted | StageFinished) and event.stage == STAGE:
            clock.append(time.process_time())

    with torch.no_grad():
        forward = min(timed(task) for _ in range(3))
    for loss in (KLDivergence(), RelativeSquaredError()):
        tables = []
        for method in (Fisher(), Measured()):
            recipe = Recipe(sensitivity=method, choices=choices)
            budget = Budget(size=0.2, loss=loss)
            result = subbyte.quantize(task.model, task.calibration, budget=budget, recipe=recipe, bank=bank, observer=note)
            assert result.plan is not None
            tables.append(np.array([list(row.values()) for row in result.plan.sensitivity.losses.values()]))
        rank = spearmanr(tables[0].ravel(), tables[1].ravel()).statistic
        ratio = np.exp(np.abs(np.log(tables[0] / tables[1])).mean())
        layers, options = tables[0].shape
        fisher, measured = clock[-3] - clock[-4], clock[-1] - clock[-2]
        times = f"Fisher {fisher:.1f} s = {fisher / forward:.1f} forwards, Measured {measured:.1f} s"
        compared = f"Spearman {rank:.4f}, off by a factor of {ratio:.2f} on average"
        print(f"{task.name}, {type(loss).__name__}, {layers} layers x {options} options: {compared}; {times}", flush=True)


def timed(task: Task) -> float:
    started = time.process_time()
    for batch in task.calibration.split(32):
        task.model(batch)
    return time.process_time() - started


def limits(task: Task, count: int, seed: int) -> None:
    """Random limits on the KL divergence: whether each is met as measured, and how the size compares with a sweep of the frontier.

    Beside it the KL divergence on test samples, which no limit promises: in how many cases it is within the limit too, and in how many of
    the sweep's models the test value is within what held-out samples alone, and with their mixtures, say.
    """
    bank, chance = Bank(), np.random.default_rng(seed)
    first = subbyte.quantize(task.model, task.calibration, budget=Budget(kl=1e9, choices=Choices()), seed=seed, bank=bank)
    assert first.plan is not None
    recipe = Recipe(sampling=replace(Recipe().sampling, held_out=Budget(kl=1.0).held_out))  # as where KL is limited
    sweep, foreseen = [], np.zeros(2, dtype=int)
    for point in first.plan.frontier(60):
        budget = Budget(bytes=point.size_bytes, loss=KLDivergence(), choices=Choices())
        fixed = subbyte.quantize(task.model, task.calibration, budget=budget, recipe=recipe, seed=seed, bank=bank)
        alone = Judge.of(fixed.original, fixed.calibration, KLDivergence())
        mixed = alone.with_mixtures(fixed.original, Budget(kl=1.0).mixtures, seed)
        found = [judge.loss_of(fixed.model) for judge in (alone, mixed)]
        tested = divergence(task, fixed)
        foreseen += [tested <= value for value in found]
        sweep.append((fixed.size_bytes, found[1]))
        print(f"  {fixed.size_bytes:,} bytes: held out {found[0]:.4g}, with mixtures {found[1]:.4g}, test {tested:.4g}", flush=True)
    print(f"test value within that of held-out samples: {foreseen[0]} of {len(sweep)}, with mixtures: {foreseen[1]}", flush=True)
    met, worst, rounds, tests = 0, [], [], 0
    reachable = [loss for _, loss in sweep]
    for limit in np.exp(chance.uniform(np.log(min(reachable) * 1.1), np.log(max(reachable)), count)):
        result = subbyte.quantize(task.model, task.calibration, budget=Budget(kl=float(limit), choices=Choices()), seed=seed, bank=bank)
        assert result.plan is not None
        value = next(one.measured["kl"] for one in result.plan.rounds if one.allocation.options == result.allocation)
        smallest, tested = min(size for size, loss in sweep if loss <= limit), divergence(task, result)
        met, tests = met + (value <= limit), tests + (tested <= limit)
        worst.append(100 * (result.size_bytes / smallest - 1.0))
        rounds.append(len(result.plan.rounds))
        sizes = f"{result.size_bytes:,} bytes, sweep {smallest:,}, {worst[-1]:+.1f} %"
        print(f"  kl <= {limit:.4g}: {value:.4g} (test {tested:.4g}) at {sizes}, {rounds[-1]} rounds", flush=True)
    close = sum(excess <= 3.0 for excess in worst)
    print(f"{task.name}: {met} of {count} met, {tests} on test samples")
    print(f"size: {close} at most 3 % above the sweep's smallest, all at most {max(worst):.1f} %")
    print(f"rounds: {np.mean(rounds):.1f} on average, at most {max(rounds)}")


@torch.no_grad()
def divergence(task: Task, result: subbyte.Result) -> float:
    """KL divergence from the float model on test samples, at most 2,000 of them, evenly spaced."""
    inputs = task.test_inputs[:: max(1, len(task.test_inputs) // TEST_SAMPLES)]
    batches = [batch if task.preprocess is None else task.preprocess(batch) for batch in inputs.split(task.batch_size)]
    return measure(result.model, batches, [result.original(batch) for batch in batches], KLDivergence())


if __name__ == "__main__":
    main()
