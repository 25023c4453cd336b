"""What an export is made of, in one place: everything here needs the packages of the extra `onnx`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from torch.fx import GraphModule

from subbyte.export.apart import keep_apart_
from subbyte.export.constants import LayerConstants, fix_constants_
from subbyte.export.graph_kinds import constant_layers
from subbyte.export.kernels import use_kernels_
from subbyte.export.layout import PLAIN, Layout
from subbyte.export.markers import marked
from subbyte.export.onnx_file import to_file_bytes
from subbyte.export.onnx_graph import to_onnx
from subbyte.export.placement import place_, simplify_
from subbyte.export.runtimes import WeightSite
from subbyte.export.symmetric_placement import place_symmetric_
from subbyte.export.targets import Target
from subbyte.export.token_rows import as_rows_
from subbyte.export.trace import Example, Simulated, trace
from subbyte.model.batches import Batch

__all__ = ["Example", "Simulated", "constant_layers", "fix_constants_", "marked", "place_for_", "to_file", "trace", "use_kernels_"]


def place_for_(graph: GraphModule, batches: Sequence[Batch], target: Target) -> int:
    """Insert the quantisers that a target needs between layers, and give its kernels the shapes that they take.

    Args:
        graph: a traced model whose layers are marked; is changed in place.
        batches: calibration samples.
        target: where the file is to run.

    Returns:
        How many quantisers with a grid of their own were added.
    """
    if target.layout.signed_codes:
        return place_symmetric_(graph, batches)
    placed = place_(graph, batches) if target.int8_between else 0
    if not target.int8_between:
        simplify_(graph)
    if target.layout.token_rows:
        as_rows_(graph)
    if target.layout.apart:
        keep_apart_(graph)
    return placed


def to_file(
    graph: GraphModule, example: Example, constants: Mapping[str, LayerConstants], layout: Layout = PLAIN
) -> tuple[bytes, dict[str, WeightSite]]:
    """A graph as the bytes of an ONNX file.

    Args:
        graph: a placed graph with its constants fixed, or that of a float model.
        example: of what it takes.
        constants: of the layers, by key.
        layout: of what the file holds.

    Returns:
        The bytes, and where each layer is in the file, by layer name.

    Raises:
        ModelError: if the model cannot be translated.
    """
    translated = to_onnx(graph, example, constants, layout)
    content, renamed = to_file_bytes(translated.model)
    file = onnx.load_from_string(content).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sites: dict[str, WeightSite] = {}
    for old, layer in translated.weights.items():
        codes = renamed[old]
        first = readers.get(codes, ())  # DequantizeLinear, behind which the layer's own operator reads
        second = [reader for node in first for reader in readers.get(node.output[0], ())]
        outputs = [output for node in (*first, *second) for output in node.output]
        known = sites.get(layer, WeightSite(codes, ()))
        sites[layer] = WeightSite(codes, (*known.outputs, *outputs))
    return content, sites
