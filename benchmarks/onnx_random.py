"""Many random small networks: exported, run in ONNX Runtime with optimizations on and off, and compared with their simulations.

    python benchmarks/onnx_random.py --count 500

Prints how many outputs differ by more than one output step (a 255th of what the output spans), and the largest difference. Without
optimizations layers run in float32, whose sums may round a number on the border between two codes to the other one. Networks are exported
fifty at a time, as one model with an input and an output for each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import subbyte

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "export"))
from random_graphs import quantized_nets  # noqa: E402 - it lies beside the tests

TOGETHER = 50


def differences(seed: int, count: int) -> dict[bool, list[float]]:
    """Largest difference of each network, in output steps, by whether ONNX Runtime optimizes."""
    result, samples = quantized_nets(seed, count)
    runtime = subbyte.OnnxRuntimeCPU()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "m.onnx"
        exported = result.export_onnx(path, runtime, threads=1)
        content = path.read_bytes()
    with torch.no_grad():
        expected = [output.numpy() for output in exported.simulation(*samples)]
    worst = {}
    for optimized in (True, False):
        found = runtime.open(content, optimized=optimized, threads=1)([x.numpy() for x in samples])
        worst[optimized] = [
            float(255 * np.abs(a - b).max() / (float(b.max() - b.min()) or 1.0)) for a, b in zip(found, expected, strict=True)
        ]
    return worst


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {True: [], False: []}
    while len(found[True]) < given.count:
        count = len(found[True])
        for optimized, steps in differences(1000 * (count // TOGETHER), min(TOGETHER, given.count - count)).items():
            found[optimized] += steps
            above, largest = sum(step > 1.001 for step in found[optimized]), max(found[optimized])
            told = f"{above} differ by more than one output step; largest difference {largest:.3f} steps"
            print(f"{len(found[optimized])} networks, {'optimized' if optimized else 'not optimized'}: {told}", flush=True)


if __name__ == "__main__":
    main()
