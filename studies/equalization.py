"""How strongly should channels be equalized?

Quantizes a network with one strength of `Equalization` at a time (none: no equalization at all; predicted: the one of least noise), and
prints top-1 and the KL divergence from the float model on the test images, beside the mean over layers of the relative held-out error.

    python studies/equalization.py --network mobilenet_v1 --widths 4/4 [--strengths none,0,0.5,predicted] [--seeds 0]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from fine_ridge import divergence

import subbyte
from subbyte.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description="The network's error by the strength of equalization.")
    parser.add_argument("--network", choices=sorted(TASKS), default="resnet20")
    parser.add_argument("--widths", default="4/4", help="W/A, several with commas")
    parser.add_argument("--strengths", default="none,0,0.5,predicted")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'widths':>6} {'seed':>4} {'strength':>9} {'top-1':>7} {'KL':>9} {'layers':>9}")
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](seed=seed)
        for text in options.widths.split(","):
            weight_bits, activation_bits = map(int, text.split("/"))
            pinned = dict.fromkeys(task.first_and_last, 8) if min(weight_bits, activation_bits) < 8 else {}
            widths = subbyte.Widths(weight_bits, activation_bits, pinned=pinned)
            for strength in options.strengths.split(","):
                given = (
                    subbyte.Equalization()
                    if strength == "predicted"
                    else None
                    if strength == "none"
                    else subbyte.Equalization((float(strength),))
                )
                recipe = subbyte.Recipe(equalization=given)
                result = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)
                layers = statistics.fmean(layer.error for layer in result.layers)
                scores = f"{task.score(result.model):>7.2f} {divergence(task, result.model):>9.5f} {layers:>9.5f}"
                print(f"{text:>6} {seed:>4} {strength:>9} {scores}", flush=True)


if __name__ == "__main__":
    main()
