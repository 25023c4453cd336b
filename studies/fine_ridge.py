"""How strongly should the weights of least squares be pulled to the trained ones where their codes are fine?

Quantizes a network at one width with one candidate for `fine_ridges` at a time (0: none), and prints top-1 and the KL divergence from the
float model on the test images, beside the mean over layers of the held-out error that `Lattice` minimises.

    python studies/fine_ridge.py --network mobilenet_v1 --widths 8/8 [--ridges 0,3,30] [--seeds 0]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

import subbyte
from subbyte.calibrate.loss import measure
from subbyte.tasks import TASKS, Task


def main() -> None:
    parser = argparse.ArgumentParser(description="The network's error beside that of its layers, by the ridge of fine weights.")
    parser.add_argument("--network", choices=sorted(TASKS), default="resnet20")
    parser.add_argument("--widths", default="8/8", help="W/A")
    parser.add_argument("--ridges", default="0,3,30")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    weight_bits, activation_bits = map(int, options.widths.split("/"))
    torch.set_num_threads(2)
    print(f"{'seed':>4} {'ridge':>6} {'top-1':>7} {'KL':>9} {'layers':>9}")
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](seed=seed)
        pinned = dict.fromkeys(task.first_and_last, 8) if min(weight_bits, activation_bits) < 8 else {}
        widths = subbyte.Widths(weight_bits, activation_bits, pinned=pinned)
        for ridge in map(float, options.ridges.split(",")):
            recipe = subbyte.Recipe(solver=subbyte.Lattice(fine_ridges=(ridge,) if ridge else ()))
            result = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)
            layers = statistics.fmean(layer.error for layer in result.layers)
            print(
                f"{seed:>4} {ridge:>6} {task.score(result.model):>7.2f} {divergence(task, result.model):>9.5f} {layers:>9.5f}", flush=True
            )


def divergence(task: Task, model: nn.Module) -> float:
    """Mean KL divergence from the float model over the test images."""
    total = 0.0
    with torch.no_grad():
        for batch in task.test_inputs.split(task.batch_size):
            x = batch if task.preprocess is None else task.preprocess(batch)
            total += measure(model, [x], [task.model(x)], subbyte.KLDivergence()) * len(x)
    return total / len(task.test_inputs)


if __name__ == "__main__":
    main()
