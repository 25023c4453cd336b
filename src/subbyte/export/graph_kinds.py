"""What the nodes of a traced graph do to a tensor that lies on a grid.

* a **clip** (ReLU, ReLU6, clamp) commutes with a quantiser, whose codes are clipped instead;
* a **copy** (max-pooling, reshaping, slicing, padding with zeros) gives numbers that were there before, so they stay on their grid;
* a **join** (sum, concatenation, average) makes new numbers; a runtime computes it in int8 if its inputs and its output are quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from subbyte.export.markers import TensorGrid

aten = torch.ops.aten
QUANTIZE, WEIGHT, BIAS = torch.ops.subbyte.quantize.default, torch.ops.subbyte.weight.default, torch.ops.subbyte.bias.default
CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
MAX_POOLS = {  # dimensions, with those of samples and channels
    aten.max_pool1d.default: 3,
    aten.max_pool2d.default: 4,
    aten.max_pool3d.default: 5,
}
COPIES = PADS | {
    *MAX_POOLS,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
}
ASSERTIONS = {aten._assert_tensor_metadata.default}
EVERYTHING = 1 << 62  # the end of a slice that has none


def is_quantize(node: Node) -> bool:
    """Whether a node is a quantiser.

    Args:
        node: of a traced graph.
    """
    return node.target is QUANTIZE


def grid_of(node: Node) -> TensorGrid:
    """The grid of a quantiser.

    Args:
        node: a quantiser.
    """
    return TensorGrid(*node.args[1:])  # type: ignore[arg-type]


def key_of(node: Node) -> str | None:
    """Key of the layer that a node computes; None if it is no layer.

    Args:
        node: of a traced graph.
    """
    if node.op == "call_function" and len(node.args) > 1 and isinstance(node.args[1], Node) and node.args[1].target is WEIGHT:
        return str(node.args[1].args[1])
    return None


def constant_layers(graph: GraphModule) -> set[str]:
    """Names of the layers that see nothing of what the graph is given, as those that make a bias of the distances between positions: a
    runtime computes what they return once, when it loads the file.

    Args:
        graph: a traced model whose layers are marked.
    """
    given: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not given.isdisjoint(node.all_input_nodes):
            given.add(node)
    weights = [node for node in graph.graph.nodes if node.target is WEIGHT]
    varying = {str(node.args[1]) for node in weights if not given.isdisjoint(node.users)}
    return {str(node.args[1]) for node in weights} - varying


def table_of(node: Node) -> str | None:
    """Key of the table that a node looks rows up in; None if it does something else.

    Args:
        node: of a traced graph.
    """
    if node.target is aten.embedding.default and isinstance(node.args[0], Node) and node.args[0].target is WEIGHT:
        return str(node.args[0].args[1])
    return None


def input_quantizer(node: Node) -> Node | None:
    """The quantiser of a layer's input, perhaps behind padding; None if the input is not quantised.

    Args:
        node: that computes a layer.
    """
    return source_quantizer(node.args[0])


def source_quantizer(source: object) -> Node | None:
    """The quantiser whose numbers arrive somewhere, perhaps through padding and other copies; None if there is none.

    Args:
        source: what is read there, a node or a number.
    """
    while isinstance(source, Node) and is_copy(source):
        source = source.args[0]
    return source if isinstance(source, Node) and is_quantize(source) else None


def is_int8_convolution(node: Node) -> bool:
    """Whether a node computes a quantized convolution with a quantised input, for which runtimes have an int8 kernel.

    Args:
        node: of a traced graph.
    """
    return node.target in CONVOLUTIONS and key_of(node) is not None and input_quantizer(node) is not None


def clip_of(node: Node) -> tuple[float, float] | None:
    """The interval to which a node clips its input; None if it does something else.

    Args:
        node: of a traced graph.
    """
    args: list[Any] = [*node.args[1:], None, None]
    if any(isinstance(arg, Node) for arg in args) or node.kwargs:
        return None
    intervals: dict[Any, tuple[Any, Any]] = {
        aten.relu.default: (0.0, None),
        aten.relu6.default: (0.0, 6.0),
        aten.hardtanh.default: (-1.0 if args[0] is None else args[0], 1.0 if args[1] is None else args[1]),
        aten.clamp.default: (args[0], args[1]),
        aten.clamp_min.default: (args[0], None),
        aten.clamp_max.default: (None, args[0]),
    }
    if node.target not in intervals:
        return None
    low, high = intervals[node.target]
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def is_copy(node: Node) -> bool:
    """Whether a node gives numbers of its input, and zeros.

    Args:
        node: of a traced graph.
    """
    if node.target not in COPIES:
        return False
    if node.target is aten.pad.default:
        mode, value = ([*node.args[2:], "constant", None] if len(node.args) < 3 else [*node.args[2:], None])[:2]
        return mode != "constant" or not value
    return node.target is not aten.constant_pad_nd.default or len(node.args) < 3 or not node.args[2]


def is_join(node: Node) -> bool:
    """Whether a node makes new numbers out of one or several tensors by adding or concatenating them.

    Args:
        node: of a traced graph.
    """
    if node.target is aten.add.Tensor:
        return not node.kwargs and all(isinstance(arg, Node) and arg.op != "get_attr" and is_float(arg) for arg in node.args)
    return node.target in (aten.cat.default, aten.avg_pool2d.default)


def is_float(node: Node) -> bool:
    """Whether a node gives a float32 tensor.

    Args:
        node: of a traced graph.
    """
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def is_no_op(node: Node) -> bool:
    """Whether a node gives its input as it is: a slice of everything, a copy in memory.

    Args:
        node: of a traced graph.
    """
    if node.target in (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default):
        return True
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target is not aten.slice.Tensor:
        return False
    given: list[Any] = [*node.args[2:], None, None, None]
    start, end, step = given[0], given[1], given[2] or 1
    return bool(not start and (end is None or (isinstance(end, int) and end >= EVERYTHING)) and step == 1)


def readers(node: Node) -> Iterator[Node]:
    """What reads a node's numbers, directly or through copies.

    Args:
        node: of a traced graph.
    """
    for user in node.users:
        if is_copy(user):
            yield from readers(user)
        else:
            yield user


def head(node: Node) -> Node:
    """The last of the clips that alone read a node, or the node itself.

    Args:
        node: of a traced graph.
    """
    while len(node.users) == 1 and clip_of(user := next(iter(node.users))) is not None:
        node = user
    return node
