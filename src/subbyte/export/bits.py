"""Dense packing of codes of 1 to 8 bits: one algorithm for every width.

Code `i` of width `b` occupies the bits `i b .. i b + b - 1` of a stream whose bit `k` is bit `k mod 8` (least significant first) of byte
`k div 8`. The last byte is filled with zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from subbyte.errors import OptionError

Bytes = npt.NDArray[np.uint8]
CHUNK_CODES = 1 << 20  # a multiple of 8, so that every chunk ends on a byte's border


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take.

    Args:
        count: number of codes.
        bits: width of a code.

    Example:
        >>> packed_size(3, 3)
        2
    """
    return -(-count * bits // 8)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes densely.

    Args:
        codes: uint8 (N,), each below `2^bits`.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 (ceil(N bits / 8),).

    Raises:
        OptionError: if the width is not 1 to 8, or a code does not fit.

    Example:
        >>> pack(np.array([1, 2, 3], dtype=np.uint8), 3).tolist()  # 011 010 001, read from the right
        [209, 0]
    """
    _check(bits)
    if codes.size and int(codes.max()) >> bits:
        raise OptionError(f"code {int(codes.max())} does not fit into {bits} bits")
    parts = []
    for at in range(0, codes.size, CHUNK_CODES):
        chunk = codes[at : at + CHUNK_CODES]
        parts.append(np.packbits(np.unpackbits(chunk[:, None], axis=1, bitorder="little", count=bits).reshape(-1), bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """Inverse of `pack`.

    Args:
        packed: uint8 (ceil(count bits / 8),).
        bits: width of a code, 1 to 8.
        count: number of codes.

    Returns:
        uint8 (count,).

    Raises:
        OptionError: if the width is not 1 to 8, or the number of bytes is not what `count` codes take.

    Example:
        >>> unpack(np.array([209, 0], dtype=np.uint8), 3, 3).tolist()
        [1, 2, 3]
    """
    _check(bits)
    if packed.size != packed_size(count, bits):
        raise OptionError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {packed.size}")
    codes = np.empty(count, dtype=np.uint8)
    for at in range(0, count, CHUNK_CODES):
        size = min(CHUNK_CODES, count - at)
        stream = np.unpackbits(packed[at * bits // 8 : packed_size(at + size, bits)], bitorder="little", count=size * bits)
        codes[at : at + size] = np.packbits(stream.reshape(size, bits), axis=1, bitorder="little")[:, 0]
    return codes


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise OptionError(f"codes have 1 to 8 bits, not {bits}")
