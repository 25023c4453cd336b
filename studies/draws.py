"""How many probes of every sample does `Fisher` need? What the integer programme chooses from its table, by a table with many more.

For each budget and number of draws: the predicted degradation of the widths chosen, by the table with the most draws, as a multiple of what
that table itself would choose; and the seconds that the table took. Layers are solved once.

    python studies/draws.py resnet20 [--bits 5,4,3,2.5] [--seed 0] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import subbyte
from subbyte import Bank, Budget, Fisher, OutputLoss, Recipe
from subbyte.allocate.sensitivity import BatchShare, LayerOptions
from subbyte.model.batches import Batch
from subbyte.tasks import TASKS

MOST = 16
DRAWS = (1, 2, 4)


@dataclass(frozen=True)
class Timed(Fisher):
    """Notes how long its shares took."""

    seconds: list[float] = field(default_factory=list, compare=False, repr=False)

    def share(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> BatchShare:
        """See `SensitivityMethod`."""
        started = time.perf_counter()
        found = super().share(model, layers, batch, loss, generator)
        self.seconds.append(time.perf_counter() - started)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocations from Fisher's tables of few and many draws.")
    parser.add_argument("network", choices=sorted(TASKS))
    parser.add_argument("--bits", default="5,4,3,2.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task, bank, plans = TASKS[options.network](seed=options.seed), Bank(), {}
    for draws in (MOST, *DRAWS):
        method = Timed(draws)
        recipe, budget = Recipe(sensitivity=method, flavour=subbyte.Flavour.PARALLEL), Budget(average_bits=8.0)
        result = subbyte.quantize(task.model, task.calibration, budget=budget, recipe=recipe, seed=options.seed, bank=bank)
        assert result.plan is not None
        plans[draws] = result.plan
        print(f"{draws} draws: {sum(method.seconds):.1f} s", flush=True)
    for bits in map(float, options.bits.split(",")):
        chosen = {draws: plan.solve(Budget(average_bits=bits)).options for draws, plan in plans.items()}
        best = plans[MOST].sensitivity.total(chosen[MOST])
        row = (f"{draws}: {plans[MOST].sensitivity.total(chosen[draws]) / best:.4f}" for draws in DRAWS)
        print(f"{options.network} {bits:g} bits, draws: multiple of the least predicted by {MOST}   " + "   ".join(row))


if __name__ == "__main__":
    main()
