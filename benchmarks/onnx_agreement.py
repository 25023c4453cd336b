"""ONNX files of the real networks beside their simulations, number for number, in ONNX Runtime and OpenVINO; and the files' bytes.

    python benchmarks/onnx_agreement.py --images 500 --out docs/results/onnx_agreement.json
    python benchmarks/onnx_agreement.py --table docs/results/onnx_agreement.json

The widths of `onnx_files.py`, calibrated on 64 images; agreement on evenly spaced test images. Nothing is timed, so that the machine may
have other work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from onnx_files import NETWORKS, chosen, mixed_widths

import subbyte
from subbyte.export.targets import Target
from subbyte.export.verify import RuntimeCheck, as_arrays, compared
from subbyte.model.layers import survey
from subbyte.tasks import TASKS

HEADS = "network, images, ONNX Runtime agreement, largest steps, OpenVINO agreement, largest steps, bytes, of packed"


def checked(result: subbyte.Result, target: Target, path: Path, batches: list[torch.Tensor]) -> RuntimeCheck:
    """Runtime beside simulation."""
    exported = result.export_onnx(path, target, threads=1)
    run = target.open(path.read_bytes(), optimized=target == subbyte.OnnxRuntimeCPU(), threads=1)
    with torch.no_grad():
        expected = [[exported.simulation(batch).numpy()] for batch in batches]
    return compared(True, batches, expected, [run(as_arrays(batch)) for batch in batches])


def measure(network: str, images: int) -> dict[str, Any]:
    """All figures of one network."""
    task = TASKS[network](samples=64)
    names = [layer.name for layer in survey(task.model, [task.calibration[:2]])[0].layers]
    result = subbyte.quantize(task.model, task.calibration, widths=mixed_widths(names, task.first_and_last))
    parts = task.test_inputs[chosen(task, images)].split(task.batch_size)
    batches = [part if task.preprocess is None else task.preprocess(part) for part in parts]
    row: dict[str, Any] = {"network": network, "images": images, "packed_bytes": result.size_bytes}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        for name, target in (("onnxruntime", subbyte.OnnxRuntimeCPU()), ("openvino", subbyte.OpenVINOCPU())):
            check = checked(result, target, path, batches)
            row |= {f"{name}_agreement": check.agreement, f"{name}_steps": check.largest_steps, "bytes": path.stat().st_size}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    columns = HEADS.split(", ")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["network"], str(row["images"])]
        for name in ("onnxruntime", "openvino"):
            cells += [f"{row[f'{name}_agreement']:.2f}", f"{row[f'{name}_steps']:.4f}"]
        cells += [f"{row['bytes']:,}", f"{row['bytes'] / row['packed_bytes']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())["rows"]))
        return
    torch.set_num_threads(1)
    rows = []
    for network in given.network:
        rows.append(measure(network, given.images))
        print(json.dumps(rows[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
