"""Grids of the factors of attention products, from what the float model computes.

step and zero-point of a factor x:   of least  sum (x - q(x))^2  among many clippings of its range, over positions that are no padding
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.model.attention import FACTORS, AttentionProducts, products_of
from subbyte.model.batches import call, select_samples
from subbyte.model.padding import real_positions, without_padding
from subbyte.quantizers.affine import fake_quantize, scale_and_zero_point
from subbyte.quantizers.ranges import LeastOutputError, Range

MOST_NUMBERS = 1 << 18  # that are searched over for one factor
RANGE = LeastOutputError(count=24)


@torch.no_grad()
def product_grids(model: nn.Module, data: CalibrationSet, interval: Range = RANGE) -> dict[str, tuple[Tensor, Tensor]]:
    """Steps and zero-points of all factors, by the attention layer's name, float32 and int32 (4,) each, in the order of `FACTORS`.

    Args:
        model: float model whose attention layers have quantisers without grids.
        data: calibration set; samples that are held out are not looked at.
        interval: clippings to choose among.
    """
    layers = products_of(model)
    seen: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    parts = [select_samples(batch, ~held) for batch, held in zip(data.batches, data.held_out, strict=True) if not bool(held.all())]
    chosen = parts[:: -(-len(parts) // 32)] if layers else []
    for part in chosen:
        with _watching(layers, seen, real_positions(part), MOST_NUMBERS // len(chosen)):
            call(model, part)
    grids = {}
    for name, products in layers.items():
        found = [_least(torch.cat(seen[name, factor]), products, interval) for factor in FACTORS]
        grids[name] = torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])
    return grids


def assign_products_(model: nn.Module, grids: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Give attention layers their grids.

    Args:
        model: is changed in place.
        grids: by the attention layer's name, float32 and int32 (4,) each.
    """
    layers = products_of(model)
    for name, (scale, zero_point) in grids.items():
        layers[name].assign_(scale, zero_point)


@contextlib.contextmanager
def _watching(
    layers: dict[str, AttentionProducts], seen: dict[tuple[str, str], list[Tensor]], real: Tensor | None, most: int
) -> Iterator[None]:
    def watch(name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[str, Tensor], output: Tensor) -> None:
            numbers = without_padding(args[1], real).flatten()
            seen[name, args[0]].append(numbers[:: max(1, numbers.numel() // most)].clone())

        return note

    handles = [products.register_forward_hook(watch(name)) for name, products in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _least(numbers: Tensor, products: AttentionProducts, interval: Range) -> tuple[Tensor, Tensor]:
    low, high = interval.candidates(numbers[None])
    best, least = None, torch.inf
    for k in range(len(low)):
        scale, zero_point = scale_and_zero_point(low[k, 0], high[k, 0], products.grid)
        error = float((fake_quantize(numbers, scale, zero_point, products.grid) - numbers).square().sum())
        if best is None or error < least:
            best, least = (scale, zero_point), error
    assert best is not None
    return best
