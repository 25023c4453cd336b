"""How many samples does calibration need? From one up, against plain rounding with the same samples; first and last layer at 8 bits.

python benchmarks/sample_count.py --out docs/results/sample_count.json      # the rows; go on with the same command
python benchmarks/sample_count.py --table docs/results/sample_count.json    # print the table of an earlier run
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from low_bits import KEY, Key, add_row, quantized

import subbyte
from subbyte.tasks.scoring import kl_divergence

COUNTS = (1, 4, 16, 64, 256, 1024)
RECIPES = {"subbyte": subbyte.Recipe(), "rounding": subbyte.rounding()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Top-1 and KL divergence against the number of calibration samples.")
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--widths", default="4,4", help="W,A")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added as they are measured, and those it has are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    weight_bits, activation_bits = map(int, options.widths.split(","))
    for samples in map(int, options.counts.split(",")):
        for seed in map(int, options.seeds.split(",")):
            for name in RECIPES:
                add_row(rows, (options.network, weight_bits, activation_bits, samples, seed, name), measure, options)
    print(table(rows))


def measure(key: Key) -> dict[str, object]:
    """Quantize one network once."""
    task, result = quantized(key, RECIPES[key[-1]], "cpu")
    return {
        "top1": round(task.score(result.model), 4),
        "kl": kl_divergence(task.model, result.model, task.test_inputs, preprocess=task.preprocess),
        "plain": sum(layer.solver == "RoundToNearest" for layer in result.layers),
        "undetermined": sum(layer.equations < layer.unknowns for layer in result.layers),
        "seconds": round(result.seconds, 1),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: one line for each number of samples; means over the seeds, ranges of top-1."""
    lines = [
        "| network | W/A | samples | seeds | subbyte (range) | KL | rounding (range) | KL | too few samples | plainly rounded |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[part] for part in KEY[:4]), []).append(row)
    for (network, weight_bits, activation_bits, samples), group in groups.items():
        cells = []
        for name in RECIPES:
            some = [row for row in group if row["recipe"] == name]
            top1, kl = ([float(row[part]) for row in some] for part in ("top1", "kl"))  # type: ignore[arg-type]
            cells += [
                f"{statistics.fmean(top1):.2f} ({min(top1):.2f} to {max(top1):.2f})" if top1 else "",
                f"{statistics.fmean(kl):.4f}" if kl else "",
            ]
        calibrated = [row for row in group if row["recipe"] == "subbyte"]
        counts = [f"{statistics.fmean(float(row[part]) for row in calibrated):.1f}" for part in ("undetermined", "plain")]  # type: ignore[arg-type]
        seeds = len({row["seed"] for row in group})
        lines.append(f"| {network} | {weight_bits}/{activation_bits} | {samples} | {seeds} | {' | '.join([*cells, *counts])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
