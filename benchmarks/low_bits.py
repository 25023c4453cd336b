"""What refinements add to layers alone, at low widths: top-1 of the real networks, first and last layer at 8 bits.

python benchmarks/low_bits.py --out docs/results/low_bits.json           # all rows: hours; go on with the same command
python benchmarks/low_bits.py --network resnet20 --widths 3,3 --seeds 0  # a part
python benchmarks/low_bits.py --table docs/results/low_bits.json         # print the table of an earlier run
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import subbyte
from subbyte.tasks import TASKS, Task

THREADS = 2


def flipped(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, mirrored: what a user knows of pictures, and no label."""
    return torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)


RECIPES: dict[str, subbyte.Recipe] = {
    "rounding": subbyte.rounding(),
    "step search": replace(subbyte.rounding(), refinements=(subbyte.StepSearch(),)),
    "layers": subbyte.Recipe(),
    "blocks": subbyte.Recipe(refinements=(subbyte.Blockwise(),)),
    "network": subbyte.Recipe(refinements=(subbyte.Networkwise(),)),
    "longer": subbyte.Recipe(refinements=(subbyte.Networkwise(iterations=1000),)),
    "flipped": subbyte.Recipe(refinements=(subbyte.Networkwise(iterations=1000, augment=flipped),)),
    "batch norms": subbyte.Recipe(refinements=(subbyte.BatchNormTuning(),)),
    "batch norms, network": subbyte.Recipe(refinements=(subbyte.BatchNormTuning(), subbyte.Networkwise())),
    "advanced": subbyte.advanced(),
    "hybrid": subbyte.thorough(),
    "hybrid, flipped": replace(subbyte.thorough(), refinements=(subbyte.Networkwise(iterations=1000, augment=flipped),)),
}
ROWS: list[tuple[str, int, int, int, int]] = [  # network, weight bits, activation bits, samples, seeds
    ("resnet20", 4, 4, 256, 3),
    ("resnet20", 3, 3, 256, 3),
    ("resnet20", 2, 4, 256, 3),
    ("resnet20", 2, 2, 256, 3),
    ("resnet20", 4, 4, 1024, 1),
    ("resnet20", 3, 3, 1024, 1),
    ("resnet20", 2, 4, 1024, 1),
    ("resnet20", 2, 2, 1024, 1),
    ("resnet56", 4, 4, 256, 3),
    ("resnet56", 4, 4, 1024, 1),
    ("mobilenet_v1", 4, 8, 256, 3),
    ("mobilenet_v1", 4, 4, 256, 3),
    ("mobilenet_v1", 4, 8, 512, 1),
    ("mobilenet_v1", 4, 4, 512, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize the real networks at low widths, with and without refinements.")
    parser.add_argument("--network", choices=sorted({row[0] for row in ROWS}), action="append")
    parser.add_argument("--widths", help="W,A: only these")
    parser.add_argument("--seeds", help="only these, such as 0,1")
    parser.add_argument("--recipe", choices=sorted(RECIPES), action="append")
    parser.add_argument("--samples", type=int, help="only rows with so many samples")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added as they are measured, and those it has are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    subbyte.keep_freed_memory()
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    for network, weight_bits, activation_bits, samples, seeds in ROWS:
        chosen = options.widths in (None, f"{weight_bits},{activation_bits}") and options.samples in (None, samples)
        if network not in (options.network or [network]) or not chosen:
            continue
        for seed in range(seeds) if options.seeds is None else map(int, options.seeds.split(",")):
            for name in options.recipe or RECIPES:
                key = (network, weight_bits, activation_bits, samples, seed, name)
                add_row(rows, key, functools.partial(measure, recipe=RECIPES[name], device=options.device), options)
    print(table(rows))


Key = tuple[str, int, int, int, int, str]
KEY = ("network", "weight_bits", "activation_bits", "samples", "seed", "recipe")


def add_row(rows: list[dict[str, object]], key: Key, measured: Callable[[Key], dict[str, object]], options: argparse.Namespace) -> None:
    """Measure a row, print it and write the file, unless it is there already.

    Args:
        rows: so far.
        key: values of `KEY`.
        measured: the rest of the row.
        options: with `out`, the file or None, and `threads`.
    """
    if any(tuple(row[part] for part in KEY) == key and row["zero_points"] for row in rows):
        return
    rows.append(dict(zip(KEY, key, strict=True)) | {"zero_points": True} | measured(key))
    print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=1) + "\n")


def quantized(key: Key, recipe: subbyte.Recipe, device: str) -> tuple[Task, subbyte.Result]:
    """A network at the widths of a row, first and last layer at 8 bits."""
    network, weight_bits, activation_bits, samples, seed, _ = key
    task = TASKS[network](samples=samples, seed=seed)
    task.model.to(device)
    widths = subbyte.Widths(weight_bits, activation_bits, pinned=dict.fromkeys(task.first_and_last, 8))
    return task, subbyte.quantize(task.model, task.calibration, widths=widths, recipe=recipe, seed=seed)


def measure(key: Key, recipe: subbyte.Recipe, device: str) -> dict[str, object]:
    """Quantize one network once."""
    task, result = quantized(key, recipe, device)
    return {
        "top1": round(task.score(result.model), 4),
        "loss": result.loss,
        "kept": all(report.kept for report in result.refinements),
        "seconds": round(result.seconds, 1),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: one line for each network, width and number of samples, with and without zero-points of weights, which rows from before
    have not; mean top-1 over the seeds, and its range, for each recipe run."""
    measured = [name for name in RECIPES if any(row["recipe"] == name for row in rows)]
    lines = [
        f"| network | W/A | samples | zero-points | seeds | {' | '.join(measured)} |",
        "|---|---|---|---|---|" + "---|" * len(measured),
    ]
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[part] for part in (*KEY[:4], "zero_points")), []).append(row)
    for (network, weight_bits, activation_bits, samples, zero_points), group in groups.items():
        cells = []
        for name in measured:
            top1 = [float(row["top1"]) for row in group if row["recipe"] == name]  # type: ignore[arg-type]
            spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
            cells.append(f"{statistics.fmean(top1):.2f}{spread}" if top1 else "")
        seeds = len({row["seed"] for row in group})
        start = f"| {network} | {weight_bits}/{activation_bits} | {samples} | {'yes' if zero_points else 'no'} | {seeds}"
        lines.append(f"{start} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
