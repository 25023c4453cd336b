"""The packed file: one safetensors file, as small as its widths promise. `docs/packed-format.md` describes it for other readers.

All quantized layers together make a handful of tensors, so that a small network does not pay for names twice:

    subbyte.codes                  U8   codes of all layers, each layer packed densely (`bits`) and starting on a byte's border
    subbyte.weight_scale           F32  s_w of all layers' output channels, or of their column groups
    subbyte.weight_zero_point      U8   z_w, of layers with an affine weight grid, each layer packed like its codes
    subbyte.bias                   F32  b of the output channels, of layers that have one
    subbyte.activation_scale       F32  s_x, of layers with a quantized input
    subbyte.activation_zero_point  U8   z_x, likewise
    subbyte.input_exponents        I8   e of the input channels, of layers that multiply their input by 2^e

followed by whatever else the model's state holds, under its own names. The header's metadata entry ``subbyte`` is a checksum and JSON: the
layers and their grids, the folded batch norms, the fingerprint of the source model's structure and the library's version. Loading executes
nothing from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from subbyte.errors import FileError, ModelError, SubbyteError
from subbyte.export.bits import pack, packed_size, unpack
from subbyte.model.attention import products_of, put_products_
from subbyte.model.fold import Fold
from subbyte.model.input_factors import EXPONENTS, MOST
from subbyte.model.operators import Convolution, Linear, operator_of, twins_of
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.replace import copy_of, replace_module_
from subbyte.model.state import state_tensors, structure_of
from subbyte.quantizers.granularity import group_count
from subbyte.quantizers.grid import Grid

FORMAT_VERSION = 4
LIBRARY_VERSION = version("subbyte")
PREFIX = "subbyte."
SIZE_DIGITS = 12  # that every number in the header is given room for which depends on the widths
CHECKSUM_DIGITS = 32
DTYPES = dict.fromkeys(("weight_scale", "bias", "activation_scale"), torch.float32) | {EXPONENTS: torch.int8}  # all else is uint8


@dataclass(frozen=True, eq=False)
class PackedModel:
    """What the file holds, before it is bytes.

    Args:
        tensors: by name, any dtype and shape.
        metadata: the description in the header.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def pack_model(model: nn.Module, structure: str, folds: Sequence[Fold]) -> PackedModel:
    """Gather what the file will hold.

    Args:
        model: with at least one `QuantizedLayer` that has codes.
        structure: fingerprint of the float model that it was made from, see `structure_of`.
        folds: batch norms that were folded.

    Raises:
        ModelError: if nothing in the model is quantized.
    """
    if not (layers := _quantized_layers(model)):
        raise ModelError("nothing in this model is quantized, so there is nothing to pack")
    states = {name: layer.state() for name, layer in layers.items()}
    inputs = [state.activation for state in states.values() if state.activation is not None]
    own = [states[name] for name, layer in layers.items() if layer.shares is None]
    zero_points = [_pack(state.zero_point, state.weight_grid) for state in own if not state.weight_grid.symmetric]
    biases = [state.bias for state in states.values() if state.bias is not None]
    exponents = [layer.input_exponents.cpu() for layer in layers.values() if layer.input_exponents is not None]
    tensors = {
        "codes": torch.cat([_pack(state.codes, state.weight_grid) for state in own]),
        "weight_scale": torch.cat([state.scale.flatten().cpu() for state in own]),
        "weight_zero_point": torch.cat([*zero_points, torch.empty(0, dtype=torch.uint8)]),
        "bias": torch.cat([bias.cpu() for bias in biases]) if biases else None,
        "activation_scale": torch.stack([scale.cpu() for scale, _, _ in inputs]) if inputs else None,
        "activation_zero_point": torch.stack([zero.to("cpu", torch.uint8) for _, zero, _ in inputs]) if inputs else None,
        EXPONENTS: torch.cat(exponents) if exponents else None,
    }
    packed = {PREFIX + name: tensor for name, tensor in tensors.items() if tensor is not None}
    packed |= {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _other_state(model, layers).items()}
    products, modules = products_of(model), list(layers.values())
    metadata = {
        "format_version": FORMAT_VERSION,
        "library": LIBRARY_VERSION,
        "structure": structure,
        "folds": [[fold.layer, fold.batch_norm] for fold in folds],
        "attention": {name: one.grid.bits for name, one in products.items()},
        "names": list(states),
        "shares": [-1 if layer.shares is None else modules.index(model.get_submodule(layer.shares)) for layer in modules],  # type: ignore[arg-type]
        "shapes": [list(state.codes.shape) for state in states.values()],
        "channels": [state.scale.shape[0] for state in states.values()],
        "group": [state.weight_grid.group or 0 for state in states.values()],
        "bias": [int(state.bias is not None) for state in states.values()],
        "weight_bits": [state.weight_grid.bits for state in states.values()],
        "weight_symmetric": [int(state.weight_grid.symmetric) for state in states.values()],
        "activation_bits": [state.activation[2].bits if state.activation else 0 for state in states.values()],
        "transposed": [int(_is_transposed(layer)) for layer in layers.values()],
    }
    if exponents:
        metadata[EXPONENTS] = [int(layer.input_exponents is not None) for layer in layers.values()]
    return PackedModel(packed, metadata)


def to_bytes(packed: PackedModel) -> bytes:
    """The file's content. Its header has the same length whatever the widths are.

    Args:
        packed: what to write.
    """
    text = json.dumps(packed.metadata, separators=(",", ":"), ensure_ascii=False)
    content = serialize(dict(packed.tensors), {"subbyte": _checksum(text, packed.tensors) + text})
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip(b" ")
    entries = json.loads(header)
    codes, zero_points = entries[PREFIX + "codes"], entries[PREFIX + "weight_zero_point"]
    offsets = [offset for entry in entries.values() for offset in entry.get("data_offsets", ())]
    varying = [codes["shape"][0], zero_points["shape"][0], *(offset for offset in offsets if offset > codes["data_offsets"][0])]
    length = len(header) + sum(SIZE_DIGITS - len(str(number)) for number in varying)
    length += -length % 8
    return length.to_bytes(8, "little") + header.ljust(length) + content[end:]


def load_into(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """The quantized model of a packed file, as an instance of the user's own class.

    Args:
        path: of a file that `Result.save` wrote.
        into: a float model of the same structure, as it was before quantization; it is not changed.

    Raises:
        FileError: if the file is missing, truncated, altered, of another format, no packed file, or of another model.
    """
    path = Path(path)
    packed = read_packed(path)
    if packed.metadata["structure"] != structure_of(into):
        raise FileError(f"'{path}' was made from another model: parameters, shapes or names differ from this {type(into).__name__}'s")
    try:
        return _build(packed, into)
    except SubbyteError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise FileError(f"'{path}' does not fit this {type(into).__name__}: {error}") from error


def read_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Read a packed file and check it, without any model.

    Args:
        path: of the file.

    Raises:
        FileError: if the file is missing, truncated, altered, of another format, or no packed file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"cannot read '{path}': there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("subbyte")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"'{path}' is truncated, damaged or no safetensors file ({error}); fetch or save it again") from error
    if text is None:
        raise FileError(f"'{path}' is a safetensors file, but not one that subbyte packed")
    try:
        metadata = json.loads(text[CHECKSUM_DIGITS:])
        found = int(metadata["format_version"])
        if found == FORMAT_VERSION:
            if text[:CHECKSUM_DIGITS] != _checksum(text[CHECKSUM_DIGITS:], tensors):
                raise ValueError("its checksum does not match its content")
            _check_packed(tensors, metadata)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FileError(f"'{path}' is damaged: {error!r}; fetch or save it again") from error
    if found > FORMAT_VERSION:
        raise FileError(f"'{path}' has format {found}, this subbyte reads up to {FORMAT_VERSION}; install a newer subbyte")
    if found < FORMAT_VERSION:
        raise FileError(f"'{path}' has format {found}, which no released subbyte wrote or reads; quantize the model again")
    return PackedModel(tensors, metadata)


def _check_packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Every length and range that the builder relies on; raises ValueError, KeyError or TypeError."""
    if not isinstance(metadata["structure"], str) or not all(len(pair) == 2 for pair in metadata["folds"]):
        raise ValueError("its structure or folds")
    columns = [metadata[key] for key in ("names", "shapes", "channels", "group", "bias")]
    columns += [metadata[key] for key in ("weight_bits", "weight_symmetric", "activation_bits", "shares")]
    columns.append(metadata.get(EXPONENTS, [0] * len(columns[0])))
    counts: defaultdict[str, int] = defaultdict(int)
    for index, row in enumerate(zip(*columns, strict=True)):
        _name, shape, outputs, group, has_bias, bits, symmetric, activation_bits, owner, has_exponents = row
        if owner >= 0:
            _check_shared(metadata, index, owner)
        if not all(isinstance(size, int) and size > 0 for size in (*shape, outputs)):
            raise ValueError(f"shape {shape} with {outputs} output channels")
        if (group or has_exponents) and len(shape) != 2:
            raise ValueError(f"groups of columns, or factors of inputs, of a weight of shape {shape}")
        grid, steps = Grid(bits, group=group or None), _step_count(shape, outputs, group)
        Grid(activation_bits or 8)
        if owner < 0:
            counts["codes"] += packed_size(int(np.prod(shape, dtype=np.int64)), grid.bits)
            counts["weight_scale"] += steps
            counts["weight_zero_point"] += 0 if symmetric else packed_size(steps, grid.bits)
        counts["bias"] += outputs if has_bias else 0
        counts["activation_scale"] += bool(activation_bits)
        counts["activation_zero_point"] += bool(activation_bits)
        counts[EXPONENTS] += _input_count(shape, outputs) if has_exponents else 0
    for name, count in counts.items():
        _expect(tensors, name, DTYPES.get(name, torch.uint8), count)
    if int(tensors.get(PREFIX + EXPONENTS, torch.zeros(1)).abs().amax()) > MOST:
        raise ValueError(f"{EXPONENTS} holds numbers beyond {MOST}")


def _check_shared(metadata: Mapping[str, Any], index: int, owner: int) -> None:
    """A layer takes the codes of an earlier one that has its own, of the same shape and grid."""
    same = ("shapes", "channels", "group", "weight_bits", "weight_symmetric", "transposed")
    if owner >= index or metadata["shares"][owner] >= 0 or any(metadata[key][index] != metadata[key][owner] for key in same):
        raise ValueError(f"layer {index} cannot have the codes of layer {owner}")


def _step_count(shape: Sequence[int], outputs: int, group: int) -> int:
    """Steps of a layer: one for each output channel, or for each of its column groups."""
    return outputs * group_count(_input_count(shape, outputs), group or None)


def _input_count(shape: Sequence[int], outputs: int) -> int:
    """Weights of one output channel."""
    return int(np.prod(shape, dtype=np.int64)) // outputs


def _expect(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int) -> None:
    if count == 0 and PREFIX + name not in tensors:
        return
    tensor = tensors[PREFIX + name]
    if tensor.dtype != dtype or tuple(tensor.shape) != (count,):
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} ({count},)")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite numbers")
    if name.endswith("scale") and not bool((tensor > 0).all()):
        raise ValueError(f"{name} holds a step that is not positive")


def _build(packed: PackedModel, into: nn.Module) -> nn.Module:
    model = copy_of(into).eval()
    state = {name: tensor for name, tensor in packed.tensors.items() if not name.startswith(PREFIX)}
    for _layer, batch_norm in packed.metadata["folds"]:
        replace_module_(model, model.get_submodule(batch_norm), nn.Identity().eval())
    attention = packed.metadata["attention"]
    for bits in set(attention.values()):
        put_products_(model, [name for name in attention if attention[name] == bits], bits)
    for products in products_of(model).values():
        products.assign_(torch.ones(4), torch.zeros(4, dtype=torch.int32))
    names, shares, parts = packed.metadata["names"], packed.metadata["shares"], _Parts(packed.tensors)
    for index, (name, layer_state) in enumerate(layer_states(packed)):
        module = model.get_submodule(name)
        operator = operator_of(module, own_forward=True)
        if operator is None or tuple(module.weight.shape) != tuple(layer_state.codes.shape):  # type: ignore[arg-type]
            raise FileError(f"layer '{name}' of the file is a {tuple(layer_state.codes.shape)} weight, the model's is {module}")
        quantized = QuantizedLayer(module, operator)
        quantized.shares = None if shares[index] < 0 else names[shares[index]]
        quantized.assign_(layer_state)
        if EXPONENTS in packed.metadata and packed.metadata[EXPONENTS][index]:
            inputs = _input_count(layer_state.codes.shape, packed.metadata["channels"][index])
            quantized.input_exponents = parts.take(EXPONENTS, inputs)
        rest = {other: one for other, one in model.named_modules() if f"{other}.weight" not in state and other not in names}
        for same in (module, *(rest[other] for other in twins_of(module, rest))):
            replace_module_(model, same, quantized.to(module.weight.device).eval())  # type: ignore[arg-type]
    expected = _other_state(model, _quantized_layers(model))
    if set(expected) != set(state):
        raise FileError(f"the file's remaining state differs from the model's: {sorted(set(expected) ^ set(state))[:5]}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])
    return model


def layer_states(packed: PackedModel) -> list[tuple[str, QuantizedState]]:
    """The layers' codes and steps, cut out of the joint tensors in order.

    Args:
        packed: what a file holds.
    """
    metadata, parts = packed.metadata, _Parts(packed.tensors)
    found: list[tuple[str, QuantizedState]] = []
    for index, name in enumerate(metadata["names"]):
        owner = metadata["shares"][index]
        weights = _weights(metadata, index, parts) if owner < 0 else found[owner][1]
        bias = parts.take("bias", metadata["channels"][index]) if metadata["bias"][index] else None
        activation = None
        if metadata["activation_bits"][index]:
            step, offset = parts.take("activation_scale", 1)[0], parts.take("activation_zero_point", 1)[0].to(torch.int32)
            activation = (step, offset, Grid(metadata["activation_bits"][index]))
        found.append((name, replace(weights, bias=bias, activation=activation)))
    return found


def _weights(metadata: Mapping[str, Any], index: int, parts: _Parts) -> QuantizedState:
    """Codes and steps of a layer that has its own."""
    shape, channels, group = (metadata[key][index] for key in ("shapes", "channels", "group"))
    grid = Grid(metadata["weight_bits"][index], bool(metadata["weight_symmetric"][index]), group or None)
    count, steps = int(np.prod(shape, dtype=np.int64)), _step_count(shape, channels, group)
    levels = parts.unpacked("codes", count, grid.bits).to(torch.int16) + grid.lowest
    scale = parts.take("weight_scale", steps)
    zero = torch.zeros(steps, dtype=torch.uint8) if grid.symmetric else parts.unpacked("weight_zero_point", steps, grid.bits)
    zero = zero.to(torch.int32)
    if group:
        scale, zero = scale.view(channels, -1), zero.view(channels, -1)
    return QuantizedState(levels.view(shape), scale, zero, None, grid, None)


class _Parts:
    """Takes the layers' parts from the joint tensors, one behind the other."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._at: defaultdict[str, int] = defaultdict(int)

    def take(self, name: str, count: int) -> Tensor:
        """The next numbers of a tensor, a copy."""
        start = self._at[name]
        self._at[name] += count
        return self._tensors[PREFIX + name][start : start + count].clone()

    def unpacked(self, name: str, count: int, bits: int) -> Tensor:
        """The next numbers of a tensor that holds them packed, uint8 (count,)."""
        return torch.from_numpy(unpack(self.take(name, packed_size(count, bits)).numpy(), bits, count))


def _pack(levels: Tensor, grid: Grid) -> Tensor:
    """Codes or zero-points of a layer, packed; uint8 (bytes,)."""
    return torch.from_numpy(pack((levels.to(torch.int16) - grid.lowest).flatten().to(torch.uint8).cpu().numpy(), grid.bits))


def _is_transposed(layer: QuantizedLayer) -> bool:
    """Whether the weight counts inputs first."""
    return isinstance(layer.operator, Convolution | Linear) and layer.operator.transposed


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer) and module.is_quantized}


def _other_state(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """The model's state without that of its quantized layers, under any of their names."""
    inside = {id(tensor) for layer in layers.values() for tensor in layer.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in state_tensors(model).items() if id(tensor) not in inside}


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b-128 over the description, then names and bytes of all tensors in the order of their names."""
    digest = hashlib.blake2b(text.encode(), digest_size=CHECKSUM_DIGITS // 2)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
