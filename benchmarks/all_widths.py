"""What the table of all widths costs, beside one width: seconds of processor time of the layers' calibration, parallel flavour, Lattice.

Widths 2 to 8 of the weights with inputs of 8 bits share the input's grid, and with it moments, ridge and least squares; with inputs as wide
as the weights they share the rows only.

    python benchmarks/all_widths.py --network resnet20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import subbyte
from subbyte.calibrate import reconstruct
from subbyte.run.events import Event, StageFinished, StageStarted
from subbyte.tasks import TASKS

RECIPE = replace(subbyte.Recipe(), flavour=subbyte.Flavour.PARALLEL)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of all widths beside that of one.")
    parser.add_argument("--network", choices=sorted(TASKS), default="resnet20")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.network](samples=256)
    for name, inputs in (("of 8 bits", (8,)), ("as wide as the weights", ())):
        one = seconds_of(partial(subbyte.quantize, task.model, task.calibration, widths=subbyte.Widths(4, 8 if inputs else 4)))
        budget = subbyte.Budget(average_bits=8, choices=subbyte.Choices(activation_bits=inputs))
        every = seconds_of(partial(subbyte.quantize, task.model, task.calibration, budget=budget))
        print(f"{options.network}, inputs {name}: one width {one:.2f} s, widths 2 to 8 {every:.2f} s, {every / one:.2f} times", flush=True)


def seconds_of(run: Callable[..., object]) -> float:
    """Processor seconds of the first stage that solves layers."""
    found: list[float] = []
    started: list[float] = []

    def observe(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage in ("calibrate", reconstruct.STAGE):
            started.append(time.process_time())
        if isinstance(event, StageFinished) and event.stage in ("calibrate", reconstruct.STAGE):
            found.append(time.process_time() - started[-1])

    run(recipe=RECIPE, observer=observe)
    return found[0]


if __name__ == "__main__":
    main()
