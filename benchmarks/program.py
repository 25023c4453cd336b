"""What a program takes in a packed file, and in time, and whether the numbers are the model's.

    python benchmarks/program.py

Real networks, plainly rounded. Prints for each: bytes of the packed file, bytes of its program, whether the outputs of the file loaded
without the model's class are bit-identical, seconds to save, to load, and of both forwards (8 samples).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import subbyte
from subbyte.tasks import TASKS

NETWORKS = ("resnet20", "mobilenet_v1", "squeezenet")


def timed(function: Any, *args: Any) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took."""
    started = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started


def measure(network: str) -> str:
    """A line of figures."""
    task = TASKS[network](samples=32)
    result = subbyte.quantize(task.model, task.calibration, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    samples = task.test_inputs[:8] if task.preprocess is None else task.preprocess(task.test_inputs[:8])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model"
        size, save = timed(lambda: result.save(path, program=True))
        loaded, load = timed(subbyte.load, path)
        expected, plain = timed(result.model, samples)
        found, interpreted = timed(loaded, samples)
    program = f"{result.size_bytes:,} bytes, program {size - result.size_bytes:,}, identical: {torch.equal(expected, found)}"
    return f"{network}: {program}, save {save:.1f} s, load {load:.2f} s, forward {plain:.3f} s, of the program {interpreted:.3f} s"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=NETWORKS)
    torch.set_num_threads(1)
    for network in parser.parse_args().network:
        print(measure(network), flush=True)


if __name__ == "__main__":
    main()
