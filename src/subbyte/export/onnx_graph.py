"""From a placed graph to an ONNX graph of standard operators: torch.onnx translates the model's own, the markers are translated here.

quantize    QuantizeLinear (UINT8), a Clip of the codes where the grid is narrower, DequantizeLinear
weight      codes at their true width, widened to INT8 (`widening`), DequantizeLinear with one scale for each output channel; with column
            groups, one for each block of them, along the first dimension: what ONNX Runtime turns into its MatMulNBits
bias        of a convolution FLOAT: runtimes round it to INT32 again; of a linear layer, and of more than 2^22 steps, INT32 and
            DequantizeLinear, scale s_x s_w multiplied in the graph

Steps and biases of convolutions between quantisers come from streams of 16 bits (`widening`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch.fx import GraphModule

from subbyte.errors import LayerError, ModelError
from subbyte.export.attention import with_attention_written_out
from subbyte.export.channel_blocks import ChannelBlocks
from subbyte.export.constants import LayerConstants, unsigned
from subbyte.export.graph_kinds import BIAS, QUANTIZE, WEIGHT
from subbyte.export.layout import PLAIN, Layout
from subbyte.export.means import means_of_codes, rewrite_means_
from subbyte.export.onnx_builder import Builder
from subbyte.export.trace import Example, exported_program, quiet
from subbyte.export.widening import INT4_BITS, INT8_BITS, Stored, widen_, widen_numbers_
from subbyte.model.operators import Convolution
from subbyte.quantizers.granularity import per_weight

OPSET = 21  # the first with INT4
DOMAIN = "subbyte"
UINT8_TOP = 255
EXACT_BIAS = 1 << 22  # steps; fewer come back from float32, multiplied by a step and divided by it
INT4_BLOCKS = (128, 64)  # sizes that TensorRT has kernels for


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """An ONNX model and where the layers' weights are in it.

    Args:
        model: standard operators only.
        weights: name of the layer by the name of the INT8 value that holds its widened codes.
    """

    model: ir.Model
    weights: Mapping[str, str]


def to_onnx(graph: GraphModule, example: Example, constants: Mapping[str, LayerConstants], layout: Layout = PLAIN) -> OnnxGraph:
    """Translate a graph.

    Args:
        graph: a placed graph, see `placement`, or that of a float model.
        example: of what it takes.
        constants: of the layers, by key.
        layout: of what the file holds.

    Raises:
        ModelError: if torch.onnx cannot translate an operator of the model.
        LayerError: if a layer was translated to something that cannot hold codes.
    """
    return with_constants(with_markers(graph, example), constants, layout)


def with_markers(graph: GraphModule, example: Example) -> ir.Model:
    """Translate the model's own operators; markers are operators of our own domain, for the time being.

    Args:
        graph: a placed graph, see `placement`, or that of a float model.
        example: of what it takes.

    Raises:
        ModelError: if torch.onnx cannot translate an operator of the model.
    """
    with quiet():
        written = with_attention_written_out(graph)
    program = exported_program(written, example)
    try:
        with quiet(), torch.no_grad():
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, custom_translation_table=_translations(), verbose=False
            )
    except Exception as error:  # noqa: BLE001 - adds what was being done to the user's model
        raise ModelError(f"torch.onnx cannot translate this model: {error}") from error
    assert translated is not None
    model: ir.Model = translated.model
    return model


def with_constants(model: ir.Model, constants: Mapping[str, LayerConstants], layout: Layout = PLAIN) -> OnnxGraph:
    """Put standard operators in place of markers.

    Args:
        model: what `with_markers` gave; is changed.
        constants: of the layers, by key.
        layout: of what the file holds.

    Raises:
        LayerError: if a layer was translated to something that cannot hold codes.
    """
    builder = Builder(model.graph)
    if layout.unsigned_weights:
        constants = {key: unsigned(item) for key, item in constants.items()}
    means = means_of_codes(model.graph, DOMAIN)
    blocks = ChannelBlocks.of_(model.graph, constants) if layout.channel_blocks else ChannelBlocks.none(constants)
    weights = _replace_markers_(builder, blocks, signed_codes=layout.signed_codes)
    rewrite_means_(builder, means, channels_last=layout.channels_last)
    model.opset_imports.pop(DOMAIN, None)
    return OnnxGraph(model, weights)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator -> function that emits the marker as an operator of our own domain, for the time being."""
    kinds = OpSchema.AttrType
    quantizer = _marker("Quantize", scale=kinds.FLOAT, zero_point=kinds.INT, low=kinds.INT, high=kinds.INT)
    weight, bias = _marker("Weight", key=kinds.STRING), _marker("Bias", key=kinds.STRING)

    def translate_quantize(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
        return quantizer(x, scale=scale, zero_point=zero_point, low=low, high=high)

    def translate_weight(w: Any, key: str) -> Any:
        return weight(w, key=key)

    def translate_bias(b: Any, key: str) -> Any:
        return bias(b, key=key)

    return {QUANTIZE: translate_quantize, WEIGHT: translate_weight, BIAS: translate_bias}


def _marker(name: str, **attributes: OpSchema.AttrType) -> Any:
    parameter = OpSchema.FormalParameter
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter("x", "T")],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(key, kind, "", required=True) for key, kind in attributes.items()],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


def _replace_markers_(builder: Builder, blocks: ChannelBlocks, *, signed_codes: bool) -> dict[str, str]:
    """Standard operators for all markers; returns layer names by the names of their INT8 weights."""
    graph, constants = builder.graph, blocks.constants
    markers = [node for node in graph if node.domain == DOMAIN]
    weights = [node for node in markers if node.op_type == "Weight"]
    stored, sites = {}, {}
    for node in weights:
        key = _text(node)
        sites[key] = _site(node, constants[key])
        stored[key] = _stored(constants[key], sites[key])
    first = next(iter(graph), None)
    plain, owner = _without_repetition({key: item for key, item in stored.items() if _is_widened(item)}, constants)
    widened = {key: _as_they_are(builder, item, constants[key]) for key, item in plain.items()} if signed_codes else widen_(builder, plain)
    numbers = _Numbers({}, {}, float_biases=True) if signed_codes else _Numbers.of(builder, constants, sites)
    if first is not None:
        builder.place_(first)
    codes = {key: widened[owner[key]] if key in owner else builder.constant(_unwidened(item)) for key, item in stored.items()}
    for node in weights:
        key = _text(node)
        if constants[key].operator.multiplies:
            _replace_(node, _weight(builder, codes[key], numbers.steps.get(key), constants[key], sites[key]), builder, sites[key].last)
        else:
            _replace_(node, _rows(builder, codes[key], constants[key], sites[key].last), builder, sites[key].last)
    for node in markers:
        if node.op_type == "Bias":
            _replace_(node, _bias(builder, node, numbers, constants[_text(node)]), builder, node)
        elif node.op_type == "Quantize":
            _replace_(node, _quantizer(builder, node, blocks, signed_codes=signed_codes), builder, node)
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
    return {_name(value): constants[key].layer for key, value in codes.items()}


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Steps of output channels and biases of convolutions that are stored in streams, by key; and whether other biases are float32."""

    steps: Mapping[str, ir.Value]
    biases: Mapping[str, ir.Value]
    float_biases: bool = False

    @staticmethod
    def of(builder: Builder, constants: Mapping[str, LayerConstants], sites: Mapping[str, _Site]) -> _Numbers:
        """Those that `constants` has rounded to 16 bits."""
        short = {key: item for key, item in constants.items() if item.short and sites[key].axis is not None}
        return _Numbers(*widen_numbers_(builder, short))


@dataclass(frozen=True, eq=False)
class _Site:
    """Where a weight is read: the last node that only rearranges it, whether codes are stored transposed, and the dimension of output
    channels (None: the scales do not lie along one dimension)."""

    last: ir.Node
    transposed: bool
    axis: int | None


def _site(node: ir.Node, constants: LayerConstants) -> _Site:
    operator = constants.operator
    (use,) = node.outputs[0].uses()
    reader = use.node
    if isinstance(operator, Convolution):
        if reader.op_type not in ("Conv", "ConvTranspose"):
            raise LayerError(constants.layer, f"was translated to {reader.op_type}; exclude it to export the model")
        return _Site(node, False, (None if operator.groups > 1 else 1) if operator.transposed else 0)
    if not operator.multiplies:
        if reader.op_type != "Gather":
            raise LayerError(constants.layer, f"was translated to {reader.op_type}; exclude it to export the model")
        return _Site(reader, False, 0)
    if reader.op_type == "Transpose":
        return _Site(reader, True, 1)
    if reader.op_type == "Gemm" and reader.attributes["transB"].as_int() == 1:
        if constants.grid.group is None:
            return _Site(node, False, 0)
        reader.attributes["transB"] = ir.AttrInt64("transB", 0)  # blocks lie along the first dimension
        return _Site(node, True, 1)
    raise LayerError(constants.layer, f"was translated to {reader.op_type}; exclude it to export the model")


def _stored(constants: LayerConstants, site: _Site) -> Stored:
    codes, zero = constants.codes.numpy(), None
    if not constants.operator.multiplies:  # rows are gathered from INT8 or UINT8, whatever their groups are
        grid, group = replace(constants.grid, group=None), constants.grid.group
        if grid.symmetric:
            return Stored(codes, grid, None)
        if group is not None and codes.shape[1] % group == 0:
            return Stored(codes, grid, constants.zero_point[..., None].numpy(), group)
        return Stored(codes, grid, per_weight(constants.zero_point, group, codes.shape[1]).numpy())
    if not constants.grid.symmetric and constants.grid.group is None:
        zero = constants.operator.per_channel(constants.zero_point, constants.codes).numpy()
        zero = zero.T if site.transposed else zero
    return Stored(codes.T if site.transposed else codes, constants.grid, zero)


def _is_widened(item: Stored) -> bool:
    """Codes less zero-points fit into INT8: always on a symmetric grid, on an affine one below 8 bits. Column groups are read as INT4 or
    UINT4 where they are that."""
    if item.grid.group is not None and item.grid.bits == INT4_BITS:
        return False
    return item.grid.symmetric or item.grid.bits < INT8_BITS


def _unwidened(item: Stored) -> npt.NDArray[Any]:
    """Codes in a type of their own width."""
    if item.grid.bits == INT4_BITS:
        return item.codes.astype(ml_dtypes.int4 if item.grid.symmetric else ml_dtypes.uint4)
    return item.codes.astype(np.uint8)


def _without_repetition(stored: Mapping[str, Stored], constants: Mapping[str, LayerConstants]) -> tuple[dict[str, Stored], dict[str, str]]:
    """A layer that is called several times is stored once; returns what is stored, and under which key each call finds it."""
    plain: dict[str, Stored] = {}
    owner: dict[str, str] = {}
    for key, item in stored.items():
        same = (other for other in plain if constants[other].layer == constants[key].layer)
        owner[key] = next((other for other in same if np.array_equal(plain[other].codes, item.codes)), key)
        plain.setdefault(owner[key], item)
    return plain, owner


def _as_they_are(builder: Builder, item: Stored, constants: LayerConstants) -> ir.Value:
    """Codes less zero-points as constants: INT4 in blocks where only the weight is quantized, otherwise INT8."""
    in_blocks = constants.input_scale is None and item.grid.bits == INT4_BITS and _block_of(constants) is not None
    return builder.constant(item.levels().astype(ml_dtypes.int4 if in_blocks else np.int8))


def _block_of(constants: LayerConstants) -> int | None:
    """Weights that share a scale in TensorRT's INT4, if they have one scale for each output channel; None where they cannot."""
    linear = constants.operator.multiplies and not isinstance(constants.operator, Convolution)
    inputs = constants.codes.shape[1] if linear and constants.grid.symmetric and constants.grid.group is None else 0
    return next((size for size in INT4_BLOCKS if inputs and inputs % size == 0), None)


def _weight(builder: Builder, codes: ir.Value, steps: ir.Value | None, constants: LayerConstants, site: _Site) -> ir.Value:
    scale = constants.scale
    if constants.grid.group is not None:
        return _blocks(builder, codes, constants)
    block = _block_of(constants) if codes.dtype == ir.DataType.INT4 else None
    if block is not None:
        blocks = constants.codes.shape[1] // block
        scales = scale.repeat(blocks, 1) if site.transposed else scale[:, None].repeat(1, blocks)
        return builder.add("DequantizeLinear", codes, builder.constant(scales.numpy()), axis=0 if site.transposed else 1, block_size=block)
    if site.axis is None:
        spread = constants.operator.per_channel(scale, constants.codes).numpy()
        steps_from_zero = builder.cast(codes, ir.DataType.FLOAT)
        if not constants.grid.symmetric and constants.grid.bits == INT8_BITS:
            zero = constants.operator.per_channel(constants.zero_point, constants.codes).numpy().astype(np.float32)
            steps_from_zero = builder.add("Sub", steps_from_zero, builder.constant(zero))
        return builder.add("Mul", steps_from_zero, builder.constant(spread))
    inputs = [codes, builder.constant(scale.numpy()) if steps is None else steps]
    if not constants.grid.symmetric and constants.grid.bits == INT8_BITS:
        inputs.append(builder.constant(constants.zero_point.numpy().astype(np.uint8)))
    elif not isinstance(constants.operator, Convolution):  # ONNX Runtime 1.32 takes its QGemm only where they are written out
        inputs.append(builder.constant(np.zeros(len(scale), np.int8)))
    return builder.add("DequantizeLinear", *inputs, axis=site.axis)


def _rows(builder: Builder, codes: ir.Value, constants: LayerConstants, gather: ir.Node) -> ir.Value:
    """Rows of a table: codes and steps are looked up, then multiplied, so that the table is never there in floating point."""
    indices, grid = gather.inputs[1], constants.grid
    flat = builder.add("Reshape", indices, builder.constant(np.array([-1])))
    inputs = [builder.add("Gather", codes, flat, axis=0), builder.add("Gather", builder.constant(constants.scale.numpy()), flat, axis=0)]
    if not grid.symmetric and grid.bits == INT8_BITS:
        zero = builder.constant(constants.zero_point.numpy().astype(np.uint8))
        inputs.append(builder.add("Gather", zero, flat, axis=0))
    blocks = {} if grid.group is None else {"block_size": grid.group}
    rows = builder.add("DequantizeLinear", *inputs, axis=0 if grid.group is None else 1, **blocks)
    width = builder.constant(np.array([constants.codes.shape[1]]))
    return builder.add("Reshape", rows, builder.add("Concat", builder.add("Shape", indices), width, axis=0))


def _blocks(builder: Builder, codes: ir.Value, constants: LayerConstants) -> ir.Value:
    """Codes (n, O) times the scales (K, O) of their column groups."""
    grid = constants.grid
    assert grid.group is not None
    inputs = [codes, builder.constant(constants.scale.T.numpy())]
    if not grid.symmetric:
        kind = {INT4_BITS: ml_dtypes.uint4, INT8_BITS: np.uint8}.get(grid.bits, np.int8)
        inputs.append(builder.constant(constants.zero_point.T.numpy().astype(kind)))
    return builder.add("DequantizeLinear", *inputs, axis=0, block_size=grid.group)


def _bias(builder: Builder, node: ir.Node, numbers: _Numbers, constants: LayerConstants) -> ir.Value:
    key, codes, readers = _text(node), constants.bias_codes, {use.node.op_type for use in node.outputs[0].uses()}
    if key in numbers.biases:
        return numbers.biases[key]
    exact = codes is not None and readers == {"Conv"} and int(codes.abs().max()) < EXACT_BIAS
    if codes is None or numbers.float_biases or exact or not readers <= {"Conv", "Gemm"}:
        return builder.constant(constants.rounded_bias().numpy())
    scale = builder.add("Mul", builder.constant(np.float32(constants.input_scale)), builder.constant(constants.scale.numpy()))
    return builder.add("DequantizeLinear", builder.constant(codes.numpy()), scale, axis=0)


def _quantizer(builder: Builder, node: ir.Node, blocks: ChannelBlocks, *, signed_codes: bool) -> ir.Value:
    scale = builder.constant(np.float32(node.attributes["scale"].as_float()))
    zero_point, low, high = (node.attributes[name].as_int() for name in ("zero_point", "low", "high"))
    kind, shift = (np.int8, UINT8_TOP // 2 + 1) if signed_codes else (np.uint8, 0)
    parameters = [scale, builder.constant(kind(zero_point - shift))]  # written out also where it is 0: runtimes look for it
    codes = builder.add("QuantizeLinear", node.inputs[0], *parameters)
    if (low, high) != (0, UINT8_TOP):
        codes = builder.add("Clip", codes, builder.constant(kind(low - shift)), builder.constant(kind(high - shift)))
    if node in blocks.cut:
        start, end, axis = (builder.constant(np.array([value])) for value in (0, blocks.cut[node], 1))
        codes = builder.add("Slice", codes, start, end, axis)
    readers = {use.node: blocks.padded.get(use.node, 0) for use in node.outputs[0].uses()}
    most = 0 if node.outputs[0].is_graph_output() else min(readers.values(), default=0)
    values = {}
    for channels in {most, *readers.values()}:
        widths = builder.constant(np.array([0, 0, 0, 0, 0, channels, 0, 0])) if channels else None
        padded = codes if widths is None else builder.add("Pad", codes, widths)
        values[channels] = builder.add("DequantizeLinear", padded, *parameters)
    for reader, channels in readers.items():
        if channels != most:
            reader.replace_input_with(0, values[channels])
    return values[most]


def _replace_(marker: ir.Node, value: ir.Value, builder: Builder, last: ir.Node) -> None:
    """Let everything that reads `last`, the marker or what rearranges it, read `value`."""
    builder.place_(last if last.op_type == "Gather" else marker)
    old = last.outputs[0]
    if old.is_graph_output():
        value.name, value.type, value.shape = old.name, old.type, old.shape
        old.name = None
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph = marker.graph
    assert graph is not None
    for node in dict.fromkeys([last, marker]):
        graph.remove(node, safe=True)


def _text(node: ir.Node) -> str:
    return node.attributes["key"].as_string()


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
