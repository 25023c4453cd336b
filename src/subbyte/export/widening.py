"""Weight codes at their true width in an ONNX file, and the standard operators that widen them to INT8.

Runtimes fold these operators when they load the file, find plain INT8 weights, and use their int8 kernels.

* 8 bits: INT8. 4 bits: INT4 and Cast.
* Other widths: a width is a sum of 4, 2 and 1, and codes are split into planes of so many bits. A plane is dense in UINT8; column `i` of

      Mod(Div(bytes, 2^(k i)), 2^k)        bytes: (N, 1), powers: (1, 8 / k), in INT32

  holds codes `8 / k * row + i`. Planes are added up, times the power of two at which they start. All layers of a width share these
  operators; Split, Reshape and a last Cast to INT8 give each layer its own.

OpenVINO 2026.4 folds division and Cast in this order and then runs in int8; it does not do so behind BitShift and BitwiseAnd, or where the
last operator is not the Cast (ONNX Runtime 1.32 folds all of these). `tests/export/test_onnx.py` checks that both run every width in int8.

Biases are INT32, the unit in which kernels add up; most fit into INT16, and are stored so, in one stream as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from subbyte.export.bits import pack
from subbyte.export.onnx_builder import Builder
from subbyte.quantizers.grid import Grid

Codes = npt.NDArray[np.int16]
Biases = npt.NDArray[np.int32]
PLANES = (4, 2, 1)  # bits
INT8_BITS, INT4_BITS = 8, 4
LEAST_STREAM = 64  # biases; fewer take less room in INT32 than the operators that widen them


@dataclass(frozen=True, eq=False)
class Stored:
    """Weight codes to be stored.

    Args:
        codes: int16, the shape in which the graph reads them.
        grid: of the codes.
        zero_point: int32, broadcastable to the codes; None on a symmetric grid, and where it is left to `DequantizeLinear`.
    """

    codes: Codes
    grid: Grid
    zero_point: npt.NDArray[np.int32] | None


def widen_(builder: Builder, stored: Mapping[str, Stored]) -> dict[str, ir.Value]:
    """Add codes and the operators that widen them, zero-points subtracted.

    Args:
        builder: of the graph.
        stored: by key; affine grids of 8 bits are left to `DequantizeLinear`.

    Returns:
        INT8 values by key.
    """
    values: dict[str, ir.Value] = {}
    shared: dict[tuple[int, bool], dict[str, Stored]] = defaultdict(dict)
    for key, item in stored.items():
        if item.grid.symmetric and item.grid.bits == INT8_BITS:
            values[key] = builder.constant(item.codes.astype(np.int8))
        elif item.grid.symmetric and item.grid.bits == INT4_BITS:
            values[key] = builder.cast(builder.constant(item.codes.astype(ml_dtypes.int4)), ir.DataType.INT8)
        else:
            shared[item.grid.bits, item.grid.symmetric][key] = item
    for group in shared.values():
        values |= _from_planes(builder, group)
    return values


def widen_biases_(builder: Builder, biases: Mapping[str, Biases]) -> dict[str, ir.Value]:
    """Add biases and the operators that widen them.

    Args:
        builder: of the graph.
        biases: int32 (C_out,) by key.

    Returns:
        INT32 values by key.
    """
    limits = np.iinfo(np.int16)
    short = {key: codes for key, codes in biases.items() if codes.min() >= limits.min and codes.max() <= limits.max}
    if sum(codes.size for codes in short.values()) < LEAST_STREAM:
        short = {}
    values = {key: builder.constant(codes) for key, codes in biases.items() if key not in short}
    if short:
        stream = builder.cast(builder.constant(np.concatenate(list(short.values())).astype(np.int16)), ir.DataType.INT32)
        values |= zip(short, _split(builder, stream, [codes.size for codes in short.values()]), strict=True)
    return values


def _split(builder: Builder, stream: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """Consecutive parts of a stream."""
    if len(sizes) == 1:
        return [stream]
    return builder.add_many("Split", [stream, builder.constant(np.array(sizes))], len(sizes))


def _from_planes(builder: Builder, group: Mapping[str, Stored]) -> dict[str, ir.Value]:
    """One stream of codes for all layers of a width."""
    grid = next(iter(group.values())).grid
    counts = [item.codes.size for item in group.values()]
    padding = -sum(counts) % 8
    stream = np.concatenate(
        [(item.codes - grid.lowest).astype(np.uint8).ravel() for item in group.values()] + [np.zeros(padding, np.uint8)]
    )
    total: ir.Value | None = None
    start = 0
    for bits in PLANES:
        if grid.bits & bits:
            plane = _plane(builder, ((stream >> start) & ((1 << bits) - 1)).astype(np.uint8), bits)
            shifted = builder.add("Mul", plane, builder.constant(np.int32(1 << start))) if start else plane
            total = shifted if total is None else builder.add("Add", total, shifted)
            start += bits
    assert total is not None
    flat = builder.add("Sub", total, builder.constant(np.int32(-grid.lowest))) if grid.symmetric else total
    parts = _split(builder, flat, counts + ([padding] if padding else []))
    values = {}
    for (key, item), part in zip(group.items(), parts, strict=False):  # the padding is nobody's
        value = builder.add("Reshape", part, builder.constant(np.array(item.codes.shape)))
        if item.zero_point is not None:
            zero = builder.cast(builder.constant(item.zero_point.astype(np.uint8)), ir.DataType.INT32)
            value = builder.add("Sub", value, zero)
        values[key] = builder.cast(value, ir.DataType.INT8)
    return values


def _plane(builder: Builder, codes: npt.NDArray[np.uint8], bits: int) -> ir.Value:
    """INT32 (N,) of codes below `2^bits`."""
    stored = builder.cast(builder.constant(pack(codes, bits)[:, None]), ir.DataType.INT32)
    powers = (1 << np.arange(0, 8, bits)).astype(np.int32)[None]
    spread = builder.add("Mod", builder.add("Div", stored, builder.constant(powers)), builder.constant(np.int32(1 << bits)))
    return builder.add("Reshape", spread, builder.constant(np.array([-1])))
