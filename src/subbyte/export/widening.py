"""Weight codes at their true width in an ONNX file, and the standard operators that widen them to INT8.

Runtimes fold these operators when they load the file, find plain INT8 weights, and use their int8 kernels.

* 8 bits: INT8. 4 bits without zero-points: INT4 and Cast.
* Other widths: a width is a sum of 4, 2 and 1, and codes are split into planes of so many bits. A plane is dense in UINT8; column `i` of

      Mod(Div(bytes, 2^(k i)), 2^k)        bytes: (N, 1), powers: (1, 8 / k), in INT32

  holds codes `8 / k * row + i`. There is one plane of 4, one of 2 and one of 1 bit for all layers; Split gives each width its part of
  each, these are added up, times the power of two at which they start, and Split, Reshape and a last Cast to INT8 give each layer its own.
* Zero-points are codes of their weights' width, and stand behind them in the same planes; Sub takes them off in front of the last Cast.

OpenVINO 2026.4 folds division and Cast in this order and then runs in int8; it does not do so behind BitShift and BitwiseAnd, or where the
last operator is not the Cast (ONNX Runtime 1.32 folds all of these). `tests/export/test_onnx.py` checks that both run every width in int8.

Steps are FLOAT16 times one power of two, and biases INT16 times a power of two for each block, in one stream of all convolutions as well:
so `constants` has rounded them, and nothing more is lost here. A file pays some 25 bytes for an operator and 12 for a constant, which in
small networks is more than what these streams hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from subbyte.export.bits import pack
from subbyte.export.constants import BIAS_BLOCK, LayerConstants, bias_blocks, bias_powers
from subbyte.export.onnx_builder import Builder
from subbyte.quantizers.grid import Grid

Codes = npt.NDArray[np.int16]
Kind = tuple[int, bool]  # bits, and whether the grid is symmetric
PLANES = (4, 2, 1)  # bits
INT8_BITS, INT4_BITS = 8, 4
LEAST_STREAM = 64  # numbers; fewer take less room as they are than with the operators that widen them
FLOAT16_EXPONENT = 15  # of the largest power of two in FLOAT16


@dataclass(frozen=True, eq=False)
class Stored:
    """Weight codes to be stored.

    Args:
        codes: int16, the shape in which the graph reads them.
        grid: of the codes.
        zero_point: int32, broadcastable to the codes, or (rows, K, 1) where `group` is given; None on a symmetric grid, and where it is
            left to `DequantizeLinear`.
        group: how many consecutive codes of a row share a zero-point; divides a row.
    """

    codes: Codes
    grid: Grid
    zero_point: npt.NDArray[np.int32] | None
    group: int | None = None

    def levels(self) -> Codes:
        """Codes less zero-points, int16, the shape of the codes."""
        if self.zero_point is None:
            return self.codes
        cut = self.codes if self.group is None else self.codes.reshape(len(self.codes), -1, self.group)
        return (cut - self.zero_point).astype(np.int16).reshape(self.codes.shape)


def widen_(builder: Builder, stored: Mapping[str, Stored]) -> dict[str, ir.Value]:
    """Add codes and the operators that widen them, zero-points subtracted.

    Args:
        builder: of the graph.
        stored: by key; affine grids of 8 bits are left to `DequantizeLinear`.

    Returns:
        INT8 values by key.
    """
    values: dict[str, ir.Value] = {}
    groups: dict[Kind, dict[str, Stored]] = defaultdict(dict)
    for key, item in stored.items():
        if item.grid.symmetric and item.grid.bits == INT8_BITS:
            values[key] = builder.constant(item.codes.astype(np.int8))
        elif item.grid.symmetric and item.grid.bits == INT4_BITS:
            values[key] = builder.cast(builder.constant(item.codes.astype(ml_dtypes.int4)), ir.DataType.INT8)
        else:
            groups[item.grid.bits, item.grid.symmetric][key] = item
    flat = _from_planes(builder, {kind: _stream(group) for kind, group in groups.items()})
    for kind, group in groups.items():
        values |= _layers_of(builder, group, flat[kind])
    return values


def widen_numbers_(builder: Builder, layers: Mapping[str, LayerConstants]) -> tuple[dict[str, ir.Value], dict[str, ir.Value]]:
    """Add steps and biases of output channels, in blocks:

        s_w = FLOAT16 2^e      b = (s_w (s_x 2^k)) INT16        one `s_x 2^k` for each block

    Args:
        builder: of the graph.
        layers: those with `short` numbers, by key.

    Returns:
        Steps and biases, FLOAT (C_out,), by key; those of layers whose steps FLOAT16 does not hold are left out.
    """
    most = max((float(item.scale.max()) for item in layers.values()), default=1.0)
    unit = np.float32(2.0 ** (np.frexp(most)[1] - 1 - FLOAT16_EXPONENT))
    held = {key: item for key, item in layers.items() if np.array_equal((item.scale.numpy() / unit).astype(np.float16) * unit, item.scale)}
    different = {_identity(item): item for item in held.values()}  # a layer that is called several times has its numbers several times
    if sum(len(item.scale) for item in different.values()) < LEAST_STREAM:
        return {}, {}
    filled = [-len(item.scale) % BIAS_BLOCK for item in different.values()]
    scales = [np.pad(item.scale.numpy() / unit, (0, rest)) for item, rest in zip(different.values(), filled, strict=True)]
    blocks = [bias_blocks(item.bias_codes.numpy()) for item in different.values() if item.bias_codes is not None]
    powers = [bias_powers(block) for block in blocks]
    inputs = [np.float32(item.input_scale) * power.astype(np.float32) for item, power in zip(different.values(), powers, strict=True)]
    codes = np.concatenate([block / power for block, power in zip(blocks, powers, strict=True)]).astype(np.int16)

    def numbers(array: npt.NDArray[Any]) -> ir.Value:
        return builder.cast(builder.constant(array), ir.DataType.FLOAT)

    steps = builder.add("Mul", numbers(np.concatenate(scales).astype(np.float16).reshape(-1, BIAS_BLOCK)), builder.constant(unit))
    units = builder.add("Mul", steps, builder.constant(np.concatenate(inputs)))
    biases = builder.add("Mul", numbers(codes), units)
    sizes = [size for item, rest in zip(different.values(), filled, strict=True) for size in (len(item.scale), rest) if size]
    found: list[dict[str, ir.Value]] = []
    for stream in (steps, biases):
        parts = iter(_split(builder, builder.add("Reshape", stream, builder.constant(np.array([-1]))), sizes))
        by_layer = {}
        for layer, rest in zip(different, filled, strict=True):
            by_layer[layer] = next(parts)
            if rest:
                next(parts)  # what fills up a block is nobody's
        found.append({key: by_layer[_identity(item)] for key, item in held.items()})
    return found[0], found[1]


def _identity(constants: LayerConstants) -> tuple[bytes, bytes, float | None]:
    assert constants.bias_codes is not None
    return constants.scale.numpy().tobytes(), constants.bias_codes.numpy().tobytes(), constants.input_scale


def _split(builder: Builder, stream: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """Consecutive parts of a stream."""
    if len(sizes) == 1:
        return [stream]
    return builder.add_many("Split", [stream, builder.constant(np.array(sizes))], len(sizes))


def _stream(group: Mapping[str, Stored]) -> npt.NDArray[np.uint8]:
    """Codes of all layers of a width from 0 on, then their zero-points, filled up to whole bytes of every plane."""
    zeros = [item.zero_point.astype(np.uint8).ravel() for item in group.values() if item.zero_point is not None]
    stream = np.concatenate([*((item.codes - item.grid.lowest).astype(np.uint8).ravel() for item in group.values()), *zeros])
    return np.pad(stream, (0, -stream.size % 8))


def _from_planes(builder: Builder, streams: Mapping[Kind, npt.NDArray[np.uint8]]) -> dict[Kind, ir.Value]:
    """INT32 (N,) for each stream, codes from 0 on."""
    totals: dict[Kind, ir.Value] = {}
    starts = dict.fromkeys(streams, 0)
    for bits in PLANES:
        held = {kind: stream for kind, stream in streams.items() if kind[0] & bits}
        if not held:
            continue
        parts = [((stream >> starts[kind]) & ((1 << bits) - 1)).astype(np.uint8) for kind, stream in held.items()]
        plane = _plane(builder, np.concatenate(parts), bits)
        for kind, part in zip(held, _split(builder, plane, [part.size for part in parts]), strict=True):
            start = starts[kind]
            shifted = builder.add("Mul", part, builder.constant(np.int32(1 << start))) if start else part
            totals[kind] = builder.add("Add", totals[kind], shifted) if start else shifted
            starts[kind] += bits
    return totals


def _layers_of(builder: Builder, group: Mapping[str, Stored], flat: ir.Value) -> dict[str, ir.Value]:
    """INT8 for each layer of a width."""
    grid = next(iter(group.values())).grid
    signed = builder.add("Sub", flat, builder.constant(np.int32(-grid.lowest))) if grid.symmetric else flat
    affine = {key: item.zero_point for key, item in group.items() if item.zero_point is not None}
    counts = [item.codes.size for item in group.values()] + [zero.size for zero in affine.values()]
    padding = -sum(counts) % 8
    parts = iter(_split(builder, signed, counts + ([padding] if padding else [])))  # the padding is nobody's
    codes = {key: next(parts) for key in group}
    zeros = {key: _reshaped(builder, next(parts), (-1, *zero.shape[1:])) for key, zero in affine.items()}
    values = {}
    for key, item in group.items():
        shape = item.codes.shape
        value = _reshaped(builder, codes[key], shape if item.group is None else (shape[0], -1, item.group))
        value = builder.add("Sub", value, zeros[key]) if key in zeros else value
        value = value if item.group is None else _reshaped(builder, value, shape)
        values[key] = builder.cast(value, ir.DataType.INT8)
    return values


def _reshaped(builder: Builder, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    return builder.add("Reshape", value, builder.constant(np.array(shape)))


def _plane(builder: Builder, codes: npt.NDArray[np.uint8], bits: int) -> ir.Value:
    """INT32 (N,) of codes below `2^bits`."""
    stored = builder.cast(builder.constant(pack(codes, bits)[:, None]), ir.DataType.INT32)
    powers = (1 << np.arange(0, 8, bits)).astype(np.int32)[None]
    spread = builder.add("Mod", builder.add("Div", stored, builder.constant(powers)), builder.constant(np.int32(1 << bits)))
    return builder.add("Reshape", spread, builder.constant(np.array([-1])))
