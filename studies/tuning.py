"""Which reference for batch-norm tuning, which teacher for bias tuning? Every variant on the same calibrated ResNet-20, guard or no guard.

Prints the loss on the held-out calibration samples before and after (what the guard sees: it takes back what does not fall), and accuracy
and KL divergence on 2,000 test images, of the model as the variant leaves it.

    python studies/tuning.py [--network resnet20] [--bits 8,4,3] [--seeds 0] [--only "paper"]
    python studies/tuning.py --average 4,3 --only "bias"      # behind the advanced recipe's layers and batch-norm tuning, within a budget
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import subbyte
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import Models
from subbyte.calibrate.whole import Judge
from subbyte.run.events import Observer
from subbyte.tasks import TASKS, Task
from subbyte.tasks.scoring import kl_divergence, top1

TEST_IMAGES = 2000


def flipped(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, mirrored."""
    return torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)


VARIANTS: Mapping[str, subbyte.Refinement] = {
    "batch norm, paper": subbyte.BatchNormTuning.paper(),
    "batch norm": subbyte.BatchNormTuning(),
    "batch norm, all layers": subbyte.BatchNormTuning(without_batch_norm=True),
    "bias, default": subbyte.BiasTuning(),
    "bias, rate 3e-4": subbyte.BiasTuning(bias_rate=3e-4),
    "bias, rate 3e-3": subbyte.BiasTuning(bias_rate=3e-3),
    "bias, one rate": subbyte.BiasTuning(backoff=1.0),
    "bias, outputs only": subbyte.BiasTuning(layer_share=0.0),
    "bias, 4 epochs": subbyte.BiasTuning(epochs=4),
    "bias, 8 epochs": subbyte.BiasTuning(epochs=8, patience=4),
    "bias, not mixed": subbyte.BiasTuning(mixing=0.0),
    "bias, flipped, not mixed": subbyte.BiasTuning(mixing=0.0, augment=flipped),
    "bias, KL, not mixed": subbyte.BiasTuning(mixing=0.0, loss=subbyte.KLDivergence()),
    "bias, KL at 4, not mixed": subbyte.BiasTuning(mixing=0.0, loss=subbyte.KLDivergence(4.0)),
    "bias, KL": subbyte.BiasTuning(loss=subbyte.KLDivergence()),
    "bias, KL at 4": subbyte.BiasTuning(loss=subbyte.KLDivergence(4.0)),
    "bias, cosine": subbyte.BiasTuning(loss=subbyte.CosineDistance()),
    "bias and steps": subbyte.BiasTuning(step_rate=1e-3),
}
RECIPES = {"rounding": subbyte.rounding(), "parallel": subbyte.Recipe(flavour=subbyte.Flavour.PARALLEL), "sequential": subbyte.Recipe()}


@dataclass(frozen=True)
class EveryVariant(subbyte.Refinement):
    """Applies every variant to the same model, prints what becomes of it, and leaves the model as it was."""

    task: Task = field(compare=False)
    label: str
    only: str

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`."""
        judge = Judge.of(models.original, data, subbyte.RelativeSquaredError())
        before = [(item.quantized, item.quantized.state()) for item in models.layers]
        start = judge.loss_of(models.quantized)
        print(f"{self.label:<24} {'-':<26} {start:>8.4f} {'':>8} {self.scores(models.quantized)}", flush=True)
        for name, variant in VARIANTS.items():
            if self.only in name:
                (note, *_) = variant.refine_(models, data, judge, observer)
                loss = judge.loss_of(models.quantized)
                print(f"{self.label:<24} {name:<26} {start:>8.4f} {loss:>8.4f} {self.scores(models.quantized)}  {note}", flush=True)
                for layer, state in before:
                    layer.assign_(state)
        return ()

    def scores(self, model: nn.Module) -> str:
        """Top-1 in percent and KL divergence in nats, on some test images."""
        task, every = self.task, max(1, len(self.task.test_inputs) // TEST_IMAGES)
        images, labels = task.test_inputs[::every], task.test_labels[::every]
        accuracy = top1(model, images, labels, batch_size=task.batch_size, preprocess=task.preprocess)
        return f"{accuracy:>6.2f} {kl_divergence(task.model, model, images, batch_size=task.batch_size, preprocess=task.preprocess):>8.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Variants of batch-norm and bias tuning on the same calibrated network.")
    parser.add_argument("--network", choices=sorted(TASKS), default="resnet20")
    parser.add_argument("--bits", default="8,4,3", help="of weights and inputs; first and last layer have 8")
    parser.add_argument("--average", default="", help="of weights, in place of --bits: the advanced recipe chooses each layer's")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", choices=sorted(RECIPES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'network, bits, recipe':<24} {'variant':<26} {'before':>8} {'after':>8} {'top-1':>6} {'KL':>8}")
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](seed=seed)
        for average in map(float, filter(None, options.average.split(","))):
            every = EveryVariant(task, f"{options.network} {average:g} advanced {seed}", options.only)
            recipe = replace(subbyte.advanced(), refinements=(subbyte.BatchNormTuning(), every))
            subbyte.quantize(task.model, task.calibration, budget=subbyte.Budget(average_bits=average), recipe=recipe, seed=seed)
        for bits in map(int, options.bits.split(",")) if not options.average else ():
            widths = subbyte.Widths(bits, bits, pinned=dict.fromkeys(task.first_and_last, 8))
            for name in options.recipe or RECIPES:
                every = EveryVariant(task, f"{options.network} {bits} {name} {seed}", options.only)
                recipe = subbyte.Recipe(solver=RECIPES[name].solver, flavour=RECIPES[name].flavour, refinements=(every,))
                subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)


if __name__ == "__main__":
    main()
