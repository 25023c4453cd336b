"""By which float32 number does OpenVINO multiply, to bring a convolution's output to its grid?

    python studies/openvino_multiplier.py --grids 120

`export/arithmetic.py` says `k = 255 / (h - l)`. Here one convolution has sums of which every one, times `k`, is as near as can be to the
middle between two codes, so that `k` and the float32 numbers beside it give other codes; printed is how far from `k`, in float32 numbers,
lies the one that gives all codes as OpenVINO has them, for steps of the grid drawn at random.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper, numpy_helper

import subbyte
from subbyte.export.arithmetic import OpenVINOArithmetic
from subbyte.export.markers import TensorGrid

INPUTS, OUTPUTS, SIDE = 64, 32, 32
BIG = 127  # all weights but the last, which is 1: any whole number is a sum
Floats = npt.NDArray[np.float32]


def network(step: float, weight_steps: Floats, bias: Floats, grid: float) -> bytes:
    """Quantize, convolve, ReLU, quantize."""
    weights = np.full((OUTPUTS, INPUTS, 1, 1), BIG, np.int8)
    weights[:, -1] = 1
    constants = {"s": np.float32(step), "z": np.uint8(0), "w": weights, "t": weight_steps, "y": np.zeros(OUTPUTS, np.int8)}
    constants |= {"b": bias, "g": np.float32(grid)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t", "y"], ["v"], axis=0),
        helper.make_node("Conv", ["d", "v", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "g", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "g", "z"], ["out"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", INPUTS, SIDE, SIDE])
    returned = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [given], [returned], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return bytes(model.SerializeToString())


def near_the_middle(unit: Floats, bias_codes: npt.NDArray[np.int64], grid: float) -> npt.NDArray[np.int64]:
    """Sums that some output channel brings next to the middle between two codes."""
    sums, found = np.arange(1, (INPUTS - 1) * 255 * BIG), []
    for one, code in zip(unit.tolist(), bias_codes.tolist(), strict=True):
        steps = (sums + code) * one / grid
        close = np.abs(steps - np.floor(steps) - 0.5) < 6e-6 * np.maximum(steps / 64, 0.2)
        found.append(sums[close & (steps > 0) & (steps < 255)])
    return np.concatenate(found)


def codes_of(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Input codes of which the weights make these sums, (images, INPUTS, SIDE, SIDE), and zeros where sums are used up."""
    images = -(-len(sums) // SIDE**2)
    padded = np.zeros(images * SIDE**2, np.int64)
    padded[: len(sums)] = sums
    rest, codes = padded // BIG, np.zeros((len(padded), INPUTS), np.int64)
    codes[:, -1] = padded % BIG
    for column in range(INPUTS - 1):
        codes[:, column] = np.minimum(rest, 255)
        rest = rest - codes[:, column]
    return codes.reshape(images, SIDE, SIDE, INPUTS).transpose(0, 3, 1, 2)


def distance(generator: np.random.Generator) -> int | None:
    """How many float32 numbers OpenVINO's multiplier lies above `k`, for one random grid; None if none near it gives all codes."""
    step = np.float32(generator.uniform(0.01, 4))
    weight_steps = generator.uniform(0.001, 0.01, OUTPUTS).astype(np.float32)
    unit, bias_codes = step * weight_steps, generator.integers(-3000, 3000, OUTPUTS)
    bias, size = bias_codes.astype(np.float32) * unit, np.float32(unit.max() * 8000)
    codes = codes_of(near_the_middle(unit, bias_codes, float(size)))
    run = subbyte.OpenVINOCPU().open(network(float(step), weight_steps, bias, float(size)), optimized=False, threads=1)
    given = torch.from_numpy(np.rint(run([(codes * float(step)).astype(np.float32)])[0] / size)).double()
    sums = torch.from_numpy(BIG * codes[:, :-1].sum(axis=1, keepdims=True) + codes[:, -1:]).double()
    spread = (1, -1, 1, 1)
    arguments = sums, torch.from_numpy(bias_codes).double().view(spread), torch.from_numpy(unit).view(spread)
    real = arguments[0].float() * arguments[2] + arguments[1].float() * arguments[2]
    multiplier = np.float32(255) / (np.float32(255) * size)
    simulated = OpenVINOArithmetic().of_convolution(*arguments, TensorGrid(float(size), 0, 0, 255))
    assert torch.equal((real * float(multiplier)).round().clamp(0, 255), simulated)  # the simulation's `k` is this one
    for away in (0, 1, -1, 2, -2):
        tried = (multiplier.view(np.int32) + np.int32(away)).view(np.float32)
        if torch.equal((real * torch.tensor(tried)).round().clamp(0, 255).double(), given):
            return away
    return None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator = np.random.default_rng(given.seed)
    found = Counter(distance(generator) for _ in range(given.grids))
    counts = ", ".join(f"{away}: {count} grids" for away, count in found.most_common())
    print(f"float32 numbers from k to OpenVINO's: {counts}")


if __name__ == "__main__":
    main()
