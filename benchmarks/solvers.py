"""Every solver on every layer of the real networks: the objective on held-out rows, and seconds of processor time.

All solvers get the same problems: the layer's float inputs (parallel flavour), rows of 256 calibration images, weights and input at the
same width. The objective is the relative squared error of `calibrate.problem.relative_error`, on rows of the samples that are held out.

    python benchmarks/solvers.py --out docs/results/solvers.json        # every row: hours; go on with the same command
    python benchmarks/solvers.py --network resnet20 --bits 4            # a part
    python benchmarks/solvers.py --table docs/results/solvers.json      # print the table of an earlier run
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import subbyte
from subbyte.calibrate.problem import relative_error
from subbyte.calibrate.rows import generator_for
from subbyte.tasks import TASKS

NETWORKS = ("resnet20", "mobilenet_v1")
BITS = (2, 3, 4, 8)
SOLVERS: dict[str, subbyte.Solver] = {
    "rounding, min-max": subbyte.RoundToNearest(subbyte.MinMax(), subbyte.MinMax()),
    "rounding, percentile": subbyte.RoundToNearest(subbyte.Percentile(), subbyte.Percentile()),
    "rounding, least output error": subbyte.RoundToNearest(),
    "AdaRound": subbyte.AdaRound(),
    "AdaQuant, authors": subbyte.AdaQuant.authors(),
    "AdaQuant": subbyte.AdaQuant(),
    "Lattice": subbyte.Lattice(),
}
LEVEL = 1.001  # an error within 0.1 % of the lowest one is as low


@dataclass(frozen=True)
class Comparing(subbyte.Solver):
    """Lets every solver solve a layer, notes what each reaches, and returns the last one's solution."""

    names: tuple[str, ...]
    rows: list[dict[str, object]] = field(compare=False)

    def solve(self, problem: subbyte.LayerProblem, generator: torch.Generator) -> subbyte.LayerSolution:
        """See `Solver`."""
        for name in self.names:
            started = time.process_time()
            solution = SOLVERS[name].solve(problem, generator_for(0, f"{name} {problem.name}"))
            seconds = time.process_time() - started
            errors = {part: relative_error(problem, solution, getattr(problem, part)) for part in ("fit", "held_out")}
            self.rows.append({"layer": problem.name, "solver": name, "seconds": round(seconds, 4), **errors})
        return solution


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the solvers layer by layer.")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--bits", type=int, choices=BITS, action="append")
    parser.add_argument("--solver", choices=sorted(SOLVERS), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; parts are added as they are measured, and those it has are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    for network in options.network or NETWORKS:
        task = TASKS[network](samples=256)
        for bits in options.bits or BITS:
            known = {row["solver"] for row in rows if (row["network"], row["bits"]) == (network, bits)}
            names = tuple(name for name in options.solver or SOLVERS if name not in known)
            if not names:
                continue
            found: list[dict[str, object]] = []
            recipe = subbyte.Recipe(solver=Comparing(names, found), flavour=subbyte.Flavour.PARALLEL)
            subbyte.quantize(task.model, task.calibration, widths=subbyte.Widths(bits, bits), recipe=recipe)
            rows += [{"network": network, "bits": bits} | row for row in found]
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=0) + "\n")
            print(table([row for row in rows if (row["network"], row["bits"]) == (network, bits)]), flush=True)
    print(table(rows))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: for each network and width one line a solver; error, on how many layers it is the lowest, seconds of all layers."""
    lines = [
        "| network | bits | solver | error, geometric mean | lowest on | above plain rounding on | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, bits in dict.fromkeys((row["network"], row["bits"]) for row in rows):
        part = [row for row in rows if (row["network"], row["bits"]) == (network, bits)]
        layers = list(dict.fromkeys(row["layer"] for row in part))
        error = {(row["solver"], row["layer"]): float(row["held_out"]) for row in part}  # type: ignore[arg-type]
        solvers = list(dict.fromkeys(row["solver"] for row in part))
        least = {layer: min(error[solver, layer] for solver in solvers) for layer in layers}
        for solver in solvers:
            errors = [error[solver, layer] for layer in layers]
            mean = math.exp(statistics.fmean(math.log(max(value, 1e-12)) for value in errors))
            lowest = sum(error[solver, layer] <= LEVEL * least[layer] for layer in layers)
            above = sum(error[solver, layer] > error.get(("rounding, least output error", layer), math.inf) for layer in layers)
            seconds = sum(float(row["seconds"]) for row in part if row["solver"] == solver)  # type: ignore[arg-type]
            lines.append(f"| {network} | {bits} | {solver} | {mean:.3g} | {lowest} of {len(layers)} | {above} | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
