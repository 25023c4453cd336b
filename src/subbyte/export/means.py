"""Means over all positions, with channels last, as ONNX Runtime's int8 convolutions leave them.

In front of a mean over the last dimensions ONNX Runtime turns every number round to channels first, which in SqueezeNet takes a fifth
of its last layer's time. So a large one becomes

    (N, C, H, W) -> Transpose (N, H, W, C), which it cancels against its own -> ReduceMean over H and W, dropped -> Reshape

of the same numbers. (Were H and W one dimension, OpenVINO 2026.4 would compute the first sample's mean alone; were they kept, ONNX Runtime
would put the mean and the transpositions back together.)
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from subbyte.export.onnx_builder import Builder

FEWEST = 1 << 16  # numbers of a sample; below it the operators cost more than they save (MobileNetV1: 37,632)
IMAGE = 4  # dimensions


def turn_means_(builder: Builder, domain: str) -> None:
    """Let large means over all positions of quantised tensors read them with channels last.

    Args:
        builder: of a graph of markers, which is changed.
        domain: of the markers.
    """
    for node in [node for node in builder.graph if node.op_type == "ReduceMean"]:
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        if source is None or maker is None or (maker.domain, maker.op_type) != (domain, "Quantize") or not _is_large_mean(node, source):
            continue
        assert source.shape is not None
        last = builder.add("Transpose", source, perm=[0, 2, 3, 1])
        means = builder.add("ReduceMean", last, builder.constant(np.array([1, 2])), keepdims=0)
        kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        made = builder.add("Reshape", means, builder.constant(np.array([0, source.shape[1], 1, 1]))) if kept else means
        builder.place_(node)
        old = node.outputs[0]
        made.type, made.shape = old.type, old.shape
        if old.is_graph_output():
            made.name, old.name = old.name, None
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        builder.graph.remove(node, safe=True)


def _is_large_mean(node: ir.Node, source: ir.Value) -> bool:
    """Whether a ReduceMean is one over all positions, of so many numbers that it pays."""
    if source.shape is None or len(source.shape) != IMAGE or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes, sizes = ir.convenience.get_const_tensor(node.inputs[1]), [size for size in source.shape[1:] if isinstance(size, int)]
    if axes is None or {int(axis) % IMAGE for axis in axes.numpy().ravel()} != {2, 3}:
        return False
    return len(sizes) == IMAGE - 1 and math.prod(sizes) >= FEWEST
