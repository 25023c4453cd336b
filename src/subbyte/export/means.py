"""Means over all positions, with channels last, as ONNX Runtime's int8 convolutions leave them, and of codes.

In front of a mean over the last dimensions ONNX Runtime turns every number round to channels first, and makes it a float32 number, which in
SqueezeNet takes two fifths of its last layer's time. So a large one becomes a matrix product of the codes with ones

    (N, C, H, W) codes -> Transpose (N, H, W, C), which it cancels against its own -> Reshape (N, H W, C)
        -> MatMulInteger: ones (1, 1, H W) times that, (N, 1, C) whole numbers -> less the zero-points, times s / (H W) -> Reshape

which is exact. (ONNX Runtime would subtract the zero-point itself; OpenVINO 2026.4 cannot read it there.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from subbyte.export.onnx_builder import Builder

FEWEST = 1 << 16  # numbers of a sample; below it the operators cost more than they save (MobileNetV1: 37,632)
IMAGE = 4  # dimensions


@dataclass(frozen=True, eq=False)
class TurnedMean:
    """A mean that waits for the codes that it reads.

    Args:
        last: the transposition to channels last of what is quantised.
        mean: the mean of that, over positions.
        positions: how many.
        scale: of the codes.
        zero_point: likewise.
    """

    last: ir.Node
    mean: ir.Node
    positions: int
    scale: float
    zero_point: int


def turn_means_(builder: Builder, domain: str) -> list[TurnedMean]:
    """Let large means over all positions of quantised tensors read them with channels last.

    Args:
        builder: of a graph of markers, which is changed.
        domain: of the markers.

    Returns:
        What `sum_codes_` finishes when operators stand in place of the markers.
    """
    found = []
    for node in [node for node in builder.graph if node.op_type == "ReduceMean"]:
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        if source is None or maker is None or (maker.domain, maker.op_type) != (domain, "Quantize") or not _is_large_mean(node, source):
            continue
        assert source.shape is not None
        last = builder.add("Transpose", source, perm=[0, 2, 3, 1])
        means = builder.add("ReduceMean", last, builder.constant(np.array([1, 2])), keepdims=0)
        kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        made = builder.add("Reshape", means, builder.constant(np.array([0, source.shape[1], 1, 1] if kept else [0, source.shape[1]])))
        builder.place_(node)
        old = node.outputs[0]
        made.type, made.shape = old.type, old.shape
        if old.is_graph_output():
            made.name, old.name = old.name, None
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        builder.graph.remove(node, safe=True)
        turned, mean = last.producer(), means.producer()
        assert turned is not None and mean is not None
        scale, zero_point = maker.attributes["scale"].as_float(), maker.attributes["zero_point"].as_int()
        found.append(TurnedMean(turned, mean, math.prod(source.shape[2:]), scale, zero_point))  # type: ignore[arg-type]
    return found


def sum_codes_(builder: Builder, means: Sequence[TurnedMean]) -> None:
    """Sum codes, where `turn_means_` has left a mean of numbers.

    Args:
        builder: of the graph, whose markers have been replaced; is changed.
        means: what `turn_means_` returned.
    """
    for one in means:
        source = one.last.inputs[0]
        maker = None if source is None else source.producer()
        assert maker is not None and maker.op_type == "DequantizeLinear"
        last = builder.add("Transpose", maker.inputs[0], perm=[0, 2, 3, 1])
        rows = builder.add("Reshape", last, builder.constant(np.array([0, one.positions, -1])))
        sums = builder.add("MatMulInteger", builder.constant(np.ones((1, 1, one.positions), np.uint8)), rows)
        if one.zero_point:
            sums = builder.add("Sub", sums, builder.constant(np.int32(one.positions * one.zero_point)))
        numbers = builder.cast(sums, ir.DataType.FLOAT)
        made = builder.add("Mul", numbers, builder.constant(np.float32(one.scale / one.positions)))
        builder.place_(one.mean)
        one.mean.outputs[0].replace_all_uses_with(made)
        for node in (one.mean, one.last):
            builder.graph.remove(node, safe=True)
        if not maker.outputs[0].uses():
            builder.graph.remove(maker, safe=True)


def _is_large_mean(node: ir.Node, source: ir.Value) -> bool:
    """Whether a ReduceMean is one over all positions, of so many numbers that it pays."""
    if source.shape is None or len(source.shape) != IMAGE or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes, sizes = ir.convenience.get_const_tensor(node.inputs[1]), [size for size in source.shape[1:] if isinstance(size, int)]
    if axes is None or {int(axis) % IMAGE for axis in axes.numpy().ravel()} != {2, 3}:
        return False
    return len(sizes) == IMAGE - 1 and math.prod(sizes) >= FEWEST
