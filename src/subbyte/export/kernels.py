"""The simulation as a runtime's kernels compute it: exact sums of codes, brought to the next grid by the runtime's own arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from subbyte.export.arithmetic import Arithmetic
from subbyte.export.constants import LayerConstants
from subbyte.export.graph_kinds import aten, grid_of, is_int8_convolution, is_quantize, key_of, source_quantizer
from subbyte.export.markers import TensorGrid


class KernelConvolution(nn.Module):
    """A convolution and the quantiser behind it, as a runtime computes them: from numbers on a grid to numbers on a grid, float64.

    Args:
        node: the convolution.
        constants: what it computes with.
        grid: of its output.
        arithmetic: the runtime's.
    """

    def __init__(self, node: Node, constants: LayerConstants, grid: TensorGrid, arithmetic: Arithmetic) -> None:
        super().__init__()
        assert constants.bias_codes is not None and constants.input_scale is not None
        self.convolve, self.settings = node.target, node.args[3:]
        self.grid, self.arithmetic = grid, arithmetic
        zero = constants.operator.per_channel(constants.zero_point, constants.codes)
        spread = (-1, *([1] * (constants.codes.dim() - 2)))
        self.step = constants.input_scale
        self.unit = (torch.tensor(constants.input_scale) * constants.scale).view(spread)
        self.bias_codes = constants.bias_codes.double().view(spread)
        self.register_buffer("codes", constants.codes.double() - zero.double())

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the output's grid.

        Args:
            x: on the input's grid, float64 (N, C, ...).
        """
        sums = self.convolve((x / self.step).round(), self.codes, None, *self.settings)
        codes = self.arithmetic.of_convolution(sums, self.bias_codes, self.unit, self.grid)
        return self.grid.scale * (codes.double() - self.grid.zero_point)


class KernelSum(nn.Module):
    """A sum of two tensors and the quantiser behind it, likewise.

    Args:
        grids: of both inputs, and of the output.
        arithmetic: the runtime's.
    """

    def __init__(self, grids: tuple[TensorGrid, TensorGrid, TensorGrid], arithmetic: Arithmetic) -> None:
        super().__init__()
        self.grids, self.arithmetic = grids, arithmetic

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Numbers of the output's grid.

        Args:
            a: on the first grid, float64, any shape.
            b: on the second grid, likewise.
        """
        first, second, grid = self.grids
        parts = [((x / one.scale).round() + one.zero_point, one) for x, one in ((a, first), (b, second))]
        codes = self.arithmetic.of_sum(parts[0], parts[1], grid)
        return grid.scale * (codes.double() - grid.zero_point)


def use_kernels_(graph: GraphModule, constants: Mapping[str, LayerConstants], arithmetic: Arithmetic) -> None:
    """Compute convolutions and sums that are quantised in front and behind as a runtime's kernels do.

    Args:
        graph: a placed graph with its constants fixed; is changed in place.
        constants: of its layers, by key.
        arithmetic: the runtime's.
    """
    made = {}
    for node in graph.graph.nodes:
        user = next(iter(node.users), None)
        if user is not None and len(node.users) == 1 and is_quantize(user):
            made[node] = _kernel(node, constants, grid_of(user), arithmetic)
    for node, module in made.items():
        if module is None:
            continue
        (user,) = node.users
        name = f"subbyte_kernel_{node.name}"
        graph.add_submodule(name, module)
        with graph.graph.inserting_after(user):
            call = graph.graph.call_module(name, node.args[: 1 if isinstance(module, KernelConvolution) else 2])
        call.meta = dict(user.meta)
        user.replace_all_uses_with(call)
        graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()


def _kernel(node: Node, constants: Mapping[str, LayerConstants], grid: TensorGrid, arithmetic: Arithmetic) -> nn.Module | None:
    """A module that computes a node and the quantiser behind it, of this grid; None if the node is neither convolution nor sum."""
    if is_int8_convolution(node):
        return KernelConvolution(node, constants[str(key_of(node))], grid, arithmetic)
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    sources = [source for arg in node.args if (source := source_quantizer(arg)) is not None]
    if len(sources) < 2:
        return None
    return KernelSum((grid_of(sources[0]), grid_of(sources[1]), grid), arithmetic)
