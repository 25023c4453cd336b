"""What the three flavours of calibration reach: top-1 and KL divergence on test images, and the relative squared error on held-out samples.

    python studies/flavours.py [--network resnet20] [--widths 4/8,4/4,3/3] [--seeds 0,1,2] [--threads 1]

First and last layer have 8 bits. Rows are printed as they are measured, means over the seeds at the end.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import subbyte
from subbyte.tasks import TASKS
from subbyte.tasks.scoring import kl_divergence


def main() -> None:
    parser = argparse.ArgumentParser(description="Top-1 of the flavours of calibration.")
    parser.add_argument("--network", choices=sorted(TASKS), default="resnet20")
    parser.add_argument("--widths", default="4/8,4/4,3/3", help="weight and activation bits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = ["| network | W/A | flavour | top-1 | KL | held out |", "|---|---|---|---|---|---|"]
    for pair in options.widths.split(","):
        bits = tuple(int(each) for each in pair.split("/"))
        for flavour in subbyte.Flavour:
            rows = [measure(options.network, bits, flavour, options.samples, seed) for seed in map(int, options.seeds.split(","))]
            top, kl, loss = (statistics.fmean(column) for column in zip(*rows, strict=True))
            lines.append(f"| {options.network} | {pair} | {flavour.value} | {top:.2f} | {kl:.4f} | {loss:.5f} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))


def measure(network: str, bits: tuple[int, ...], flavour: subbyte.Flavour, samples: int, seed: int) -> tuple[float, float, float]:
    """Top-1 in percent, KL divergence in nats, relative squared error of the outputs on held-out samples."""
    task = TASKS[network](samples=samples, seed=seed)
    widths = subbyte.Widths(*bits, pinned=dict.fromkeys(task.first_and_last, 8))
    recipe = subbyte.Recipe(flavour=flavour)
    result = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)
    divergence = kl_divergence(task.model, result.model, task.test_inputs, preprocess=task.preprocess)
    return task.score(result.model), divergence, result.loss


if __name__ == "__main__":
    main()
