"""Means over all positions, with channels last, as ONNX Runtime's int8 convolutions leave them, and of codes.

In front of a mean over the last dimensions ONNX Runtime turns every number round to channels first, and makes it a float32 number. So a
large one becomes a matrix product of the codes with ones

    (N, C, H, W) codes -> Transpose (N, H, W, C), which it cancels against its own -> Reshape (N, H W, C)
        -> MatMulInteger: ones (1, 1, H W) times that, (N, 1, C) whole numbers -> less the zero-points, times s / (H W) -> Reshape

which is exact. (ONNX Runtime would subtract the zero-point itself; OpenVINO 2026.4 cannot read it there.)

One that is quantised at once and small becomes a GlobalAveragePool, of which ONNX Runtime makes its int8 one.
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
RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over all positions of something quantised, and the grid of what it reads.

    Args:
        node: the ReduceMean.
        shape: of a sample, C, H, W.
        scale: of the codes.
        zero_point: likewise.
        quantized: whether quantisers read it, and nothing else.
    """

    node: ir.Node
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    quantized: bool

    @property
    def is_large(self) -> bool:
        """Whether a sum of codes pays."""
        return math.prod(self.shape) >= FEWEST

    @property
    def keeps_dimensions(self) -> bool:
        """Whether its result is (N, C, 1, 1), not (N, C)."""
        return "keepdims" not in self.node.attributes or self.node.attributes["keepdims"].as_int() == 1


def means_of_codes(graph: ir.Graph, domain: str) -> list[Mean]:
    """Means of quantised tensors over all positions, in running order.

    Args:
        graph: of markers, which say what is quantised.
        domain: of the markers.
    """
    found = []
    for node in [node for node in graph if node.op_type == "ReduceMean"]:
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        if source is None or maker is None or not _is_quantizer(maker, domain) or not _is_over_all_positions(node, source):
            continue
        assert source.shape is not None
        shape = tuple(size for size in source.shape[1:] if isinstance(size, int))
        scale, zero_point = maker.attributes["scale"].as_float(), maker.attributes["zero_point"].as_int()
        found.append(Mean(node, shape, scale, zero_point, _is_quantized(node.outputs[0], domain)))
    return found


def rewrite_means_(builder: Builder, means: Sequence[Mean], *, channels_last: bool) -> None:
    """Sum codes for large means where the runtime has channels last, and pool for others that are quantised; the rest stays.

    Args:
        builder: of the graph, in which operators stand in place of the markers; is changed.
        means: what `means_of_codes` found.
        channels_last: whether the runtime has.
    """
    for one in means:
        maker = one.node.inputs[0].producer() if one.node.inputs[0] is not None else None
        assert maker is not None and maker.op_type == "DequantizeLinear"
        if one.is_large and channels_last:
            _replace_(builder, one, _summed(builder, one, maker.inputs[0]))
        elif one.quantized:
            pooled = builder.add("GlobalAveragePool", one.node.inputs[0])
            kept = one.keeps_dimensions
            _replace_(builder, one, pooled if kept else builder.add("Reshape", pooled, builder.constant(np.array([0, one.shape[0]]))))
        if not maker.outputs[0].uses():
            builder.graph.remove(maker, safe=True)


def _summed(builder: Builder, one: Mean, codes: ir.Value | None) -> ir.Value:
    """The mean as a product of the codes with ones."""
    channels, *sides = one.shape
    positions = math.prod(sides)
    last = builder.add("Transpose", codes, perm=[0, 2, 3, 1])
    rows = builder.add("Reshape", last, builder.constant(np.array([0, positions, channels])))
    sums = builder.add("MatMulInteger", builder.constant(np.ones((1, 1, positions), np.uint8)), rows)
    if one.zero_point:
        sums = builder.add("Sub", sums, builder.constant(np.int32(positions * one.zero_point)))
    numbers = builder.add("Mul", builder.cast(sums, ir.DataType.FLOAT), builder.constant(np.float32(one.scale / positions)))
    return builder.add("Reshape", numbers, builder.constant(np.array([0, channels, 1, 1] if one.keeps_dimensions else [0, channels])))


def _replace_(builder: Builder, one: Mean, made: ir.Value) -> None:
    """Put what the builder has collected in the place of a mean."""
    builder.place_(one.node)
    old = one.node.outputs[0]
    made.type, made.shape = old.type, old.shape
    if old.is_graph_output():
        made.name, old.name = old.name, None
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    builder.graph.remove(one.node, safe=True)


def _is_quantizer(node: ir.Node, domain: str) -> bool:
    return (node.domain, node.op_type) == (domain, "Quantize")


def _is_quantized(value: ir.Value, domain: str) -> bool:
    """Whether quantisers read a value, perhaps in another shape, and nothing else."""
    readers = [use.node for use in value.uses()]
    if value.is_graph_output() or not readers:
        return False
    return all(_is_quantizer(node, domain) or (node.op_type in RESHAPING and _is_quantized(node.outputs[0], domain)) for node in readers)


def _is_over_all_positions(node: ir.Node, source: ir.Value) -> bool:
    """Whether a ReduceMean is one over all positions of images whose size is known."""
    if source.shape is None or len(source.shape) != IMAGE or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes, sizes = ir.convenience.get_const_tensor(node.inputs[1]), [size for size in source.shape[1:] if isinstance(size, int)]
    return axes is not None and {int(axis) % IMAGE for axis in axes.numpy().ravel()} == {2, 3} and len(sizes) == IMAGE - 1
