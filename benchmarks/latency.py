"""Predicted latency, the sum of layers measured alone, beside measured latency of the whole file, at three allocations.

    python benchmarks/latency.py --network resnet20 --threads 1

For each network: float32; 8-bit weights and inputs; weights of 2 to 8 bits in turn. One sample at a time, ONNX Runtime; milliseconds,
the shortest of repeated runs. Prints one JSON object a network, and a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import subbyte
from subbyte.tasks import TASKS

NETWORKS = ("resnet20", "squeezenet", "mobilenet_v1")
HEADS = ("network", "threads", "profile s", "float predicted", "measured", "W8A8 predicted", "measured", "mixed predicted", "measured")


def measure(network: str, threads: int, samples: int) -> dict[str, Any]:
    """All figures of one network."""
    task = TASKS[network](samples=samples)
    started = time.perf_counter()
    timing, choices = subbyte.Timing(threads=threads), subbyte.Choices(activation_bits=(8,))
    profile = subbyte.profile(task.model, task.calibration, timing, choices=choices)
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {"network": network, "threads": threads, "profile_seconds": seconds}
    row["float"] = [1000 * sum(one.least for one in profile.floats.values())]
    names = list(profile.times)
    allocations = {"8": dict.fromkeys(names, (8, 8)), "mixed": {name: (2 + index % 7, 8) for index, name in enumerate(names)}}
    for kind, options in allocations.items():
        widths = subbyte.Widths(8, 8, pinned=options)
        result = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=subbyte.rounding())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verification = result.export_onnx(Path(folder) / "m.onnx", threads=threads).verification
        row[kind] = [1000 * profile.total(options), verification.least_milliseconds]
    row["float"].append(verification.least_float_milliseconds)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for row in rows:
        pairs = [f"{number:.3f}" for kind in ("float", "8", "mixed") for number in row[kind]]
        lines.append("| " + " | ".join([row["network"], str(row["threads"]), f"{row['profile_seconds']:.0f}", *pairs]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for network in given.network:
        rows.append(measure(network, given.threads, given.samples))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
