"""How accurately torch computes in float32 while a model is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products and convolutions of float32 tensors are computed in float32, by algorithms that give the same bits each time.

    Torch otherwise rounds the numbers of a convolution to 10 bits of mantissa on CUDA (TF32), and those of a product where a user asked for
    it. Whether a rewritten model computes what the original does, and what a code of 8 bits costs, would drown in that. Settings are as
    before when the context ends.

    Example:
        >>> with exact_float32():
        ...     torch.backends.cudnn.deterministic
        True
    """
    before = _settings()
    try:
        _apply(dict.fromkeys(before, "ieee") | EXACT)
        yield
    finally:
        _apply(before)


# In the order in which they are set: the first two are older than the precisions by operator, which they set too. Torch refuses to read
# the second one, as torch.export does, while it says other than its operators.
EXACT: dict[str, object] = {
    "float32_matmul_precision": "highest",
    "cudnn.allow_tf32": False,
    "cudnn.deterministic": True,
    "cudnn.benchmark": False,
}
OPERATORS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")  # torch 2.9 and later


def _settings() -> dict[str, object]:
    """Every setting's value, in the order of `EXACT`."""
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # a user has set the precisions by operator
        convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": convolutions,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    } | {name: _backend(name).fp32_precision for name in OPERATORS if hasattr(torch.backends.cudnn, "conv")}


def _apply(values: dict[str, object]) -> None:
    """Each setting is given its value, in the order of the keys."""
    for name, value in values.items():
        if name == "float32_matmul_precision":
            torch.set_float32_matmul_precision(str(value))
        elif name in OPERATORS:
            _backend(name).fp32_precision = value
        else:
            setattr(torch.backends.cudnn, name.removeprefix("cudnn."), value)


def _backend(name: str) -> Any:
    """The owner of an operator's precision: "cudnn.conv" is `torch.backends.cudnn.conv`."""
    library, operator = name.split(".")
    return getattr(getattr(torch.backends, library), operator)
