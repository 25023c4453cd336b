"""Do the float networks reach the figures they are published with?

Scores the four networks whose weights and pictures lie outside the package, and prints a table; exits with 1 if one is off by more than
0.01 points. A wrong padding, channel order or crop shows here, before it is taken for the loss of a quantizer.

    python benchmarks/float_reference.py [--data FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subbyte.tasks import TASKS, default_data_root
from subbyte.tasks.images import file_order

PUBLISHED = {  # percent of top-1, by network and part of the test set, from the README of the data
    "resnet20": {"all": 91.73},
    "resnet56": {"all": 93.39},
    "mobilenet_v1": {"A": 78.08, "B": 61.66, "all": 71.03},
    "squeezenet": {"A": 72.62, "B": 54.19, "all": 64.71},
}
TOLERANCE_POINTS = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the float networks with their published top-1.")
    parser.add_argument("--data", type=Path, default=default_data_root(), help="folder with cifar10/ and imagenet/")
    data = parser.parse_args().data
    if data is None:
        parser.error("no data found; name its folder with --data")
    print(f"{'network':<14}{'part':<6}{'images':>7}{'measured %':>12}{'published %':>13}{'difference':>12}")
    largest = 0.0
    for name, published in PUBLISHED.items():
        task = TASKS[name](samples=1, data=data)
        for part, percent in published.items():
            chosen = part_of_test_set(data, part, len(task.test_labels))
            part_of_task = replace(task, test_inputs=task.test_inputs[chosen], test_labels=task.test_labels[chosen])
            measured = part_of_task.score(task.model)
            difference = measured - percent
            largest = max(largest, abs(difference))
            print(f"{name:<14}{part:<6}{len(chosen):>7,}{measured:>12.4f}{percent:>13.2f}{difference:>+12.4f}", flush=True)
    return int(largest > TOLERANCE_POINTS)


def part_of_test_set(data: Path, part: str, images: int) -> Tensor:
    """Indices of a part of a test set, int64; the parts of ImageNet are a column of its table, which the task sorts by file."""
    if part == "all":
        return torch.arange(images)
    with (data / "imagenet" / "val.csv").open(newline="", encoding="utf-8") as table:
        rows = sorted(csv.DictReader(table), key=lambda row: file_order(row["file"]))
    return torch.tensor([index for index, row in enumerate(rows) if row["part"] == part])


if __name__ == "__main__":
    sys.exit(main())
