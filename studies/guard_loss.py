"""By which loss should the whole model be judged on a few dozen held-out samples? By the one that agrees with the test images.

Quantizes ResNet-20 at 4 bits, and measures the calibrated and the plainly rounded model by squared error and by KL divergence, on the 32
held-out calibration samples (taken from the training set) and on 2,000 test images.

    python studies/guard_loss.py [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse

import torch

import subbyte
from subbyte.calibrate.loss import measure
from subbyte.calibrate.rows import held_out_samples
from subbyte.tasks import TASKS

LOSSES = {"KL": subbyte.KLDivergence(), "squared": subbyte.RelativeSquaredError()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses on held-out calibration samples beside losses on test images.")
    parser.add_argument("--seeds", default="0,1,2")
    print(f"{'seed':>4} {'model':<11} {'KL held out':>12} {'KL test':>9} {'squared held out':>17} {'squared test':>13}")
    for seed in map(int, parser.parse_args().seeds.split(",")):
        task = TASKS["resnet20"](seed=seed)
        widths = subbyte.Widths(4, 4, pinned=dict.fromkeys(task.first_and_last, 8))
        (mask,) = held_out_samples([len(task.calibration)], subbyte.RowSampling().held_out, seed)
        assert task.preprocess is not None
        samples = {"held out": task.calibration[mask], "test": task.preprocess(task.test_inputs[::5])}
        for name, recipe in {"calibrated": subbyte.Recipe(), "rounded": subbyte.rounding()}.items():
            model = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed).model
            found = {}
            with torch.no_grad():
                for where, x in samples.items():
                    for loss_name, loss in LOSSES.items():
                        found[loss_name, where] = measure(model, [x], [task.model(x)], loss)
            row = f"{found['KL', 'held out']:>12.4f} {found['KL', 'test']:>9.4f} {found['squared', 'held out']:>17.4f}"
            print(f"{seed:>4} {name:<11} {row} {found['squared', 'test']:>13.4f}", flush=True)


if __name__ == "__main__":
    main()
