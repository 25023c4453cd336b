"""Which held-out samples should judge a refinement? Those, or mixtures of them, that agree with the test images.

Applies variants of gradient refinements to the same calibrated network, and prints the squared error of the outputs on the held-out
calibration samples, on these and mixtures of them, and on test images, with top-1 and KL divergence there.

    python studies/judging.py [--network resnet20] [--widths 3,3] [--seeds 0] [--only "longer"] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import subbyte
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.loss import measure
from subbyte.calibrate.models import Models
from subbyte.calibrate.whole import Judge
from subbyte.run.events import Observer
from subbyte.tasks import TASKS, Task
from subbyte.tasks.scoring import kl_divergence, top1


def flipped(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, mirrored."""
    return torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)


LOW = subbyte.Networkwise(weight_rate=3e-3, bias_rate=3e-3, weight_step_rate=2e-3, activation_rate=2e-3)
VARIANTS: Mapping[str, subbyte.Refinement] = {
    "network": subbyte.Networkwise(),
    "longer": subbyte.Networkwise(iterations=1000),
    "not mixed": subbyte.Networkwise(mixing=0.0),
    "low rates": LOW,
    "outputs alone": subbyte.Networkwise(layer_share=0.0),
    "layers thrice": subbyte.Networkwise(layer_share=3.0),
    "flipped": subbyte.Networkwise(augment=flipped),
    "bias": subbyte.BiasTuning(),
}


@dataclass(frozen=True)
class EveryVariant(subbyte.Refinement):
    """Applies every variant to the same model, prints what becomes of it, and leaves the model as it was."""

    task: Task = field(compare=False)
    label: str
    only: tuple[str, ...]
    test_images: int

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`."""
        held_out = Judge.of(models.original, data, subbyte.RelativeSquaredError())
        judges = (held_out, held_out.with_mixtures(models.original, subbyte.Recipe().mixtures, data.seed))
        before = [(item.quantized, item.quantized.state()) for item in models.layers]
        self.show("-", judges, models, 0.0)
        for name in self.only or VARIANTS:
            started = time.perf_counter()
            VARIANTS[name].refine_(models, data, judge, observer)
            self.show(name, judges, models, time.perf_counter() - started)
            for layer, state in before:
                layer.assign_(state)
        return ()

    def show(self, name: str, judges: tuple[Judge, ...], models: Models, seconds: float) -> None:
        """Print one line."""
        task = self.task
        every = max(1, len(task.test_inputs) // self.test_images)
        images, labels = task.test_inputs[::every], task.test_labels[::every]
        pieces = [piece if task.preprocess is None else task.preprocess(piece) for piece in images.split(task.batch_size)]
        with torch.no_grad():
            loss = measure(models.quantized, pieces, [models.original(piece) for piece in pieces], subbyte.RelativeSquaredError())
        found = [*(judge.loss_of(models.quantized) for judge in judges), loss]
        divergence = kl_divergence(task.model, models.quantized, images, preprocess=task.preprocess)
        figures = f"{divergence:>8.4f} {top1(models.quantized, images, labels, preprocess=task.preprocess):>6.2f} {seconds:>7.0f}"
        print(f"{self.label:<22} {name:<14} {' '.join(f'{one:>9.4f}' for one in found)} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out samples, mixtures of them, and test images, as judges of refinements.")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--widths", default="3,3", help="W,A")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", action="append", choices=sorted(VARIANTS))
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    titles = f"{'held out':>9} {'mixtures':>9} {'test':>9} {'KL':>8} {'top-1':>6} {'seconds':>7}"
    print(f"{'network, W,A, seed':<22} {'variant':<14} {titles}")
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](samples=options.samples, seed=seed)
        widths = subbyte.Widths(*map(int, options.widths.split(",")), pinned=dict.fromkeys(task.first_and_last, 8))
        variants = EveryVariant(task, f"{options.network} {options.widths} {seed}", tuple(options.only or ()), options.test_images)
        subbyte.quantize(task.model, task.calibration, widths=widths, recipe=subbyte.Recipe(refinements=(variants,)), seed=seed)


if __name__ == "__main__":
    main()
