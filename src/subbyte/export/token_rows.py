"""Tokens as rows: between attention products every token is computed by itself, so that (N, T, C) may as well be (N T, C).

A runtime adds the bias of a linear layer in the int8 kernel itself where the layer's input has two dimensions (Gemm), and in a step of its
own where it has three (MatMul, Add); with few tokens an encoder's time goes into such steps. Reshaping costs next to nothing, and is what
attention does around its products in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from subbyte.export.graph_kinds import aten, clip_of, is_float, is_quantize, key_of

TOKEN_DIMENSIONS = 3  # samples, tokens, channels
ALONE = {aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default}
TOGETHER = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def as_rows_(graph: GraphModule) -> None:
    """Let layers with quantised inputs, and what is computed of each token by itself around them, work on (N T, C).

    Args:
        graph: a placed graph; is changed in place.
    """
    for part in _parts(graph):
        sizes = _sizes(graph, part[0])
        if sizes is not None:
            _flatten_(graph, part, sizes)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _parts(graph: GraphModule) -> list[list[Node]]:
    """Connected nodes that compute each token by itself, in running order; parts without a layer are left out."""
    able = [node for node in graph.graph.nodes if _is_able(node)]
    part_of: dict[Node, list[Node]] = {}
    for node in able:
        joined = {id(part_of[source]): part_of[source] for source in node.all_input_nodes if source in part_of}
        part = [other for part in joined.values() for other in part] + [node]
        part_of |= dict.fromkeys(part, part)
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    parts = [sorted(part, key=position.__getitem__) for part in {id(part): part for part in part_of.values()}.values()]
    return [part for part in parts if any(key_of(node) is not None for node in part)]


def _is_able(node: Node) -> bool:
    """Whether a node gives (N, T, C), and computes each token of it from that token alone."""
    if node.op != "call_function" or not is_float(node) or node.meta["val"].dim() != TOKEN_DIMENSIONS:
        return False
    if key_of(node) is not None:
        return node.target is aten.linear.default and isinstance(node.args[0], Node) and is_quantize(node.args[0])
    if node.target is aten.layer_norm.default:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target in TOGETHER:
        return not node.kwargs and all(_fits(arg, node.meta["val"]) for arg in node.args)
    return node.target in ALONE or is_quantize(node) or clip_of(node) is not None


def _fits(operand: object, result: Tensor) -> bool:
    """Whether an operand is of the result's shape, or the same for every token."""
    if not isinstance(operand, Node):
        return isinstance(operand, (int, float))
    value = operand.meta.get("val")
    if value is None:  # a parameter
        value = getattr(operand.graph.owning_module, str(operand.target), None) if operand.op == "get_attr" else None
    return isinstance(value, Tensor) and (value.dim() <= 1 or tuple(map(str, value.shape)) == tuple(map(str, result.shape)))


def _sizes(graph: GraphModule, node: Node) -> list[Any] | None:
    """N and T of a node's output, numbers or nodes that give them; None where no input of the model has them."""
    found: list[Any] = []
    inputs = [one for one in graph.graph.nodes if one.op == "placeholder" and isinstance(one.meta.get("val"), Tensor)]
    for size in node.meta["val"].shape[:2]:
        if not isinstance(size, SymInt):
            found.append(size)
            continue
        places = ((one, dim) for one in inputs for dim, other in enumerate(one.meta["val"].shape) if str(other) == str(size))
        if (place := next(places, None)) is None:
            return None
        with graph.graph.inserting_after(inputs[-1]):
            made = graph.graph.call_function(aten.sym_size.int, place)
        made.meta = {"val": size}
        found.append(made)
    return found


def _flatten_(graph: GraphModule, part: Sequence[Node], sizes: Sequence[Any]) -> None:
    """Reshape what enters a part, and what leaves it to be read as it was."""
    inside, rows = set(part), {}
    for node in part:
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if source in inside or not isinstance(value, Tensor) or value.dim() != TOKEN_DIMENSIONS:
                continue
            if source not in rows:
                rows[source] = _as_rows(graph, source, inside)
            node.replace_input_with(source, rows[source])
    for node in part:
        channels = node.meta["val"].shape[-1]
        outside = [user for user in node.users if user not in inside and user.target not in RESHAPES]
        if outside:
            with graph.graph.inserting_after(node):
                whole = graph.graph.call_function(aten.reshape.default, (node, [*sizes, channels]))
            whole.meta = {"val": node.meta["val"]}
            for user in outside:
                user.replace_input_with(node, whole)
        node.meta = {**node.meta, "val": node.meta["val"].reshape(-1, channels)}


def _as_rows(graph: GraphModule, source: Node, inside: Iterable[Node]) -> Node:
    """A node's output as (N T, C); where it is a reshaped one that nothing else reads, what was reshaped."""
    value = source.meta["val"]
    origin = source.args[0] if source.target in RESHAPES and set(source.users) <= set(inside) else source
    with graph.graph.inserting_after(source):
        made = graph.graph.call_function(aten.reshape.default, (origin, [-1, value.shape[-1]]))
    made.meta = {"val": value.reshape(-1, value.shape[-1])}
    return made
