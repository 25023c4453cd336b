"""What it costs to give freed memory back to the system: a float forward pass over 256 samples, before and after keeping it.

    python benchmarks/freed_memory.py --network mobilenet_v1 --threads 2

Run it alone: other jobs on the same cores change the ratio.
"""

from __future__ import annotations

import argparse

import torch
from recipes import forward

import subbyte
from subbyte.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description="A forward pass before and after subbyte.keep_freed_memory().")
    parser.add_argument("--network", choices=sorted(TASKS), default="mobilenet_v1")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.network](samples=256, seed=0)
    before = min(forward(task) for _ in range(3))
    kept = subbyte.keep_freed_memory()
    after = min(forward(task) for _ in range(3))
    print(f"shortest of 6 passes: as it is {before:.2f} s, kept ({kept}) {after:.2f} s, {before / after:.2f} times as fast")


if __name__ == "__main__":
    main()
