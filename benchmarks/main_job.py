"""The main job on the real networks: accuracy, bytes, time and memory at fixed widths, beside plain rounding.

Every row is a fresh process: it loads the network, times float forwards over the calibration samples, quantizes, notes the peak memory, and
only then scores the result and its plainly rounded counterpart on the test images. First and last layer have 8 bits where others have less.

    python benchmarks/main_job.py --out docs/results/main_job.json                  # all rows, three seeds: about 25 minutes on two cores
    python benchmarks/main_job.py --network resnet20 --widths 4,4 --seeds 0         # one row
    python benchmarks/main_job.py --table docs/results/main_job.json                # print the table of an earlier run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import subbyte
from subbyte.tasks import TASKS, Task

THREADS = 2
ROWS: dict[str, list[tuple[int, int]]] = {
    "resnet20": [(8, 8), (4, 8), (4, 4), (3, 3)],
    "resnet56": [(4, 4)],
    "mobilenet_v1": [(8, 8), (4, 8), (4, 4)],
    "squeezenet": [(8, 8), (4, 8), (4, 4)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize the real networks at fixed widths.")
    parser.add_argument("--network", choices=sorted(ROWS), action="append", help="only this one (may be repeated)")
    parser.add_argument("--widths", help="W,A: only these")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added as they are measured, and those it has are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of such a file and stop")
    parser.add_argument("--one", nargs=6, metavar=("NETWORK", "W", "A", "SEED", "SAMPLES", "FLOAT_TOP1"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        network, *numbers, float_top1 = options.one
        print(json.dumps(measure(network, *map(int, numbers)) | {"float_top1": float(float_top1)}))
        return
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    known = {(row["network"], row["weight_bits"], row["activation_bits"], row["seed"], row["samples"]) for row in rows}
    for network in options.network or ROWS:
        task = TASKS[network](samples=1)
        float_top1 = round(task.score(task.model), 4)
        widths = [tuple(map(int, options.widths.split(",")))] if options.widths else ROWS[network]
        for weight_bits, activation_bits in widths:
            for seed in map(int, options.seeds.split(",")):
                if (network, weight_bits, activation_bits, seed, options.samples) in known:
                    continue
                rows.append(in_own_process(network, weight_bits, activation_bits, seed, options.samples, float_top1))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


def in_own_process(network: str, *numbers: float) -> dict[str, float]:
    """One row, measured in a process of its own so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", network, *map(str, numbers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(network: str, weight_bits: int, activation_bits: int, seed: int, samples: int) -> dict[str, object]:
    """Quantize one network at one width with one seed."""
    torch.set_num_threads(THREADS)
    task: Task = TASKS[network](samples=samples, seed=seed)
    pinned = dict.fromkeys(task.first_and_last, 8) if min(weight_bits, activation_bits) < 8 else {}
    widths = subbyte.Widths(weight_bits, activation_bits, pinned=pinned)
    forward_seconds = min(forward(task) for _ in range(2))
    result = subbyte.quantize(task.model, task.calibration, widths=widths, seed=seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rounded = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=subbyte.rounding(), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        size = result.save(Path(folder) / "packed.safetensors")
    return {
        "network": network,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "seed": seed,
        "samples": samples,
        "top1": round(task.score(result.model), 4),
        "rounding_top1": round(task.score(rounded.model), 4),
        "float_bytes": result.float_bytes,
        "bytes": size,
        "seconds": round(result.seconds, 2),
        "forward_seconds": round(forward_seconds, 3),
        "peak_bytes": peak,
    }


def forward(task: Task) -> float:
    """Seconds of one float forward pass over the calibration samples, in the batches that calibration uses."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in task.calibration.split(32):
            task.model(batch)
    return time.perf_counter() - started


def table(rows: Sequence[dict[str, float]]) -> str:
    """Markdown: one line for each network and width, mean and range over seeds."""
    lines = [
        "| network | W/A | seeds | float | subbyte (range) | rounding | bytes | float bytes | seconds | x forward | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[object, ...], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["weight_bits"], row["activation_bits"], row["samples"]), []).append(row)
    for (network, weight_bits, activation_bits, _), group in groups.items():
        top1 = [row["top1"] for row in group]
        mean = {key: statistics.fmean(row[key] for row in group) for key in ("float_top1", "top1", "rounding_top1", "seconds", "bytes")}
        ratio = statistics.median(row["seconds"] / row["forward_seconds"] for row in group)
        peak = max(row["peak_bytes"] for row in group) / 1e9
        accuracy = f"{mean['float_top1']:.2f} | **{mean['top1']:.2f}** ({min(top1):.2f} to {max(top1):.2f}) | {mean['rounding_top1']:.2f}"
        size = f"{mean['bytes']:,.0f} | {group[0]['float_bytes']:,}"
        head = f"| {network} | {weight_bits}/{activation_bits} | {len(group)} | {accuracy} | {size}"
        lines.append(f"{head} | {mean['seconds']:.1f} | {ratio:.1f} | {peak:.2f} |")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
