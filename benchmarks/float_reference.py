"""Do the float networks reach the figures they are published with?

Scores the four networks whose weights and pictures lie outside the package, and prints a table; exits with 1 if one is off by more than
0.01 points. A wrong padding, channel order or crop shows here, before it is taken for the loss of a quantizer.

    python benchmarks/float_reference.py [--data FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subbyte.tasks import TASKS, Task, default_data_root
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
        parts = imagenet_parts(data / "imagenet" / "val.csv") if "A" in published else {}
        for part, images, measured in score_parts(task, parts):
            difference = measured - published[part]
            largest = max(largest, abs(difference))
            print(f"{name:<14}{part:<6}{images:>7,}{measured:>12.4f}{published[part]:>13.2f}{difference:>+12.4f}", flush=True)
    return int(largest > TOLERANCE_POINTS)


def score_parts(task: Task, parts: dict[str, Tensor]) -> Iterator[tuple[str, int, float]]:
    """Name, number of images and top-1 in percent of each part, then of all; parts that make up the whole save scoring it again."""
    images = len(task.test_labels)
    correct = 0.0
    for part, chosen in parts.items():
        percent = replace(task, test_inputs=task.test_inputs[chosen], test_labels=task.test_labels[chosen]).score(task.model)
        correct += percent * len(chosen)
        yield part, len(chosen), percent
    yield "all", images, correct / images if parts else task.score(task.model)


def imagenet_parts(table: Path) -> dict[str, Tensor]:
    """Indices, int64, of the images of each part, in the order in which the tasks keep the test set."""
    with table.open(newline="", encoding="utf-8") as file:
        parts = [row["part"] for row in sorted(csv.DictReader(file), key=lambda row: file_order(row["file"]))]
    return {part: torch.tensor([index for index, other in enumerate(parts) if other == part]) for part in sorted(set(parts))}


if __name__ == "__main__":
    sys.exit(main())
