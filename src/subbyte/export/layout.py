"""What an ONNX file holds for the runtime that it is meant for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What a target asks of its files, beside standard operators.

    Args:
        signed_codes: whether all codes are INT8 with zero-point 0, stored as they are, and biases float32.
        unsigned_weights: whether weights of 8 bits are UINT8 with zero-point 128, as processors need them whose kernels for INT8 ones lose
            sums (`saturation`).
        channel_blocks: whether channels are filled up with zeros to the blocks in which ONNX Runtime's int8 kernels work
            (`channel_blocks`).
        channels_last: whether large means over all positions read codes with channels last, as ONNX Runtime has them (`means`).
        token_rows: whether linear layers over sequences work on one row for each token (`token_rows`).
        apart: whether linear layers and what reads them are kept apart where ONNX Runtime would compute both in float32 (`apart`).

    Example:
        >>> Layout().signed_codes
        False
    """

    signed_codes: bool = False
    unsigned_weights: bool = False
    channel_blocks: bool = False
    channels_last: bool = False
    token_rows: bool = False
    apart: bool = False


PLAIN = Layout()
