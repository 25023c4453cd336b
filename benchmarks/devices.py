"""The same work on the CPU and on a GPU: time, loss, top-1, whether two runs give the same bits; and what share of the device's peak of
matrix products (float32, measured in the same run) the solver of layers reaches.

python benchmarks/devices.py --out docs/results/devices.json      # needs a CUDA device; without one, --device cpu
python benchmarks/devices.py --table docs/results/devices.json    # print the tables of an earlier run
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import subbyte
from subbyte.calibrate.problem import LayerProblem, LayerSolution
from subbyte.model.arithmetic import exact_float32
from subbyte.model.batches import call
from subbyte.tasks import TASKS, Task

NETWORKS = ("resnet20", "mobilenet_v1")
SIDE = 4096  # of the product that shows the peak
Row = dict[str, Any]


@dataclass(frozen=True)
class Watched(subbyte.Solver):
    """A solver, how long it takes on the device, and how many operations its products and factorizations are."""

    inner: subbyte.Solver
    device: str
    count: bool
    found: list[tuple[float, int]] = field(compare=False, repr=False)

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`."""
        finish(self.device)
        started = time.perf_counter()
        if self.count:
            with FlopCounterMode(display=False) as counter:
                solution = self.inner.solve(problem, generator)
            operations = counter.get_total_flops() + n_cubed(problem)
        else:
            solution, operations = self.inner.solve(problem, generator), 0
        finish(self.device)
        self.found.append((time.perf_counter() - started, operations))
        return solution


def n_cubed(problem: LayerProblem) -> int:
    """Operations of one factorization with its inverse, which the counter does not know: a lower bound, since each ridge has its own."""
    return len(problem.weight) * problem.unknowns**3


def finish(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="The same work on the CPU and on a GPU.")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--device", action="append", help="such as cpu or cuda; both, if not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="print the tables of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for network in options.network or NETWORKS:
        for device in options.device or ("cpu", "cuda"):
            task = TASKS[network](samples=256, seed=0)
            task.model.to(device)
            named = f"CPU, {options.threads} threads" if device == "cpu" else torch.cuda.get_device_name(device)
            for row in measured(task, device):
                rows.append({"network": network, "device": named} | row)
                print(rows[-1], flush=True)
                if options.out:
                    options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(tables(rows))


def measured(task: Task, device: str) -> Sequence[Row]:
    """The jobs on one device, one after the other."""
    pinned = dict.fromkeys(task.first_and_last, 8)
    jobs: dict[str, tuple[subbyte.Recipe, dict[str, Any]]] = {
        "layers W4A4": (subbyte.Recipe(), {"widths": subbyte.Widths(4, 4, pinned=pinned)}),
        "whole network W4A4": (
            subbyte.Recipe(refinements=(subbyte.Networkwise(iterations=100),)),
            {"widths": subbyte.Widths(4, 4, pinned=pinned)},
        ),
        "advanced, 1/8": (subbyte.advanced(), {"budget": subbyte.Budget(average_bits=4)}),
    }
    forward = min(seconds_of(lambda: run_all(task), device) for _ in range(3))
    rows = []
    for name, (recipe, goal) in jobs.items():

        def quantized(recipe: subbyte.Recipe = recipe, goal: dict[str, Any] = goal) -> subbyte.Result:
            return subbyte.quantize(task.model, task.calibration, recipe=recipe, **goal)

        results = [quantized() for _ in range(2 if name == "layers W4A4" else 1)]
        row: Row = {"job": name, "forward_seconds": round(forward, 3), "seconds": round(results[-1].seconds, 2), "loss": results[0].loss}
        row["top1"] = round(task.score(results[0].model), 2)
        if len(results) == 2:
            row["same_bits"] = same(results[0].model, results[1].model)
            row |= share_of_peak(device, lambda watched: quantized(replace(recipe, solver=watched)), recipe)  # noqa: B023 - called here
        rows.append(row)
    return rows


def share_of_peak(device: str, quantized: Callable[[Watched], object], recipe: subbyte.Recipe) -> Row:
    """Rate of the solver's products beside that of one large product."""
    timed, counted = (Watched(recipe.solver, device, count, []) for count in (False, True))
    for watched in (timed, counted):
        quantized(watched)
    seconds, operations = sum(one for one, _ in timed.found), sum(one for _, one in counted.found)
    with exact_float32():
        a = torch.randn(SIDE, SIDE, device=device)
        peak = 2 * SIDE**3 / min(seconds_of(lambda: a @ a, device) for _ in range(5))
    rate = operations / seconds
    return {"solver_seconds": round(seconds, 3), "operations": operations, "peak": peak, "share": round(rate / peak, 4)}


def seconds_of(work: Callable[[], object], device: str) -> float:
    finish(device)
    started = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - started


@torch.no_grad()
def run_all(task: Task) -> None:
    for batch in task.calibration.split(32):
        call(task.model, batch)


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models are equal in every bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the jobs, then the solver's share of the peak."""
    lines = ["| network | job | device | seconds | x forward | loss | top-1 | same bits twice |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        same_bits = {True: "yes", False: "no", None: ""}[row.get("same_bits")]
        spent = f"{row['seconds']:.1f} | {row['seconds'] / row['forward_seconds']:.0f}"
        lines.append(
            f"| {row['network']} | {row['job']} | {row['device']} | {spent} | {row['loss']:.4f} | {row['top1']:.2f} | {same_bits} |"
        )
    lines += ["", "| network | device | solver, s | Gflop | Gflop/s | of one large product | share |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "share" in row:
            rate = row["operations"] / row["solver_seconds"] / 1e9
            counted = f"{row['solver_seconds']:.2f} | {row['operations'] / 1e9:.1f} | {rate:.0f} | {row['peak'] / 1e9:.0f}"
            lines.append(f"| {row['network']} | {row['device']} | {counted} | {100 * row['share']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
