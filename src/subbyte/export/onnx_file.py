"""An ONNX model as the bytes of a file, without anything that a runtime does not read."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

LETTERS = string.ascii_letters


def to_file_bytes(model: ir.Model) -> tuple[bytes, dict[str, str]]:
    """Serialise a model with short names.

    Args:
        model: inputs and outputs keep their names.

    Returns:
        The bytes of the file, and the new name of every value by its old one.

    Raises:
        onnx.checker.ValidationError: if the model breaks the standard.
    """
    proto = ir.to_proto(model)
    _strip_(proto)
    renamed = _shorten_(proto.graph)
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True), renamed


def _strip_(proto: onnx.ModelProto) -> None:
    """Drop descriptions, and attributes that say what holds without them."""
    for name in ("producer_name", "producer_version", "doc_string", "metadata_props", "domain", "model_version"):
        proto.ClearField(name)
    del proto.functions[:]
    imports = [(entry.domain, entry.version) for entry in proto.opset_import if not entry.domain]
    del proto.opset_import[:]
    for domain, version in imports:
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "g"
    for name in ("value_info", "doc_string", "metadata_props", "quantization_annotation"):
        graph.ClearField(name)
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
        _shrink_(tensor)
    for value in (*graph.input, *graph.output):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for node in graph.node:
        for name in ("name", "doc_string", "metadata_props"):
            node.ClearField(name)
        kept = [attribute for attribute in node.attribute if not _is_default(node, attribute, shapes)]
        del node.attribute[:]
        node.attribute.extend(kept)


def _shrink_(tensor: onnx.TensorProto) -> None:
    """Small integers as numbers of one byte each, where that is shorter than eight or four: shapes, sizes of splits."""
    fields: dict[int, str] = {onnx.TensorProto.INT64: "int64_data", onnx.TensorProto.INT32: "int32_data"}
    if tensor.data_type in fields and tensor.HasField("raw_data"):
        shorter = onnx.TensorProto()
        shorter.CopyFrom(tensor)
        shorter.ClearField("raw_data")
        getattr(shorter, fields[tensor.data_type]).extend(onnx.numpy_helper.to_array(tensor).ravel().tolist())
        if shorter.ByteSize() < tensor.ByteSize():
            tensor.CopyFrom(shorter)


def _is_default(node: onnx.NodeProto, attribute: onnx.AttributeProto, shapes: dict[str, npt.NDArray[np.int64]]) -> bool:
    """Whether the standard says the same where the attribute is left out."""
    name, value = attribute.name, onnx.helper.get_attribute_value(attribute)
    attribute.ClearField("doc_string")
    if name == "kernel_shape" and node.op_type == "Conv":
        return True  # that of the weight
    if name == "allowzero":
        return node.input[1] in shapes and bool((shapes[node.input[1]] != 0).all())
    if name in ("strides", "dilations"):
        return all(step == 1 for step in value)
    if name == "pads":
        return all(width == 0 for width in value)
    schema = onnx.defs.get_schema(node.op_type, 21, node.domain)
    default = schema.attributes[name].default_value if name in schema.attributes else None
    if default is None or not default.name:
        return False
    return bool(onnx.helper.get_attribute_value(default) == value)


def _shorten_(graph: onnx.GraphProto) -> dict[str, str]:
    """One or two letters instead of a name, the shortest for what is named most often."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    uses = Counter(name for node in graph.node for name in (*node.input, *node.output) if name and name not in kept)
    uses.update(tensor.name for tensor in graph.initializer if tensor.name not in kept)
    fresh = (name for name in _names() if name not in kept)
    renamed = {name: new for (name, _), new in zip(uses.most_common(), fresh, strict=False)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    return renamed | {name: name for name in kept}


def _names() -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(LETTERS, repeat=length):
            yield "".join(letters)
