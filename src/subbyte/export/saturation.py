"""Processors whose int8 kernels lose sums.

AVX2 multiplies pairs of UINT8 inputs and INT8 weights and adds the two products in 16 bits, which hold 32767: two inputs of 255 with two
weights above 64 are more, and the sum is cut off there. Weights of 7 bits or fewer are never that large. VNNI and AMX add
in 32 bits.

    255 (|w_1| + |w_2|) <= 32767    where both are at most 64

Whether the processor at hand does this is found by asking a runtime for such a sum. ONNX Runtime multiplies UINT8 weights without loss, so
where it does, weights of 8 bits are stored as UINT8 with zero-point 128 (`constants.unsigned`): the same numbers. OpenVINO computes these
in float32.

Source:
    ONNX Runtime's documentation, "Quantize ONNX models", section "When and why do I need to try U8U8?".
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import helper, numpy_helper

from subbyte.export.layer_files import IR_VERSION
from subbyte.export.onnx_graph import OPSET
from subbyte.export.targets import Target

CHANNELS = 64
TOP, LARGEST = 255, 127  # of UINT8, and of weights of 8 bits
LOST = 0.9  # of the sum, what arrives where pairs are cut off is about half


@functools.cache
def saturates(target: Target) -> bool:
    """Whether a runtime's int8 kernels, on this processor, lose parts of large sums.

    Args:
        target: that has the runtime, which is asked once in a process.

    Raises:
        OptionError: if the runtime is not installed.
    """
    codes = np.full((1, CHANNELS, 4, 4), TOP, np.uint8)
    found = target.open(_largest_sum(), optimized=True, threads=1)([codes])[0]
    return float(np.min(found)) < LOST * TOP


def _largest_sum() -> bytes:
    """A 1x1 convolution whose inputs and weights are all as large as can be; its output fills the grid where nothing is lost."""
    one = np.float32(1.0)
    numbers = {
        "one": one,
        "zero": np.uint8(0),
        "w": np.full((CHANNELS, CHANNELS, 1, 1), LARGEST, np.int8),
        "steps": np.full(CHANNELS, one),
        "zeros": np.zeros(CHANNELS, np.int8),
        "unit": np.float32(CHANNELS * LARGEST),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "steps", "zeros"], ["weight"], axis=0),
        helper.make_node("Conv", ["x", "weight"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "unit", "zero"], ["z"]),
    ]
    given, made = (helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, CHANNELS, 4, 4]) for name in ("codes", "z"))
    graph = helper.make_graph(nodes, "g", [given], [made], [numpy_helper.from_array(np.asarray(a), name) for name, a in numbers.items()])
    content: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION).SerializeToString()
    return content
