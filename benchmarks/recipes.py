"""What each step of each recipe brings: accuracy, agreement and KL divergence on test images after every step, at two sizes.

A recipe chooses the widths (4 or 3 bits a weight on average: 1/8 or 3/32 of float32), solves the layers, and refines the whole step by
step; each step is kept only if the loss on held-out calibration samples falls. Here the model is scored on the test images as each step has
left it, which nothing else sees. "rounding" is plain rounding at the very widths that the recipe chose.

    python benchmarks/recipes.py --out docs/results/recipes.json                                       # every row: many hours on two cores
    python benchmarks/recipes.py --network resnet20 --bits 4 --recipe light --seeds 0                  # a part
    python benchmarks/recipes.py --table docs/results/recipes.json                                     # print the tables of an earlier run
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import subbyte
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import Models
from subbyte.calibrate.whole import Judge
from subbyte.model.batches import call
from subbyte.run.events import Observer
from subbyte.tasks import TASKS, Task

NETWORKS = ("resnet20", "resnet56", "mobilenet_v1", "squeezenet")
AVERAGE_BITS = (4.0, 3.0)
RECIPES = {"light": subbyte.light(), "advanced": subbyte.advanced(), "default": subbyte.default(), "relaxed": subbyte.relaxed()}
KL = subbyte.KLDivergence(temperature=2.0)
BY_KL = {f"{name}, KL": RECIPES[name] for name in ("default", "advanced")}  # widths by KL divergence, as for a classifier they may be
Row = dict[str, Any]


class TestImages:
    """The test images of a task, and what the float model returns for them."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._reference = self._logits(task.model)

    def scores(self, model: nn.Module) -> Row:
        """Top-1 and agreement in percent, KL divergence in nats."""
        logits, labels = self._logits(model), self._task.test_labels
        p, q = self._reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        same = self._reference.argmax(-1) == logits.argmax(-1)
        return {
            "top1": round(100 * (logits.argmax(-1) == labels).double().mean().item(), 3),
            "agreement": round(100 * same.double().mean().item(), 3),
            "kl": round((p.exp() * (p - q)).sum(-1).mean().item(), 5),
        }

    def float_top1(self) -> float:
        """Of the float model."""
        return round(100 * (self._reference.argmax(-1) == self._task.test_labels).double().mean().item(), 3)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        task = self._task
        batches = task.test_inputs.split(task.batch_size)
        return torch.cat([call(model, batch if task.preprocess is None else task.preprocess(batch)).cpu() for batch in batches])


@dataclass(frozen=True)
class Watched(subbyte.Refinement):
    """A refinement, in front of which the test images look at the model as the steps before have left it."""

    inner: subbyte.Refinement | None
    images: TestImages = field(compare=False)
    seen: list[Row] = field(compare=False)

    @property
    def name(self) -> str:
        """Of the refinement."""
        return "nothing" if self.inner is None else self.inner.name

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`."""
        started = time.perf_counter()
        self.seen.append(self.images.scores(models.quantized) | {"watching": time.perf_counter() - started})
        return () if self.inner is None else self.inner.refine_(models, data, judge, observer)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each step of each recipe brings.")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--bits", type=float, action="append", help="of a weight, on average (may be repeated)")
    parser.add_argument("--recipe", choices=sorted({*RECIPES, *BY_KL}), action="append", help="only this one (may be repeated)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added as they are measured, and those it has are not measured again")
    parser.add_argument("--table", type=Path, help="print the tables of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    kept = subbyte.keep_freed_memory()
    rows: list[Row] = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    known = {(row["network"], row["budget_bits"], label(row), row["seed"]) for row in rows}
    for network in options.network or NETWORKS:
        for seed in map(int, options.seeds.split(",")):
            wanted = [(bits, name) for bits in options.bits or AVERAGE_BITS for name in options.recipe or (*RECIPES, *BY_KL)]
            wanted = [(bits, name) for bits, name in wanted if (network, bits, name, seed) not in known]
            if not wanted:
                continue
            task = TASKS[network](samples=options.samples, seed=seed)
            task.model.to(options.device)
            images, forward_seconds = TestImages(task), forward(task)
            bank = subbyte.Bank()  # one recipe's layers are there for the next one
            solved: set[object] = set()
            for bits, name in wanted:
                recipe, loss = (RECIPES | BY_KL)[name], KL if name in BY_KL else None
                row: Row = {
                    "network": network,
                    "budget_bits": bits,
                    "recipe": name,
                    "seed": seed,
                    "samples": options.samples,
                    "zero_points": True,
                }
                try:
                    row |= measure(task, images, subbyte.Budget(average_bits=bits, loss=loss), recipe, seed, bank)
                except subbyte.InfeasibleError as error:  # few widths cannot make every average
                    print(f"{network}, {name}: {error}", flush=True)
                    continue
                row |= {
                    "freed_memory_kept": kept,
                    "forward_seconds": round(forward_seconds, 3),
                    "alone": recipe.method not in solved,
                    "threads": options.threads,
                    "cores": os.cpu_count(),
                    "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device),
                }
                solved.add(recipe.method)
                rows.append(row)
                print(steps_table(rows[-1:]), flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measure(task: Task, images: TestImages, budget: subbyte.Budget, recipe: subbyte.Recipe, seed: int, bank: subbyte.Bank) -> Row:
    """One recipe within one budget: the float model, plain rounding at the chosen widths, and every step."""
    seen: list[Row] = []
    watched = tuple(Watched(refinement, images, seen) for refinement in (*recipe.refinements, None))
    recipe = replace(recipe, refinements=watched)
    result = subbyte.quantize(task.model, task.calibration, budget=budget, recipe=recipe, seed=seed, bank=bank)
    widths = subbyte.Widths(pinned=result.allocation)
    rounded = subbyte.quantize(task.model, task.calibration, widths=widths, recipe=subbyte.rounding(), seed=seed)
    steps: list[Row] = [{"step": "layers", "loss": result.measured.loss, "kept": result.measured.rejected_loss is None}]
    for report in result.refinements[:-1]:
        left = report.loss if report.kept else report.start_loss
        steps.append({"step": report.name, "loss": left, "tried": report.loss, "kept": report.kept})
    seconds = [0.0, *(report.seconds - look["watching"] for report, look in zip(result.refinements[:-1], seen, strict=False))]
    for step, look, spent in zip(steps, seen, seconds, strict=True):
        step |= {key: look[key] for key in ("top1", "agreement", "kl")} | {"seconds": round(spent, 2)}
    return {
        "float_top1": images.float_top1(),
        "float_bytes": result.float_bytes,
        "bytes": result.size_bytes,
        "average_bits": round(average_bits(result), 3),
        "seconds": round(result.seconds - sum(look["watching"] for look in seen), 2),
        "rounding": {"loss": rounded.loss} | images.scores(rounded.model),
        "steps": steps,
    }


def average_bits(result: subbyte.Result) -> float:
    """Mean width of a weight."""
    counts = [layer.float_bytes for layer in result.layers]  # as good as the number of weights
    return sum(count * layer.weight_bits for count, layer in zip(counts, result.layers, strict=True)) / sum(counts)


def forward(task: Task) -> float:
    """Seconds of one float forward pass over the calibration samples, in the batches that calibration uses: the shorter of two."""
    passes = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            for batch in task.calibration.split(32):
                call(task.model, batch).cpu()
        passes.append(time.perf_counter() - started)
    return min(passes)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: what the recipes reach, and what each step brings."""
    return f"{recipes_table(rows)}\n\n{steps_table(rows)}"


def label(row: Row) -> str:
    """The recipe of a row; of rows from before weights had zero-points, with that added."""
    name: str = row["recipe"]
    return name if row["zero_points"] else f"{name}, symmetric"


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Rows of the same network, budget and recipe."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["budget_bits"], label(row)), []).append(row)
    return groups


def recipes_table(rows: Sequence[Row]) -> str:
    """One line for each network, budget and recipe; means over seeds, times of runs that found no layer solved by an earlier one."""
    lines = ["| network | budget | recipe | seeds | float | top-1 (range) | rounding | bits | bytes | seconds | x forward |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for (network, bits, recipe), group in grouped(rows).items():
        top1 = [row["steps"][-1]["top1"] for row in group]
        mean = {key: statistics.fmean(row[key] for row in group) for key in ("float_top1", "average_bits", "bytes")}
        rounding = statistics.fmean(row["rounding"]["top1"] for row in group)
        alone = [row for row in group if row["alone"]]
        ratio = f"{statistics.median(row['seconds'] / row['forward_seconds'] for row in alone):.0f}" if alone else ""
        seconds = f"{statistics.fmean(row['seconds'] for row in alone):.0f}" if alone else ""
        reached = f"{mean['float_top1']:.2f} | **{statistics.fmean(top1):.2f}** ({min(top1):.2f} to {max(top1):.2f}) | {rounding:.2f}"
        spent = f"{mean['average_bits']:.2f} | {mean['bytes']:,.0f} | {seconds} | {ratio}"
        lines.append(f"| {network} | {bits:g} | {recipe} | {len(group)} | {reached} | {spent} |")
    return "\n".join(lines)


def steps_table(rows: Sequence[Row]) -> str:
    """One line for each step of each recipe; means over seeds."""
    lines = [
        "| network | budget | recipe | step | kept | loss | top-1 | agreement | KL | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (network, bits, recipe), group in grouped(rows).items():
        head = f"| {network} | {bits:g} | {recipe}"
        plain = {key: statistics.fmean(row["rounding"][key] for row in group) for key in ("loss", "top1", "agreement", "kl")}
        lines.append(f"{head} | rounding | | {plain['loss']:.4f} | {plain['top1']:.2f} | {plain['agreement']:.2f} | {plain['kl']:.4f} | |")
        for index, step in enumerate(group[0]["steps"]):
            same = [row["steps"][index] for row in group]
            mean = {key: statistics.fmean(one[key] for one in same) for key in ("loss", "top1", "agreement", "kl", "seconds")}
            kept = f"{sum(one['kept'] for one in same)} of {len(same)}"
            numbers = f"{mean['loss']:.4f} | {mean['top1']:.2f} | {mean['agreement']:.2f} | {mean['kl']:.4f} | {mean['seconds']:.1f}"
            lines.append(f"{head} | {step['step']} | {kept} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
