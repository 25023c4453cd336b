"""Quantisers as TensorRT reads them: INT8 with zero-point 0, in front of layers, and on one side of residual sums.

TensorRT fuses a convolution with the ReLU and the sum that follow it if the other side of the sum is quantised, and asks for outputs of
convolutions not to be quantised of themselves. So quantisers stand

* in front of every layer with a quantised input, where they are anyway;
* at those inputs of a sum that are not a convolution's output which the sum alone reads; at the second, where both are.

Grids of 8 bits become symmetric, `q(x) = clip(round(x / s), -128, 127)`, with the step of least squared error on the calibration samples.
They are kept as unsigned codes with zero-point 128, which is the same numbers. A clip such as ReLU stays in front of its quantiser.

Source:
    NVIDIA, *Working with quantized types* and *Q/DQ placement recommendations*, TensorRT's documentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from subbyte.export.graph_kinds import aten, grid_of, is_int8_convolution, is_join, is_quantize
from subbyte.export.markers import TensorGrid, quantize
from subbyte.export.placement import grid_numbers, new_quantizer, observed, simplify_
from subbyte.model.batches import Batch

MIDDLE, TOP = 128, 127  # the code of 0.0 among 0 .. 255, and the largest beyond it
SHARES = torch.linspace(1.0, 0.3, 36)  # of the largest magnitude: where a grid may end
ANY = TensorGrid(1.0, MIDDLE, 0, 255)


def place_symmetric_(graph: GraphModule, batches: Sequence[Batch]) -> int:
    """Make all 8-bit grids symmetric, and quantise one side of residual sums.

    Args:
        graph: a traced model whose layers are marked; is changed in place.
        batches: calibration samples.

    Returns:
        How many quantisers with a grid of their own were added.
    """
    simplify_(graph, move=False)
    added = _residuals(graph)
    for source, sums in added.items():
        with graph.graph.inserting_after(source):
            quantizer = new_quantizer(graph, source, ANY)
        for node in sums:
            node.replace_input_with(source, quantizer)
    quantizers = [node for node in graph.graph.nodes if is_quantize(node) and grid_of(node).is_8_bit]
    sources = list(dict.fromkeys(node.all_input_nodes[0] for node in quantizers))
    values = observed(graph, sources, batches)
    grids = {source: symmetric_grid(values[source]) for source in sources}
    for node in quantizers:
        source = node.all_input_nodes[0]
        node.args = (source, *grid_numbers(grids[source]))
    simplify_(graph, move=False)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return len(added)


def symmetric_grid(values: Tensor) -> TensorGrid:
    """The symmetric 8-bit grid with the least squared error.

    Args:
        values: float32 (N,).

    Example:
        >>> symmetric_grid(torch.tensor([-127.0, 3.0])).zero_point, symmetric_grid(torch.tensor([-127.0, 3.0])).scale
        (128, 1.0)
    """
    largest = float(values.abs().amax()) or 1.0
    grids = [TensorGrid(float(share * largest / TOP), MIDDLE, 0, 255) for share in SHARES]
    errors = [float((quantize(values, g.scale, g.zero_point, g.low, g.high) - values).square().sum()) for g in grids]
    return grids[errors.index(min(errors))]


def _residuals(graph: GraphModule) -> dict[Node, list[Node]]:
    """What sums read that they cannot be fused with, where a quantized convolution is on the other side; and these sums."""
    found: dict[Node, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.target is not aten.add.Tensor or not is_join(node):
            continue
        sides = list(dict.fromkeys(node.all_input_nodes))
        fused = [side for side in sides if is_int8_convolution(side) and len(side.users) == 1]
        for side in sides if fused else ():
            if side is not fused[0] and not is_quantize(side):
                found.setdefault(side, []).append(node)
    return found
