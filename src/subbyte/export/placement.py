"""Which tensors between layers are quantised, so that a runtime stays in int8, and the same quantisers in the simulation.

A runtime's convolution runs in int8 only if its output is quantised, a sum only if both its inputs and its output are. So a tensor gets an
8-bit quantiser if it is

* the output of a quantized convolution, behind the ReLU that follows it;
* an input or the output of a join (sum, concatenation, average) of such tensors that in the end feeds a quantized layer.

One tensor has one grid. Where everything that reads it has the same grid already (one layer, perhaps behind max-pooling; layers behind a
concatenation), it is that grid, and nothing changes in the numbers. Else the 8-bit grid with the least squared error on the calibration
samples is chosen, those of the reading layers being among the candidates, and layers with 8-bit inputs take it over. So it is for any
other tensor that several layers with 8-bit inputs read, as query, key and value of attention do: it is quantised once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from subbyte.export.graph_kinds import (
    ASSERTIONS,
    MAX_POOLS,
    PADS,
    QUANTIZE,
    aten,
    clip_of,
    grid_of,
    head,
    is_copy,
    is_int8_convolution,
    is_join,
    is_no_op,
    is_quantize,
    readers,
)
from subbyte.export.markers import TensorGrid, quantize
from subbyte.model.batches import Batch, call
from subbyte.quantizers.affine import scale_and_zero_point
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import LeastOutputError

MOST_VALUES = 1 << 18  # of a tensor, by which its grid is chosen


@dataclass(eq=False)
class _Choice:
    """The grid of a tensor: `grid` once it is known, `candidates` until then."""

    grid: TensorGrid | None
    candidates: tuple[TensorGrid, ...] = ()
    following: list[Node] = field(default_factory=list)  # 8-bit quantisers of layers that take it over


def place_(graph: GraphModule, batches: Sequence[Batch]) -> int:
    """Insert the quantisers that keep the graph in int8.

    Args:
        graph: a traced model whose layers are marked; is changed in place.
        batches: calibration samples.

    Returns:
        How many quantisers with a grid of their own were added.
    """
    simplify_(graph)
    points = _points(graph)
    choices = _choices(points)
    shared = _shared(graph, points)
    open_points = [node for node in points if choices[node].grid is None]
    values = observed(graph, [*open_points, *shared], batches)
    for node in open_points:
        if choices[node].grid is None:  # a concatenation's inputs share its choice
            choices[node].grid = _tightened(_least_error(values[node], choices[node].candidates), node)
    for node in points:
        _insert_(graph, node, choices[node])
    for node, quantizers in shared.items():
        grid = _least_error(values[node], [grid_of(quantizer) for quantizer in quantizers])
        for quantizer in quantizers:
            quantizer.args = (node, *grid_numbers(grid))
    _do_once_(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return len({id(choices[node]) for node in open_points})


def simplify_(graph: GraphModule, *, move: bool = True) -> None:
    """Drop nodes that do nothing, pool in front of concatenations and quantise in front of zero padding instead of behind them, and do
    nothing twice: all of it gives the same.

    Args:
        graph: a traced model; is changed in place.
        move: whether quantisers are moved; otherwise they stay in front of their layers.
    """
    for node in list(graph.graph.nodes):
        if node.target in ASSERTIONS:
            graph.graph.erase_node(node)
        elif node.op == "call_function" and is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):  # the copy in memory that made a view possible may be gone
            node.target = aten.reshape.default
    _pool_in_front_(graph)
    for node in list(graph.graph.nodes) if move else ():
        if is_quantize(node) and (pad := node.args[0]).target in PADS and is_copy(pad) and len(pad.users) == 1:
            with graph.graph.inserting_before(pad):
                moved = new_quantizer(graph, pad.args[0], grid_of(node))
            pad.replace_input_with(pad.args[0], moved)
            node.replace_all_uses_with(pad)
            graph.graph.erase_node(node)
    _do_once_(graph)
    graph.recompile()


def _do_once_(graph: GraphModule) -> None:
    """Let what is done alike to the same tensor be done once."""
    first: dict[object, Node] = {}
    for node in list(graph.graph.nodes):
        if (what := _repeatable(graph, node)) is not None and (other := first.setdefault(what, node)) is not node:
            node.replace_all_uses_with(other)
            graph.graph.erase_node(node)


def _repeatable(graph: GraphModule, node: Node) -> object:
    """What a node does, to be compared, if it is of those that several layers do alike with what they read: quantise, scale."""
    if is_quantize(node):
        return node.args
    if node.target is aten.mul.Tensor and isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
        vector = operator.attrgetter(str(node.args[1].target))(graph)
        return (node.args[0], *vector.tolist()) if vector.dim() == 1 else None
    return None


def _pool_in_front_(graph: GraphModule) -> None:
    """Max-pooling in front of the concatenation along the channels that it alone reads: fewer numbers are copied, and they are the same."""
    for node in list(graph.graph.nodes):
        if node.target not in MAX_POOLS or node.args[0].target is not aten.cat.default or len(node.args[0].users) > 1:
            continue
        joined, whole = node.args[0], node.meta["val"]
        parts, dim = joined.args[0], [*joined.args[1:], 0][0]
        if whole.dim() != MAX_POOLS[node.target] or dim % whole.dim() != 1:
            continue
        with graph.graph.inserting_before(joined):
            pooled = [graph.graph.call_function(node.target, (part, *node.args[1:]), node.kwargs) for part in parts]
        for part, one in zip(parts, pooled, strict=True):
            one.meta["val"] = whole.narrow(1, 0, part.meta["val"].shape[1])
        joined.args, joined.meta = (pooled, *joined.args[1:]), dict(node.meta)
        node.replace_all_uses_with(joined)
        graph.graph.erase_node(node)


def _points(graph: GraphModule) -> list[Node]:
    """Nodes whose output is to lie on a grid, in running order."""
    nodes = [node for node in graph.graph.nodes if node.op in ("call_function", "placeholder")]
    born: set[Node] = set()  # what a quantized convolution computed, and what was made of that
    for node in nodes:
        passes_on = clip_of(node) is not None or is_copy(node) or is_join(node) or is_quantize(node)
        if is_int8_convolution(node) or passes_on and any(source in born for source in node.all_input_nodes):
            born.add(node)
    wanted: set[Node] = set()  # what a quantized layer reads in the end
    for node in reversed(nodes):
        if any(is_quantize(user) or user in wanted and (is_copy(user) or clip_of(user) or is_join(user)) for user in node.users):
            wanted.add(node)
    joins = [node for node in nodes if is_join(node) and node in born and node in wanted]
    found = {head(node) for node in nodes if is_int8_convolution(node)} | {head(node) for node in joins}
    found |= {_source(node) for join in joins for node in join.all_input_nodes}
    return [node for node in nodes if node in found and not is_quantize(node)]


def _shared(graph: GraphModule, points: Sequence[Node]) -> dict[Node, list[Node]]:
    """Other nodes whose output several layers read on 8-bit grids of their own, with the quantisers of these."""
    chosen = set(points)
    quantizers = {node: [user for user in node.users if is_quantize(user) and grid_of(user).is_8_bit] for node in graph.graph.nodes}
    return {node: some for node, some in quantizers.items() if len(some) > 1 and node not in chosen}


def _source(node: Node) -> Node:
    """The node whose numbers a chain of copies passes on."""
    while is_copy(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _choices(points: Sequence[Node]) -> dict[Node, _Choice]:
    """For every point what its grid is, or among which it is to be chosen; from the last one back, as a reader's grid comes first."""
    choices: dict[Node, _Choice] = {}
    for node in reversed(points):
        own = [user for user in readers(node) if is_quantize(user)]
        others = [user for user in readers(node) if not is_quantize(user)]
        grids = list(dict.fromkeys(grid_of(user) for user in own))
        joined = {id(choice): choice for user in others if (choice := _concatenated(user, choices))}
        if own and len(grids) == 1 and not others:
            choice = _Choice(grids[0])
        elif not own and len(joined) == 1 and all(_concatenated(user, choices) for user in others):
            choices[node] = next(iter(joined.values()))
            continue
        else:
            choice = _Choice(None, tuple(grid for grid in grids if grid.is_8_bit))
        choice.following = [user for user in own if grid_of(user).is_8_bit]
        if choice.grid is not None:
            choice.grid = _tightened(choice.grid, node)
        choices[node] = choice
    return choices


def _concatenated(node: Node, choices: dict[Node, _Choice]) -> _Choice | None:
    """The choice for the output of a concatenation: quantising its inputs on that grid loses nothing."""
    return choices.get(head(node)) if node.target is torch.ops.aten.cat.default else None


def _tightened(grid: TensorGrid, node: Node) -> TensorGrid:
    """An 8-bit grid that reaches past what the node, a clip such as ReLU6, lets through, shrunk to it: its step is finer, and the runtime
    needs no clip."""
    interval = clip_of(node)
    if interval is None or not grid.is_8_bit or grid.zero_point != 0 or interval[0] != 0.0 or grid.clipped(*interval).high == grid.high:
        return grid
    return replace(grid, scale=float(torch.tensor(interval[1] / grid.high)))


def observed(graph: GraphModule, nodes: Iterable[Node], batches: Sequence[Batch]) -> dict[Node, Tensor]:
    """Values of some nodes over the batches, a sample of them and both ends.

    Args:
        graph: a traced model.
        nodes: of it.
        batches: calibration samples.

    Returns:
        float32 (N,) for each node.
    """
    recorders = {node: _Recorder(max(1, MOST_VALUES // len(batches))) for node in nodes}
    if not recorders:
        return {}
    calls = []
    for index, (node, recorder) in enumerate(recorders.items()):
        graph.add_submodule(f"recorder_{index}", recorder)
        with graph.graph.inserting_after(node):
            calls.append(graph.graph.call_module(f"recorder_{index}", (node,)))
    graph.recompile()
    with torch.no_grad():
        for batch in batches:
            call(graph, batch)
    for node in calls:
        graph.graph.erase_node(node)
        graph.delete_submodule(str(node.target))
    graph.recompile()
    return {node: torch.cat(recorder.seen) for node, recorder in recorders.items()}


class _Recorder(nn.Module):
    """Keeps a sample of the values that it is given, and both ends."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.each = each
        self.seen: list[Tensor] = []

    def forward(self, value: Tensor) -> None:
        flat = value.flatten()
        step = max(1, flat.numel() // self.each) | 1  # odd, so that it does not stay in one column of an image
        self.seen.append(torch.cat([flat[::step], flat.amin()[None], flat.amax()[None]]))


def _least_error(values: Tensor, candidates: Sequence[TensorGrid]) -> TensorGrid:
    """The 8-bit grid with the least squared error; values (N,)."""
    lows, highs = LeastOutputError().candidates(values[None])
    scales, zero_points = scale_and_zero_point(lows[:, 0], highs[:, 0], Grid(8))
    grids = [*candidates, *(TensorGrid.of(s, z, Grid(8)) for s, z in zip(scales, zero_points, strict=True))]
    errors = [float((quantize(values, g.scale, g.zero_point, g.low, g.high) - values).square().sum()) for g in grids]
    return grids[errors.index(min(errors))]


def _insert_(graph: GraphModule, node: Node, choice: _Choice) -> None:
    """Quantise a node's output, hand the grid on to what follows, and fold the clip that the node is."""
    assert choice.grid is not None
    for user in choice.following:
        user.args = (user.args[0], *grid_numbers(choice.grid))
    with graph.graph.inserting_after(node):
        quantizer = new_quantizer(graph, node, choice.grid)
    node.replace_all_uses_with(quantizer, lambda user: user is not quantizer)
    _spread_(graph, quantizer)
    while (interval := clip_of(node)) is not None and len(node.users) == 1:
        quantizer.args = (node.args[0], *grid_numbers(grid_of(quantizer).clipped(*interval)))
        source = node.args[0]
        graph.graph.erase_node(node)
        assert isinstance(source, Node)
        node = source


def _spread_(graph: GraphModule, quantizer: Node) -> None:
    """Repeat a quantiser behind copies of its output, and drop those behind it with the same grid."""
    for user in list(quantizer.users):
        if is_quantize(user) and grid_of(user) == grid_of(quantizer):
            user.replace_all_uses_with(quantizer)
            graph.graph.erase_node(user)
        elif is_copy(user) and any(is_quantize(reader) or is_join(reader) for reader in readers(user)):
            with graph.graph.inserting_after(user):
                repeated = new_quantizer(graph, user, grid_of(quantizer))
            user.replace_all_uses_with(repeated, lambda other, repeated=repeated: other is not repeated)  # type: ignore[misc]
            _spread_(graph, repeated)


def new_quantizer(graph: GraphModule, source: Node, grid: TensorGrid) -> Node:
    """A quantiser, where the graph inserts.

    Args:
        graph: a traced model.
        source: what it reads.
        grid: its grid.
    """
    made = graph.graph.call_function(QUANTIZE, (source, *grid_numbers(grid)))
    made.meta = {"val": source.meta.get("val")}
    return made


def grid_numbers(grid: TensorGrid) -> tuple[float, int, int, int]:
    """A grid as a quantiser's arguments.

    Args:
        grid: of a tensor.
    """
    return grid.scale, grid.zero_point, grid.low, grid.high
