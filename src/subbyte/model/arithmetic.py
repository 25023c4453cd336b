"""How accurately torch computes in float32 while a model is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    settings: list[tuple[object, str, object]] = [(torch.backends.cudnn, "deterministic", True), (torch.backends.cudnn, "benchmark", False)]
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9 and later; what they replace cannot be read once they have been used
        mkldnn = torch.backends.mkldnn
        owners = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul)  # type: ignore[attr-defined]
        settings += [(owner, "fp32_precision", "ieee") for owner in owners]
    else:
        settings += [(owner, "allow_tf32", False) for owner in (torch.backends.cudnn, torch.backends.cuda.matmul)]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
