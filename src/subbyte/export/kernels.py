"""The simulation as a runtime's kernels compute it: exact sums of codes, brought to the next grid by the runtime's own arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from subbyte.export.arithmetic import Arithmetic
from subbyte.export.constants import LayerConstants
from subbyte.export.graph_kinds import aten, grid_of, is_int8_convolution, is_quantize, key_of, source_quantizer
from subbyte.export.markers import TensorGrid


class KernelQuantizer(nn.Module):
    """A quantiser, as a runtime computes it in float32.

    Args:
        grid: its grid.
        arithmetic: the runtime's.
    """

    def __init__(self, grid: TensorGrid, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.grid, self.arithmetic = grid, arithmetic

    def forward(self, x: Tensor) -> Tensor:
        """Numbers of the grid, float64.

        Args:
            x: float64, any shape.
        """
        return self.grid.scale * (self.arithmetic.of_real(x.float(), self.grid).double() - self.grid.zero_point)


class KernelConvolution(nn.Module):
    """A convolution and the quantiser behind it, as a runtime computes them: from numbers on a grid to numbers on a grid, float64.

    Args:
        node: the convolution.
        constants: what it computes with.
        grid: of its output.
        arithmetic: the runtime's.
        rounded: to the grid; otherwise numbers are only clipped to its ends.
    """

    def __init__(self, node: Node, constants: LayerConstants, grid: TensorGrid, arithmetic: Arithmetic, *, rounded: bool = True) -> None:
        super().__init__()
        assert constants.bias_codes is not None and constants.input_scale is not None
        self.convolve: Any = node.target
        self.settings = node.args[3:]
        self.grid, self.arithmetic, self.rounded = grid, arithmetic, rounded
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
        codes = self.arithmetic.of_convolution(sums, self.bias_codes, self.unit, self.grid, rounded=self.rounded)
        return self.grid.scale * (codes.double() - self.grid.zero_point)


class KernelSum(nn.Module):
    """A sum of two tensors and the quantiser behind it, likewise.

    Args:
        grids: of both inputs, and of the output.
        arithmetic: the runtime's.
        fused: index of the input that is a convolution with which the sum is fused; None: both lie on their grids.
    """

    def __init__(self, grids: tuple[TensorGrid, TensorGrid, TensorGrid], arithmetic: Arithmetic, fused: int | None) -> None:
        super().__init__()
        self.grids, self.arithmetic, self.fused = grids, arithmetic, fused

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Numbers of the output's grid.

        Args:
            a: on the first grid, float64, any shape.
            b: on the second grid, float64, the shape of `a`.
        """
        grid = self.grids[2]
        steps = [x / one.scale for x, one in zip((a, b), self.grids, strict=False)]
        whole = [x if index == self.fused else x.round() for index, x in enumerate(steps)]
        first, second = ((x + one.zero_point, one) for x, one in zip(whole, self.grids, strict=False))
        codes = self.arithmetic.of_sum(second, first, grid) if self.fused == 1 else self.arithmetic.of_sum(first, second, grid)
        return grid.scale * (codes.double() - grid.zero_point)


def use_kernels_(graph: GraphModule, constants: Mapping[str, LayerConstants], arithmetic: Arithmetic) -> None:
    """Compute quantisers, and the convolutions and sums between them, as a runtime's kernels do.

    Args:
        graph: a placed graph with its constants fixed; is changed in place.
        constants: of its layers, by key.
        arithmetic: the runtime's.
    """
    quantizers = [node for node in graph.graph.nodes if is_quantize(node)]
    made = {node: _kernel(node, constants, arithmetic) for node in quantizers}  # before the first of them is replaced
    for node, module in made.items():
        source = node if isinstance(module, KernelQuantizer) else node.args[0]
        inputs = source.args[: 2 if isinstance(module, KernelSum) else 1]  # as they are now: kernels, where there were quantisers
        name = f"subbyte_kernel_{node.name}"
        graph.add_submodule(name, module)
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(name, inputs)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()


def _kernel(quantizer: Node, constants: Mapping[str, LayerConstants], arithmetic: Arithmetic) -> nn.Module:
    """A module for a quantiser, together with the convolution or sum that it alone reads."""
    node, grid = quantizer.args[0], grid_of(quantizer)
    assert isinstance(node, Node)
    if is_int8_convolution(node) and len(node.users) == 1:
        rounded = not arithmetic.fuses_sums or not any(_fused(user) == quantizer for user in quantizer.users)
        return KernelConvolution(node, constants[str(key_of(node))], grid, arithmetic, rounded=rounded)
    sources = _summands(node) if len(node.users) == 1 else ()
    if len(sources) < 2:
        return KernelQuantizer(grid, arithmetic)
    fused = _fused(node) if arithmetic.fuses_sums else None
    index = None if fused is None else list(node.args).index(fused)
    return KernelSum((grid_of(sources[0]), grid_of(sources[1]), grid), arithmetic, index)


def _summands(node: Node) -> tuple[Node, ...]:
    """The quantisers whose numbers a node adds up; none if it is no such sum."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return ()
    return tuple(source for arg in node.args if (source := source_quantizer(arg)) is not None)


def _fused(node: Node) -> Node | None:
    """The quantiser of a convolution with which a runtime may fuse a sum, the first of them if there are two."""
    if len(_summands(node)) < 2 or len(node.users) > 1 or not is_quantize(next(iter(node.users))):
        return None
    for arg in node.args:
        if is_quantize(arg) and len(arg.users) == 1 and is_int8_convolution(arg.args[0]) and len(arg.args[0].users) == 1:  # type: ignore[arg-type,union-attr]
            return arg  # type: ignore[return-value]
    return None
