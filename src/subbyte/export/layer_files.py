"""Files that hold one layer each, to be timed: made by the exporter itself, so that a layer stands in them as it does in a whole file.

    convolution in int8      codes -> DequantizeLinear -> Conv -> QuantizeLinear -> codes
    linear layer in int8     float -> QuantizeLinear -> DequantizeLinear -> Gemm or MatMul -> float
    anything in float32      float -> operator -> float

Between convolutions of a whole file tensors stay in INT8, so codes go in and come out. Runtimes compute convolutions in int8 with channels
last and transpose at the borders of the graph only; codes go in and come out with channels last, so that these transpositions fall away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from torch import Tensor, nn

from subbyte.export.constants import LayerConstants, fix_constants_
from subbyte.export.markers import marked
from subbyte.export.onnx_file import to_file_bytes
from subbyte.export.onnx_graph import OPSET, with_constants, with_markers
from subbyte.export.targets import Target
from subbyte.export.trace import Example, trace
from subbyte.export.translation import place_for_
from subbyte.model.operators import Operator
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.quantizers.granularity import group_count
from subbyte.quantizers.grid import MAX_BITS, Grid, WeightGrids
from subbyte.widths import Option

IR_VERSION = 10
KEY = "0"  # of the one layer's constants


@dataclass(frozen=True)
class Geometry:
    """What the time of a layer depends on, beside its option.

    Args:
        operator: its arithmetic.
        weight_shape: of the weight.
        input_shape: samples first.
        outputs: number of output channels.
        weights: what grids of its weights have beside their bits.
    """

    operator: Operator
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    outputs: int
    weights: WeightGrids = WeightGrids()

    @property
    def unknowns(self) -> int:
        """Weights of one output channel."""
        return math.prod(self.weight_shape) // self.outputs


@dataclass(frozen=True, eq=False)
class LayerFile:
    """A file, and what goes in.

    Args:
        content: of the ONNX file.
        example: float32 or 8-bit, any shape.
    """

    content: bytes
    example: npt.NDArray[np.generic]


class _Bare(nn.Module):
    """Weight and bias of a layer, random numbers."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(geometry.weight_shape) / math.sqrt(geometry.unknowns))
        self.bias = nn.Parameter(torch.randn(geometry.outputs))
        self.operator = geometry.operator
        self.eval()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear and nn.Conv2d have
        return self.operator(input, self.weight, self.bias)


def float_file(geometry: Geometry) -> LayerFile:
    """A layer in float32.

    Args:
        geometry: of the layer.

    Raises:
        ModelError: if it cannot be translated.
    """
    x = _example(geometry)
    model = with_constants(with_markers(trace(_Bare(geometry), Example.of([x])), Example.of([x])), {}).model
    return LayerFile(to_file_bytes(model)[0], x.numpy())


def empty_file() -> LayerFile:
    """A file that does nothing: what it takes is the call into the runtime."""
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return LayerFile(model.SerializeToString(), np.zeros(1, np.float32))


def quantized_files(geometry: Geometry, options: tuple[Option, ...], target: Target) -> Mapping[Option, LayerFile]:
    """A layer at several options, traced once for each width of its input.

    Args:
        geometry: of the layer.
        options: `(weight bits, activation bits or None)`.
        target: whose quantisers stand around it.

    Raises:
        ModelError: if the layer cannot be translated.
    """
    found: dict[Option, LayerFile] = {}
    x, layout = _example(geometry), target.layout
    for activation_bits in dict.fromkeys(option[1] for option in options):
        template, constants = _template(geometry, activation_bits, target, x)
        for option in options:
            if option[1] == activation_bits:
                model = ir.from_proto(template)
                filled = with_constants(model, {KEY: _at(constants, geometry.weights.at(option[0]))}, layout).model
                found[option] = _with_codes_at_its_ends(to_file_bytes(filled)[0], x)
    return found


def _example(geometry: Geometry) -> Tensor:
    return torch.randn(geometry.input_shape, generator=torch.Generator().manual_seed(0))


def _template(geometry: Geometry, activation_bits: int | None, target: Target, x: Tensor) -> tuple[onnx.ModelProto, LayerConstants]:
    """The layer with markers, and the constants that belong there, with codes of 8 bits."""
    bare = _Bare(geometry)
    layer = QuantizedLayer(bare, geometry.operator)
    activation = None
    if activation_bits is not None:
        grid = Grid(activation_bits)
        step = (x.amax() - x.amin()) / (grid.highest - grid.lowest)
        activation = (step, (-x.amin() / step).round().to(torch.int32), grid)
    steps = [geometry.outputs] + ([] if geometry.weights.group is None else [group_count(geometry.unknowns, geometry.weights.group)])
    scale, zero = torch.full(steps, 0.01), torch.zeros(steps, dtype=torch.int32)
    codes = torch.zeros(geometry.weight_shape, dtype=torch.int16)
    layer.assign_(QuantizedState(codes, scale, zero, bare.bias.detach(), geometry.weights.at(MAX_BITS), activation))
    model = marked(nn.Sequential(layer))
    example = Example.of([x])
    graph = trace(model.model, example)
    place_for_(graph, [x], target)
    constants = fix_constants_(graph, model)
    return ir.to_proto(with_markers(graph, example)), constants[KEY]


def _at(constants: LayerConstants, grid: Grid) -> LayerConstants:
    """With random codes of another width and random zero-points."""
    codes = torch.randint(grid.lowest, grid.highest + 1, constants.codes.shape).to(torch.int16)
    zero = torch.randint(0, 1 if grid.symmetric else grid.highest + 1, constants.zero_point.shape).to(torch.int32)
    return replace(constants, grid=grid, codes=codes, zero_point=zero)


def _with_codes_at_its_ends(content: bytes, x: Tensor) -> LayerFile:
    """A file that quantises its one input and its one output, without these two; any other as it is."""
    model = onnx.load_from_string(content)
    graph = model.graph
    given, made = graph.input[0], graph.output[0]
    first = [node for node in graph.node if given.name in node.input]
    last = next(node for node in graph.node if made.name in node.output)
    if not (len(first) == 1 and first[0].op_type == "QuantizeLinear" and last.op_type == "DequantizeLinear" and x.dim() > 2):
        return LayerFile(content, x.numpy())
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    before = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    after = [0, *range(2, x.dim()), 1]
    nodes = [node for node in graph.node if node is not first[0] and node is not last]
    ends = [helper.make_node("Transpose", [given.name], list(first[0].output), perm=before)]
    ends += [helper.make_node("Transpose", [last.input[0]], [made.name], perm=after)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (ends[0], *nodes, ends[1])]
    kind = kinds[first[0].input[2]]
    del graph.node[:]
    graph.node.extend(nodes)
    for value, shape in ((given, [None, *x.shape[2:], x.shape[1]]), (made, [None] * x.dim())):
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
    onnx.checker.check_model(model)
    codes = torch.randint(0, 128, (x.shape[0], *x.shape[2:], x.shape[1])).numpy()
    return LayerFile(model.SerializeToString(), codes.astype(helper.tensor_dtype_to_np_dtype(kind)))
