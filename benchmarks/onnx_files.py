"""ONNX files of the real networks: int8 kernels, accuracy beside the simulation, bytes beside the packed file, speed beside float and
beside ONNX Runtime's own static quantiser.

    python benchmarks/onnx_files.py --network resnet20                      # one network, rounded plainly at mixed 2..8-bit weights
    python benchmarks/onnx_files.py --out docs/results/onnx.json            # all four
    python benchmarks/onnx_files.py --table docs/results/onnx.json          # print the table of an earlier run
    python benchmarks/onnx_files.py --signed --images 500                   # INT8 weights of 8 bits also where the processor cuts off sums

Weights of 2 to 8 bits in turn, first and last layer at 8; inputs of 8 bits. All files are timed in turns in one process, one sample
at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import subbyte
from subbyte.export.translation import Example, marked, to_file, trace
from subbyte.export.verify import in_turns
from subbyte.model.layers import survey
from subbyte.tasks import TASKS

NETWORKS = ("resnet20", "resnet56", "mobilenet_v1", "squeezenet")
CYCLE = (4, 4, 6, 5, 7, 8, 3)  # bits of the layers in turn; every 21st has 2
TIMED = 600


def mixed_widths(names: list[str], ends: tuple[str, str]) -> subbyte.Widths:
    """Weights of 2 to 8 bits, all widths present."""
    bits = {name: 2 if index % 21 == 10 else CYCLE[index % len(CYCLE)] for index, name in enumerate(names)}
    return subbyte.Widths(8, 8, pinned={name: (width, 8) for name, width in bits.items()} | dict.fromkeys(ends, 8))


def static_quantized(float_file: Path, samples: torch.Tensor, folder: Path) -> bytes:
    """The float file quantised to int8 by ONNX Runtime's own static quantiser: QDQ, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(samples.numpy()[:, None])

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch}

    prepared, out = folder / "prepared.onnx", folder / "static.onnx"
    quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return out.read_bytes()


def predictions(run: Any, task: Any, images: int | None) -> np.ndarray:
    """Classes of the test images, evenly spaced ones if not all, int64 (samples,)."""
    found = []
    for inputs in task.test_inputs[chosen(task, images)].split(task.batch_size):
        batch = inputs if task.preprocess is None else task.preprocess(inputs)
        found.append(run(batch).argmax(-1))
    return np.concatenate(found)


def chosen(task: Any, images: int | None) -> torch.Tensor:
    """Indices of evenly spaced test images."""
    count = len(task.test_labels)
    return torch.arange(count) if images is None else torch.arange(images) * count // images


def measure(network: str, runtime: subbyte.Target, threads: int, images: int | None) -> dict[str, Any]:
    """All figures of one network."""
    task = TASKS[network]()
    names = [layer.name for layer in survey(task.model, [task.calibration[:2]])[0].layers]
    result = subbyte.quantize(task.model, task.calibration, widths=mixed_widths(names, task.first_and_last))
    openvino = subbyte.OpenVINOCPU()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = result.export_onnx(folder / "model.onnx", runtime, threads=threads)
        content = (folder / "model.onnx").read_bytes()
        example = Example.of([task.calibration[:4]])
        plain, _ = to_file(trace(marked(task.model).model, example), example, {})
        (folder / "float.onnx").write_bytes(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            static = static_quantized(folder / "float.onnx", task.calibration[:32], folder)
        for_openvino = result.export_onnx(folder / "openvino.onnx", openvino, allow_float=True, threads=threads)
    simulated = predictions(lambda batch: exported.simulation(batch).detach().numpy(), task, images)
    run = runtime.open(content, optimized=True, threads=threads)
    ran = predictions(lambda batch: run([batch.numpy()])[0], task, images)
    vino = openvino.open(content, optimized=False, threads=threads)
    in_openvino = predictions(lambda batch: vino([batch.numpy()])[0], task, images)
    simulated_openvino = predictions(lambda batch: for_openvino.simulation(batch).detach().numpy(), task, images)
    labels = task.test_labels[chosen(task, images)].numpy()
    in_pytorch = predictions(lambda batch: result.model(batch).detach().numpy(), task, images)
    in_float = predictions(lambda batch: task.model(batch).detach().numpy(), task, images)
    one = [task.calibration[:1].numpy()]
    runs = [runtime.open(file, optimized=True, threads=threads) for file in (content, plain, static)]
    runs += [openvino.open(file, optimized=True, threads=threads) for file in (content, plain)]
    timed = [1000.0 * min(seconds) for few in (runs[:3], runs[3:]) for seconds in in_turns(few, one, TIMED)]
    return {
        "network": network,
        "threads": threads,
        "unsigned": runtime.layout.unsigned_weights,
        "layers": len(result.layers),
        "int8": len(result.layers) - len(exported.verification.float_layers),
        "openvino_int8": len(result.layers) - len(for_openvino.verification.float_layers),
        "images": len(labels),
        "float_top1": 100.0 * float((in_float == labels).mean()),
        "model_top1": 100.0 * float((in_pytorch == labels).mean()),
        "simulation_top1": 100.0 * float((simulated == labels).mean()),
        "runtime_top1": 100.0 * float((ran == labels).mean()),
        "agreement": 100.0 * float((simulated == ran).mean()),
        "openvino_agreement": 100.0 * float((simulated_openvino == in_openvino).mean()),
        "bytes": len(content),
        "packed_bytes": result.size_bytes,
        "float_bytes": len(plain),
        "static_bytes": len(static),
        "ms": dict(zip(("file", "float", "static", "openvino", "openvino_float"), timed, strict=True)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    heads = "network, int8 layers (OpenVINO), float, quantized, simulation, runtime, agreement (OpenVINO), bytes, of packed"
    columns = [*heads.split(", "), "x float", "x static int8", "OpenVINO x float"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ms, packed = row["ms"], row["packed_bytes"]
        cells = [
            row["network"],
            f"{row['int8']} ({row['openvino_int8']}) of {row['layers']}",
            *(f"{row[name]:.2f}" for name in ("float_top1", "model_top1", "simulation_top1", "runtime_top1")),
            f"{row['agreement']:.2f} ({row['openvino_agreement']:.2f})",
            f"{row['bytes']:,}",
            f"{row['bytes'] / packed:.3f}",
            f"{ms['float'] / ms['file']:.2f}",
            f"{ms['static'] / ms['file']:.2f}",
            f"{ms['openvino_float'] / ms['openvino']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--threads", type=int, default=2, help="of the runtimes")
    parser.add_argument("--torch-threads", type=int, default=2, help="of everything else")
    parser.add_argument("--images", type=int, help="so many test images, evenly spaced; otherwise all")
    parser.add_argument("--signed", action="store_true", help="weights of 8 bits are INT8 on any processor")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())["rows"]))
        return
    torch.set_num_threads(given.torch_threads)
    rows, runtime = [], subbyte.OnnxRuntimeCPU(saturates=False if given.signed else None)
    for network in given.network:
        rows.append(measure(network, runtime, given.threads, given.images))
        print(json.dumps(rows[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
