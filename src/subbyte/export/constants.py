"""Weights and biases as a file holds them: codes, and biases as whole numbers of steps, put into the simulation as well.

    W = s_w (Q - z_w)      b = s_x s_w round(b / (s_x s_w))      in int32, the unit in which an int8 kernel accumulates

With a step for each column group there is no such unit, and no int8 kernel: biases stay in float32. So do those of linear layers over
sequences: torch.onnx makes them a sum of its own behind the matrix product.

A channel whose step is so small that its bias does not fit (a channel that is all but dead) gets a larger step: `s_w = |b| / (2^30 s_x)`,
codes rounded to it. What its weights contributed is less than a 2^-23 of the bias for each input.

Convolutions between quantisers get constants of 16 bits each: steps with the 11 significant bits of float16, and in each block of 16
channels biases that are multiples of the least `2^k` with which the largest fits into int16. Where `2^k s_x s_w` is more than half a
step of the output, as 8 bits have it, both stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from subbyte.errors import LayerError
from subbyte.export.graph_kinds import BIAS, grid_of, input_quantizer, is_int8_convolution, is_quantize, key_of, table_of
from subbyte.export.markers import MarkedModel, TensorGrid
from subbyte.model.operators import Convolution, Operator
from subbyte.model.quantized_layer import QuantizedState
from subbyte.quantizers.affine import dequantize
from subbyte.quantizers.grid import MAX_BITS, Grid

LARGEST_BIAS = 1 << 30  # steps; half of what int32 holds is left to the products
STEP_BITS = 11  # significant ones, as in float16
BIAS_BLOCK, BIAS_TOP = 16, (1 << 15) - 1  # channels, and the largest number in int16
COARSEST, LEVELS = 0.5, 255  # what biases may be multiples of, in 255ths of what the output's grid spans


@dataclass(frozen=True, eq=False)
class LayerConstants:
    """What one call of a layer computes with.

    Args:
        layer: its name.
        operator: its arithmetic.
        grid: of the weight codes.
        codes: `Q`, int16, the layer's weight shape.
        scale: `s_w`, float32 (C_out,), or with column groups (C_out, K).
        zero_point: `z_w`, int32, the shape of `scale`.
        bias: `b`, float32 (C_out,); zeros where the layer has none.
        bias_codes: int32 (C_out,), in units of `s_x s_w`; None where the input is not quantised, steps are those of column groups, or the
            bias is added behind the kernel.
        input_scale: `s_x`; None where the input is not quantised.
        short: whether steps and biases are numbers of 16 bits.
    """

    layer: str
    operator: Operator
    grid: Grid
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    bias_codes: Tensor | None
    input_scale: float | None
    short: bool = False

    def weight(self) -> Tensor:
        """`W`, float32, the layer's weight shape."""
        return QuantizedState(self.codes, self.scale, self.zero_point, self.bias, self.grid, None).weight(self.operator)

    def rounded_bias(self) -> Tensor:
        """`b` as it is computed with: whole numbers of steps, or as it is; float32 (C_out,)."""
        if self.bias_codes is None or self.input_scale is None:
            return self.bias
        return self.bias_codes.float() * (torch.tensor(self.input_scale) * self.scale)


def fix_constants_(graph: GraphModule, marked: MarkedModel) -> dict[str, LayerConstants]:
    """Round the biases of a placed graph, and give every call of a layer constants of its own, by a new key.

    Args:
        graph: a traced model; its weights and biases are changed in place.
        marked: what it was traced from.

    Returns:
        Constants by key, in running order; the weight's and bias's markers carry the keys.

    Raises:
        LayerError: if a layer's weight is not where it is looked for.
    """
    found: dict[str, LayerConstants] = {}
    calls = [(node, layer) for node in graph.graph.nodes if (layer := key_of(node) or table_of(node)) is not None]
    for index, (node, layer) in enumerate(calls):
        key = str(index)
        multiplies = marked.operators[layer].multiplies
        quantizer = input_quantizer(node) if multiplies else None
        scale = None if quantizer is None else grid_of(quantizer).scale
        constants = _unrounded(layer, marked.operators[layer], marked.states[layer], scale)
        if scale is not None and constants.grid.group is None and (marked.is_convolution(layer) or node.meta["val"].dim() == 2):
            constants = _with_whole_bias(constants, scale)
        readers = list(node.users)
        if is_int8_convolution(node) and len(readers) == 1 and is_quantize(readers[0]) and constants.bias_codes is not None:
            constants = _shortened(constants, constants.bias_codes, grid_of(readers[0]))
        weight = node.args[1 if multiplies else 0]
        bias = node.args[2] if multiplies and len(node.args) > 2 else None
        if not isinstance(weight, Node) or (multiplies and not (isinstance(bias, Node) and bias.target is BIAS)):
            raise LayerError(layer, "was traced to something else than torch's own operator; exclude it to export the model")
        _give_(graph, node, weight, constants.weight(), key)
        if isinstance(bias, Node):
            _give_(graph, node, bias, constants.rounded_bias(), key)
        found[key] = constants
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return found


def unsigned(constants: LayerConstants) -> LayerConstants:
    """Weights of 8 bits that an int8 kernel multiplies, as UINT8 with zero-point 128: the same numbers. Others as they are.

    Args:
        constants: of a layer.
    """
    operator, grid = constants.operator, constants.grid
    transposed = isinstance(operator, Convolution) and operator.transposed
    if grid.bits != MAX_BITS or not grid.symmetric or constants.input_scale is None or grid.group is not None or transposed:
        return constants
    middle = 1 << (MAX_BITS - 1)
    zero_point = torch.full_like(constants.zero_point, middle)
    return replace(constants, grid=replace(grid, symmetric=False), codes=constants.codes + middle, zero_point=zero_point)


def _give_(graph: GraphModule, node: Node, marker: Node, value: Tensor, key: str) -> None:
    """Let a node read a constant of its own where it read a marker, behind a marker with its own key."""
    buffer = f"subbyte_{'bias' if marker.target is BIAS else 'weight'}_{key}"
    graph.register_buffer(buffer, value)
    with graph.graph.inserting_before(marker):
        source = graph.graph.get_attr(buffer)
        source.meta = {"val": marker.meta.get("val")}
        made = graph.graph.call_function(marker.target, (source, key))  # type: ignore[arg-type]
        made.meta = dict(marker.meta)
    node.replace_input_with(marker, made)


def _unrounded(layer: str, operator: Operator, state: QuantizedState, input_scale: float | None) -> LayerConstants:
    codes, scale, zero = (tensor.detach().cpu() for tensor in (state.codes, state.scale, state.zero_point))
    bias = torch.zeros(len(scale)) if state.bias is None else state.bias.detach().cpu()
    return LayerConstants(layer, operator, state.weight_grid, codes, scale, zero, bias, None, input_scale)


def _with_whole_bias(constants: LayerConstants, input_scale: float) -> LayerConstants:
    """The same with a bias that is a whole number of steps."""
    operator, grid, codes, scale, bias = constants.operator, constants.grid, constants.codes, constants.scale, constants.bias
    unit = torch.tensor(input_scale)
    least = bias.abs() / (LARGEST_BIAS * unit)
    dead = scale < least
    if bool(dead.any()):
        larger = torch.where(dead, least, scale)
        offset = operator.per_channel(constants.zero_point, codes)
        weight = dequantize(codes, operator.per_channel(scale, codes), offset)
        coarser = ((weight / operator.per_channel(larger, codes)).round() + offset).clamp(grid.lowest, grid.highest).to(codes.dtype)
        codes = torch.where(operator.per_channel(dead, codes), coarser, codes)
        scale = larger
    whole = (bias.double() / (unit * scale).double()).round().to(torch.int32)
    return replace(constants, codes=codes, scale=scale, bias_codes=whole)


def _shortened(constants: LayerConstants, bias_codes: Tensor, output: TensorGrid) -> LayerConstants:
    """The same with numbers of 16 bits, where they are no coarser than may be."""
    fraction, exponent = torch.frexp(constants.scale)
    scale = torch.ldexp((fraction * (1 << STEP_BITS)).round() / (1 << STEP_BITS), exponent)
    old, unit = (torch.tensor(constants.input_scale) * one for one in (constants.scale, scale))
    whole = (bias_codes.double() * old.double() / unit.double()).round()
    blocks = bias_blocks(whole.numpy())
    powers = bias_powers(blocks)
    coarsest = COARSEST * output.scale * (output.high - output.low) / LEVELS
    if bool((torch.from_numpy(powers.repeat(BIAS_BLOCK)[: len(unit)]) * unit > coarsest).any()):
        return constants
    whole = torch.from_numpy((np.rint(blocks / powers) * powers).ravel()[: len(unit)].astype(np.int32))
    return replace(constants, scale=scale, bias_codes=whole, short=True)


def bias_blocks(codes: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Whole numbers in blocks of channels, filled up with zeros.

    Args:
        codes: (C_out,).

    Returns:
        float64 (blocks, BIAS_BLOCK).

    Example:
        >>> bias_blocks(np.arange(20)).shape
        (2, 16)
    """
    return np.pad(codes.astype(np.float64), (0, -len(codes) % BIAS_BLOCK)).reshape(-1, BIAS_BLOCK)


def bias_powers(blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The least powers of two of which no bias is more than `BIAS_TOP`, from 1 on.

    Args:
        blocks: whole numbers, float64 (blocks, channels).

    Returns:
        float64 (blocks, 1).

    Example:
        >>> bias_powers(np.array([[0.0, 32767.0], [5.0, -65536.0]])).tolist()
        [[1.0], [4.0]]
    """
    most = np.abs(blocks).max(axis=1, keepdims=True)
    powers: npt.NDArray[np.float64] = np.exp2(np.maximum(0.0, np.ceil(np.log2(np.maximum(most, 1.0) / BIAS_TOP))))
    return powers * np.where(np.rint(most / powers) > BIAS_TOP, 2.0, 1.0)
