"""Linear layers and what reads them, kept apart where ONNX Runtime would put both together in float32.

It makes an int8 kernel (QGemm) of a linear layer between DequantizeLinear and whatever follows, but not

* where a QuantizeLinear is one of several readers of the layer's output: the kernel would take it in, and leave nothing for the others;
* where a clip (ReLU, ReLU6) alone reads it, unless the QuantizeLinear behind that does all the clipping.

A maximum with the lowest number in between changes nothing, and ONNX Runtime fuses it with neither.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from subbyte.export.graph_kinds import aten, clip_of, grid_of, is_quantize, key_of


def keep_apart_(graph: GraphModule) -> None:
    """Put maxima behind linear layers with quantised inputs, where these would not run in int8 without.

    Args:
        graph: a placed graph; is changed in place.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.linear.default or key_of(node) is None or not is_quantize(node.args[0]):
            continue
        alone = len(node.users) == 1
        held = [user for user in node.users if (_is_clip_that_stays(user) if alone else is_quantize(user) or clip_of(user) is not None)]
        if held:
            between = _maximum(graph, node)
            for user in held:
                user.replace_input_with(node, between)
    graph.graph.lint()
    graph.recompile()


def _is_clip_that_stays(node: Node) -> bool:
    """Whether a node clips numbers that a quantiser, which alone reads it, would not clip as much."""
    interval = clip_of(node)
    if interval is None or len(node.users) > 1 or not is_quantize(reader := next(iter(node.users))):
        return interval is not None
    grid = grid_of(reader)
    lowest, highest = ((end - grid.zero_point) * grid.scale for end in (grid.low, grid.high))
    return lowest < interval[0] or highest > interval[1]


def _maximum(graph: GraphModule, node: Node) -> Node:
    """The larger of a node's numbers and the lowest number."""
    name = f"subbyte_lowest_{node.name}"
    graph.register_buffer(name, torch.tensor(torch.finfo(torch.float32).min))
    with graph.graph.inserting_after(node):
        constant = graph.graph.get_attr(name)
    with graph.graph.inserting_after(constant):
        made = graph.graph.call_function(aten.maximum.default, (node, constant))
    made.meta = {"val": node.meta.get("val")}
    return made
