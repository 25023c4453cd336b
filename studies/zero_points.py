"""What zero-points of weights are worth: layers alone, with and without them, on test images.

    python studies/zero_points.py [--network mobilenet_v1] [--widths 4/8,3/8] [--seeds 0,1] [--recipe default] [--threads 1]

First and last layer have 8 bits, at which weights have no zero-points in any case. Rows are printed as they are measured, means over the
seeds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch

import subbyte
from subbyte.tasks import TASKS
from subbyte.tasks.scoring import kl_divergence

RECIPES = {"default": subbyte.default(), "rounding": subbyte.rounding()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks with and without zero-points of weights.")
    parser.add_argument("--network", choices=sorted(TASKS), default="mobilenet_v1")
    parser.add_argument("--widths", default="4/8,3/8", help="weight and activation bits")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="default")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subbyte.keep_freed_memory()
    print("| network | W/A | recipe | zero-points | layers' errors | top-1 | KL | bytes |\n" + "|---" * 8 + "|", flush=True)
    for pair in options.widths.split(","):
        bits = tuple(int(each) for each in pair.split("/"))
        for symmetric in (True, False):
            recipe = replace(RECIPES[options.recipe], symmetric_weights=symmetric)
            rows = [measure(options.network, bits, recipe, options.samples, seed) for seed in map(int, options.seeds.split(","))]
            error, top, kl, size = (statistics.fmean(column) for column in zip(*rows, strict=True))
            start = f"| {options.network} | {pair} | {options.recipe} | {'no' if symmetric else 'yes'} |"
            print(f"{start} {error:.4g} | {top:.2f} | {kl:.4f} | {size:,.0f} |", flush=True)


def measure(network: str, bits: tuple[int, ...], recipe: subbyte.Recipe, samples: int, seed: int) -> tuple[float, float, float, int]:
    """Geometric mean of the layers' errors, top-1 in percent, KL divergence in nats, bytes of the packed file."""
    task = TASKS[network](samples=samples, seed=seed)
    widths = subbyte.Widths(*bits, pinned=dict.fromkeys(task.first_and_last, 8))
    result = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)
    error = statistics.geometric_mean([layer.error for layer in result.layers if layer.weight_bits < 8])
    divergence = kl_divergence(task.model, result.model, task.test_inputs, preprocess=task.preprocess)
    return error, task.score(result.model), divergence, result.size_bytes


if __name__ == "__main__":
    main()
