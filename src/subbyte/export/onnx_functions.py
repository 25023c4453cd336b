"""Repeated groups of operators as functions of the file, so that a layer costs one short node instead of six.

    D(x, s, z)                  QuantizeLinear, DequantizeLinear
    C1(x, W, s_w, b, s_x), C2   DequantizeLinear(W), DequantizeLinear(b, s_x s_w), Conv; one function for each set of attributes
    C3(codes, shape)            Reshape, Cast

Functions are part of the ONNX standard, and ONNX Runtime puts the body in place of the node before it optimises. OpenVINO 2026.4 does not
read them, so they are left out unless a target asks for them (`OnnxRuntimeCPU(compact=True)`).
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import helper

DOMAIN = "f"
LAYERS = ("Conv", "Gemm")


def fold_functions_(proto: onnx.ModelProto) -> None:
    """Replace groups of operators by functions.

    Args:
        proto: with attributes at their defaults left out; is changed in place.
    """
    graph = proto.graph
    producers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    functions: dict[tuple[object, ...], onnx.FunctionProto] = {}
    opset = proto.opset_import[0]
    replaced: dict[int, onnx.NodeProto] = {}
    gone: set[int] = set()
    for node in graph.node:
        groups = (find(node, producers, uses) for find in (_layer_group, _quantizer_group, _unpacking_group))
        group = next((found for found in groups if found is not None), None)
        if group is None:
            continue
        parts, inputs = group
        body = _body(parts, inputs, node.output[0])
        key = tuple(part.SerializeToString() for part in body)
        if key not in functions:
            name = f"{node.op_type[0]}{len(functions)}"
            parameters = [f"i{index}" for index in range(len(inputs))]
            functions[key] = helper.make_function(DOMAIN, name, parameters, ["o"], body, [opset])
        replaced[id(node)] = helper.make_node(functions[key].name, inputs, [node.output[0]], domain=DOMAIN)
        gone |= {id(part) for part in parts if part is not node}
    nodes = [replaced.get(id(node), node) for node in graph.node if id(node) not in gone]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    if functions:
        proto.functions.extend(functions.values())
        proto.opset_import.add(domain=DOMAIN, version=1)


Group = tuple[list[onnx.NodeProto], list[str]]


def _quantizer_group(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], uses: Counter[str]) -> Group | None:
    """QuantizeLinear and DequantizeLinear on one grid, and what they read."""
    source = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if source is None or source.op_type != "QuantizeLinear" or uses[node.input[0]] > 1 or source.input[1:] != node.input[1:]:
        return None
    return [source, node], list(source.input)


def _unpacking_group(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], uses: Counter[str]) -> Group | None:
    """Reshape and Cast of codes, and what they read."""
    source = producers.get(node.input[0]) if node.op_type == "Cast" else None
    if source is None or source.op_type != "Reshape" or uses[node.input[0]] > 1:
        return None
    return [source, node], list(source.input)


def _layer_group(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], uses: Counter[str]) -> Group | None:
    """A layer's operator with what dequantises its weight and bias, and what they read."""
    if node.op_type not in LAYERS or len(node.input) != 3:
        return None
    weight, bias = producers.get(node.input[1]), producers.get(node.input[2])
    if weight is None or bias is None or {weight.op_type, bias.op_type} != {"DequantizeLinear"}:
        return None
    scale = producers.get(bias.input[1])
    if scale is None or scale.op_type != "Mul" or uses[scale.output[0]] > 1 or uses[node.input[1]] > 1 or uses[node.input[2]] > 1:
        return None
    return [weight, scale, bias, node], [node.input[0], *weight.input, scale.input[0], bias.input[0]]


def _body(parts: list[onnx.NodeProto], inputs: list[str], output: str) -> list[onnx.NodeProto]:
    """Copies of nodes that read parameters and give the function's output."""
    names = {name: f"i{index}" for index, name in enumerate(inputs)} | {output: "o"}
    inner = [name for part in parts for name in part.output if name != output]
    names |= {name: f"t{index}" for index, name in enumerate(inner)}
    body = []
    for part in parts:
        copy = onnx.NodeProto()
        copy.CopyFrom(part)
        copy.input[:] = [names[name] for name in part.input]
        copy.output[:] = [names[name] for name in part.output]
        body.append(copy)
    return body
