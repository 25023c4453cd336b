"""Linear layers in ONNX Runtime: int8 with quantised inputs, and 4-bit weights with a step for each column group and float32 inputs.

    python benchmarks/linear_kernels.py

Shapes of MiniLM's (384 wide) and GPT-2's (768 wide) layers, one token and 128, two threads. Milliseconds of one layer, the shortest of
repeated runs in turns in one process. *int8* has 4-bit weights, widened, and 8-bit inputs (`OnnxRuntimeCPU()`); *group* is
`Recipe(weight_group=...)` with float32 inputs (`Simulation()`), of which ONNX Runtime makes its MatMulNBits where it optimises.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

import subbyte
from subbyte.export.translation import Example, marked, to_file, trace
from subbyte.export.verify import in_turns

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072))
GROUPS = (32, 64, 128)
TIMED = 60


def files(inputs: int, outputs: int) -> dict[str, bytes]:
    """The same layer in every form."""
    torch.manual_seed(0)
    model, samples = nn.Sequential(nn.Linear(inputs, outputs)).eval(), [torch.randn(4, 128, inputs), torch.randn(4, 1, inputs)]
    example = Example.of(samples)
    found = {"float": to_file(trace(marked(model).model, example), example, {})[0]}
    forms = {"int8": (None, 8, subbyte.OnnxRuntimeCPU())} | {f"group {g}": (g, None, subbyte.Simulation()) for g in GROUPS}
    for name, (group, activation_bits, target) in forms.items():
        recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), weight_group=group)
        result = subbyte.quantize(model, samples, widths=subbyte.Widths(4, activation_bits), recipe=recipe)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "m.onnx"
            result.export_onnx(path, target, threads=1)
            found[name] = path.read_bytes()
    return found


def kernels(content: bytes) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "o.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(1)
    names = ["float", "int8", *(f"group {group}" for group in GROUPS)]
    print("| inputs, outputs | tokens | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for inputs, outputs in SHAPES:
        contents = files(inputs, outputs)
        if (inputs, outputs) == SHAPES[0]:
            used = {name: ", ".join(kernels(content)) for name, content in contents.items()}
        runs = [subbyte.OnnxRuntimeCPU().open(contents[name], optimized=True, threads=threads) for name in names]
        for tokens in (1, 128):
            times = in_turns(runs, [torch.randn(1, tokens, inputs).numpy()], TIMED)
            print(f"| {inputs}, {outputs} | {tokens} | " + " | ".join(f"{1000 * min(seconds):.3f}" for seconds in times) + " |", flush=True)
    for name, operators in used.items():
        print(f"{name}: {operators}")


if __name__ == "__main__":
    main()
