"""Where the time of a network's ONNX file goes in ONNX Runtime, operator by operator, beside the float model's file.

    python benchmarks/onnx_profile.py --network mobilenet_v1

Plainly rounded, 4-bit weights and 8-bit inputs; one sample; the shortest of repeated runs of each operator, microseconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import subbyte
from subbyte.export.translation import Example, marked, to_file, trace
from subbyte.tasks import TASKS

RUNS = 40


def profile(content: bytes, sample: torch.Tensor, folder: Path, threads: int) -> list[tuple[str, list[int], int]]:
    """Operator, shape of its output and microseconds, in running order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {session.get_inputs()[0].name: sample.numpy()})
    times: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event)
    shapes = {name: next(iter(events[0]["args"]["output_type_shape"][0].values())) for name, events in times.items()}
    return [(events[0]["args"]["op_name"], shapes[name], min(event["dur"] for event in events)) for name, events in times.items()]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(TASKS), default="mobilenet_v1")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[chosen.network](samples=32)
    result = subbyte.quantize(task.model, task.calibration, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    example = Example.of([task.calibration[:4]])
    contents = {"float": to_file(trace(marked(task.model).model, example), example, {})[0]}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result.export_onnx(Path(folder) / "m.onnx", threads=1)
        contents["int8"] = (Path(folder) / "m.onnx").read_bytes()
        for name, content in contents.items():
            steps = profile(content, task.calibration[:1], Path(folder), chosen.threads)
            print(f"{name}: {sum(step[2] for step in steps) / 1000:.2f} ms")
            for operator, shape, microseconds in steps:
                print(f"  {microseconds:6d}  {operator}  {shape}")


if __name__ == "__main__":
    main()
