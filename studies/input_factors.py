"""What multiplying a layer's input costs in ONNX Runtime: QuantizeLinear alone, behind a Mul, and with a step for each channel.

python studies/input_factors.py
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

CHANNELS, SHAPES = (384, 1536), ((1, 24), (8, 32), (8, 128))
RUNS = 60


def main() -> None:
    print("| channels | samples | tokens | alone, us | Mul in front | step for each channel |\n" + "|---" * 6 + "|")
    for channels in CHANNELS:
        sessions = [session(kind, channels) for kind in ("alone", "mul", "axis")]
        for samples, tokens in SHAPES:
            x = np.random.default_rng(0).standard_normal((samples, tokens, channels), dtype=np.float32)
            times: list[list[float]] = [[], [], []]
            for _ in range(RUNS):
                for one, found in zip(sessions, times, strict=True):
                    started = time.perf_counter()
                    one.run(None, {"x": x})
                    found.append(time.perf_counter() - started)
            print(f"| {channels} | {samples} | {tokens} | " + " | ".join(f"{1e6 * min(found):.0f}" for found in times) + " |")


def session(kind: str, channels: int) -> onnxruntime.InferenceSession:
    """A file of one quantiser, two threads."""
    per_channel = kind == "axis"
    size = [channels] if per_channel else []
    count = channels if per_channel else 1
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, size, [0.05] * count),
        helper.make_tensor("z", TensorProto.UINT8, size, [100] * count),
    ]
    nodes = [helper.make_node("QuantizeLinear", ["y" if kind == "mul" else "x", "s", "z"], ["q"], axis=2)]
    if kind == "mul":
        constants.append(helper.make_tensor("k", TensorProto.FLOAT, [channels], [2.0] * channels))
        nodes.insert(0, helper.make_node("Mul", ["x", "k"], ["y"]))
    ends = [
        helper.make_tensor_value_info(name, form, ["b", "t", channels])
        for name, form in (("x", TensorProto.FLOAT), ("q", TensorProto.UINT8))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


if __name__ == "__main__":
    main()
