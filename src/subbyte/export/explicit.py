"""Whether layers of a file stand as TensorRT's explicit quantization wants them, from the file alone.

    INT8    QuantizeLinear -> DequantizeLinear -> Conv, ConvTranspose, Gemm or MatMul <- DequantizeLinear <- INT8 constant
            all codes INT8, all zero-points 0
    INT4    the operator <- DequantizeLinear with blocks of 64 or 128 <- INT4 constant

Source:
    NVIDIA, *Working with quantized types*, TensorRT's documentation: explicit quantization.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import numpy_helper

from subbyte.export.onnx_graph import INT4_BLOCKS
from subbyte.export.runtimes import WeightSite

OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
INT8, INT4 = onnx.TensorProto.INT8, onnx.TensorProto.INT4


def qualified(content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
    """What each layer qualifies for.

    Args:
        content: of an ONNX file.
        sites: of the layers' weights, by layer name.

    Returns:
        By layer name the operator and its codes, or None.
    """
    file = _File(onnx.load_from_string(content).graph)
    return {layer: file.kind_of(site.codes) for layer, site in sites.items()}


class _File:
    """A graph that can be asked who makes and who reads a value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def kind_of(self, codes: str) -> str | None:
        """What all layers that read these codes qualify for."""
        kinds = {self._kind(codes, node) for node in self.readers.get(codes, ())}
        return next(iter(kinds)) if len(kinds) == 1 else None

    def _kind(self, codes: str, node: onnx.NodeProto) -> str | None:
        layers = self.readers.get(node.output[0], [])
        if codes not in self.constants or node.op_type != "DequantizeLinear" or not layers or not self._is_symmetric(node):
            return None
        names = {layer.op_type for layer in layers if layer.input[1] == node.output[0]}
        if len(names) != 1 or not names <= OPERATORS:
            return None
        name, kind = names.pop(), self.constants[codes].data_type
        block = next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 0)
        if kind == INT4:
            return f"{name}, INT4 weights" if block in INT4_BLOCKS else None
        whole = kind == INT8 and not block and all(self._is_quantized(layer.input[0]) for layer in layers)
        return f"{name}, INT8" if whole else None

    def _is_quantized(self, name: str) -> bool:
        """Whether a value comes from QuantizeLinear and DequantizeLinear and nothing between them, zero-point 0."""
        dequantize = self.makers.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not self._is_symmetric(dequantize):
            return False
        source = self.makers.get(dequantize.input[0])
        return source is not None and source.op_type == "QuantizeLinear" and source.input[1:] == dequantize.input[1:]

    def _is_symmetric(self, node: onnx.NodeProto) -> bool:
        """Whether its zero-points are 0, INT8 where they are written out."""
        if len(node.input) < 3:
            return True
        tensor = self.constants.get(node.input[2])
        return tensor is not None and tensor.data_type == INT8 and not numpy_helper.to_array(tensor).any()
