"""What an export is made of, in one place: everything here needs the packages of the extra `onnx`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from torch.fx import GraphModule

from subbyte.export.constants import LayerConstants, fix_constants_
from subbyte.export.markers import marked
from subbyte.export.onnx_file import to_file_bytes
from subbyte.export.onnx_graph import to_onnx
from subbyte.export.placement import place_, simplify_
from subbyte.export.runtimes import WeightSite
from subbyte.export.trace import Example, Simulated, trace

__all__ = ["Example", "Simulated", "fix_constants_", "marked", "place_", "simplify_", "to_file", "trace"]


def to_file(
    graph: GraphModule, example: Example, constants: Mapping[str, LayerConstants], *, compact: bool = False
) -> tuple[bytes, dict[str, WeightSite]]:
    """A graph as the bytes of an ONNX file.

    Args:
        graph: a placed graph with its constants fixed, or that of a float model.
        example: of what it takes.
        constants: of the layers, by key.
        compact: whether repeated groups of operators become functions of the file.

    Returns:
        The bytes, and where each layer is in the file, by layer name.

    Raises:
        ModelError: if the model cannot be translated.
    """
    translated = to_onnx(graph, example, constants)
    content, renamed = to_file_bytes(translated.model, compact=compact)
    file = onnx.load_from_string(content).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sites: dict[str, WeightSite] = {}
    for old, layer in translated.weights.items():
        codes = renamed[old]
        first = readers.get(codes, ())  # DequantizeLinear, behind which the layer's own operator reads; or the function that holds both
        second = [reader for node in first for reader in readers.get(node.output[0], ())]
        outputs = [output for node in (*first, *second) for output in node.output]
        known = sites.get(layer, WeightSite(codes, ()))
        sites[layer] = WeightSite(codes, (*known.outputs, *outputs))
    return content, sites
