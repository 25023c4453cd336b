"""Means over all positions, with channels last, as ONNX Runtime's int8 convolutions leave them, and of codes.

In front of a mean over the last dimensions ONNX Runtime turns every number round to channels first, and makes it a float32 number. So a
large one becomes a matrix product of the codes with ones

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
class LargeMean:
    """A mean over all positions, and the grid of what it reads.

    Args:
        node: the ReduceMean.
        shape: of a sample, C, H, W.
        scale: of the codes.
        zero_point: likewise.
    """

    node: ir.Node
    shape: tuple[int, ...]
    scale: float
    zero_point: int


def large_means(graph: ir.Graph, domain: str) -> list[LargeMean]:
    """Large means of quantised tensors, in running order.

    Args:
        graph: of markers, which say what is quantised.
        domain: of the markers.
    """
    found = []
    for node in [node for node in graph if node.op_type == "ReduceMean"]:
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        if source is None or maker is None or (maker.domain, maker.op_type) != (domain, "Quantize") or not _is_large_mean(node, source):
            continue
        assert source.shape is not None
        shape = tuple(size for size in source.shape[1:] if isinstance(size, int))
        found.append(LargeMean(node, shape, maker.attributes["scale"].as_float(), maker.attributes["zero_point"].as_int()))
    return found


def sum_codes_(builder: Builder, means: Sequence[LargeMean]) -> None:
    """Put products of codes in place of means.

    Args:
        builder: of the graph, in which operators stand in place of the markers; is changed.
        means: what `large_means` found.
    """
    for one in means:
        node, (channels, *sides) = one.node, one.shape
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        assert maker is not None and maker.op_type == "DequantizeLinear"
        positions = math.prod(sides)
        last = builder.add("Transpose", maker.inputs[0], perm=[0, 2, 3, 1])
        rows = builder.add("Reshape", last, builder.constant(np.array([0, positions, channels])))
        sums = builder.add("MatMulInteger", builder.constant(np.ones((1, 1, positions), np.uint8)), rows)
        if one.zero_point:
            sums = builder.add("Sub", sums, builder.constant(np.int32(positions * one.zero_point)))
        numbers = builder.add("Mul", builder.cast(sums, ir.DataType.FLOAT), builder.constant(np.float32(one.scale / positions)))
        kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        made = builder.add("Reshape", numbers, builder.constant(np.array([0, channels, 1, 1] if kept else [0, channels])))
        builder.place_(node)
        old = node.outputs[0]
        made.type, made.shape = old.type, old.shape
        if old.is_graph_output():
            made.name, old.name = old.name, None
        old.replace_all_uses_with(made, replace_graph_outputs=True)
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
