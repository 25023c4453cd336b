"""Column groups: the six linear layers of the first block of MiniLM on SST-2, weights only, by group size and solver.

    python benchmarks/column_groups.py --out docs/results/column_groups.json     # some minutes on one thread
    python benchmarks/column_groups.py --table docs/results/column_groups.json   # print the table of an earlier run

Each layer is solved on its float inputs (parallel flavour), from rows of 512 training sentences of at most 64 tokens; errors are relative
squared errors of its output on rows of the sentences that are held out, geometric means over the layers. *columns* is error feedback alone,
as GPTQ does it. *bits*: of the packed layers, codes, steps and biases, for each weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import subbyte
from subbyte.export.pretrained import open_pretrained, open_tokenizer
from subbyte.run.events import Event, LayerSolved
from subbyte.tasks import default_data_root
from subbyte.tasks.texts import read_texts, tokenized

BITS, GROUPS = (4, 3, 2), (None, 128, 64, 32)
SOLVERS: dict[str, subbyte.Solver] = {"columns": subbyte.Lattice.columns(), "Lattice": subbyte.Lattice()}
ROUNDING = "rounding"


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps for groups of columns beside steps for output channels.")
    parser.add_argument("--data", type=Path, help="folder with minilm-sst2/ and sst2/; otherwise the one beside the checkout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    parser.add_argument("--table", type=Path, help="print the table of such a file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    data = options.data or default_data_root()
    model, tokenizer = open_pretrained(data / "minilm-sst2"), open_tokenizer(data / "minilm-sst2")
    train = read_texts(data / "sst2" / "train.tsv", "0")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:512].tolist()
    calibration = tokenized(model, tokenizer, [train[index] for index in order], batch_size=64, most_tokens=64).batches
    rows = [row for bits in BITS for group in GROUPS for row in measure(model, calibration, bits, group)]
    if options.out:
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


def measure(model: torch.nn.Module, calibration: Sequence[Any], bits: int, group: int | None) -> list[dict[str, Any]]:
    """Rounding and every solver at one width and group size."""
    widths = subbyte.Widths(bits, None, include=("*encoder.layer.0.*",))
    rows = []
    for name, solver in SOLVERS.items():
        events: list[Event] = []
        recipe = subbyte.Recipe(solver=solver, flavour=subbyte.Flavour.PARALLEL, weight_group=group)
        layers = subbyte.quantize(model, calibration, widths=widths, recipe=recipe, observer=events.append).layers
        solved = [event for event in events if isinstance(event, LayerSolved)]  # also where the whole is given up for plain rounding
        size = 8 * sum(layer.size_bytes for layer in layers) / sum(layer.float_bytes // 4 for layer in layers)
        found = {} if rows else {ROUNDING: [event.baseline_error for event in solved]}
        found[name] = [event.error for event in solved]
        for which, errors in found.items():
            row = {"bits": bits, "group": group, "solver": which, "error": statistics.geometric_mean(errors), "size": round(size, 2)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line for each width and group size."""
    names = [ROUNDING, *SOLVERS]
    lines = [f"| weights | share a step | bits | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for bits, group in dict.fromkeys((row["bits"], row["group"]) for row in rows):
        here = {row["solver"]: row for row in rows if (row["bits"], row["group"]) == (bits, group)}
        errors = " | ".join(f"{here[name]['error']:.4f}" for name in names)
        lines.append(f"| {bits} bits | {group or 'output channel'} | {here[ROUNDING]['size']:.2f} | {errors} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
