"""What it costs to give freed memory back to the system: one float forward pass of MobileNetV1 over 256 images, before and after.

python benchmarks/freed_memory.py --threads 2
"""

from __future__ import annotations

import argparse
import time

import torch

import subbyte
from subbyte.model.batches import call
from subbyte.tasks import TASKS, Task


def main() -> None:
    parser = argparse.ArgumentParser(description="A forward pass before and after subbyte.keep_freed_memory().")
    parser.add_argument("--network", choices=sorted(TASKS), default="mobilenet_v1")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.network](samples=256, seed=0)
    before = min(forward(task) for _ in range(options.passes))
    kept = subbyte.keep_freed_memory()
    after = min(forward(task) for _ in range(options.passes))
    print(f"shortest of {options.passes} passes: as it is {before:.2f} s, kept ({kept}) {after:.2f} s, {before / after:.2f} times as fast")


def forward(task: Task) -> float:
    """Seconds of one pass over the calibration samples."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in task.calibration.split(32):
            call(task.model, batch)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
