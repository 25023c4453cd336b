"""Which loss should sensitivities measure, where a classifier's widths are chosen within a size? That which gives the best test figures.

Solves every layer once at every width, and then for each loss the programme for an average width, the layers anew at the widths chosen, and
the test images. Outputs count with their mean over the classes, which softmax does not see, in *squared*, and without it in *centred*.

    python studies/sensitivity_loss.py squeezenet --bits 4 --seeds 0,1,2 --threads 1
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import subbyte
from subbyte.calibrate.loss import OutputLoss
from subbyte.model.batches import floating_tensors
from subbyte.tasks import TASKS

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from recipes import TestImages  # noqa: E402 - it lies beside the benchmarks


@dataclass(frozen=True)
class Centred(subbyte.RelativeSquaredError):
    """Squared error of logits less their mean over the classes."""

    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputLoss`."""
        return super().total(*(z - z.mean(dim=-1, keepdim=True) for z in (reference, output)))

    def probe(self, output: object, generator: torch.Generator) -> Tensor:
        """See `OutputLoss`."""
        return super().probe([z - z.mean(dim=-1, keepdim=True) for z in floating_tensors(output)], generator)


LOSSES: dict[str, OutputLoss] = {
    "squared": subbyte.RelativeSquaredError(),
    "centred": Centred(),
    **{f"KL, temperature {t:g}": subbyte.KLDivergence(t) for t in (1.0, 2.0, 4.0, 8.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses for sensitivities, by what the widths chosen with them reach on test images.")
    parser.add_argument("network", choices=sorted(TASKS))
    parser.add_argument("--bits", default="4", help="of a weight, on average, separated by commas")
    parser.add_argument("--loss", choices=sorted(LOSSES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--draws", type=int, default=2, help="of Fisher, a sample")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in map(int, options.seeds.split(",")):
        task = TASKS[options.network](samples=options.samples, seed=seed)
        images, bank = TestImages(task), subbyte.Bank()
        for bits in map(float, options.bits.split(",")):
            for name in options.loss or LOSSES:
                recipe = subbyte.Recipe(sensitivity=subbyte.Fisher(options.draws))
                budget = subbyte.Budget(average_bits=bits, loss=LOSSES[name])
                result = subbyte.quantize(task.model, task.calibration, budget=budget, recipe=recipe, seed=seed, bank=bank)
                scores = images.scores(result.model)
                told = f"top-1 {scores['top1']:.2f}, agreement {scores['agreement']:.2f}, KL {scores['kl']:.4f}"
                print(f"{options.network} {bits:g} bits, seed {seed}, {name}: {told}, held out {result.loss:.5f}", flush=True)


if __name__ == "__main__":
    main()
