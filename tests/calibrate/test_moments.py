"""Centred moments: add up in any way, and survive a large mean."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subbyte.calibrate import moments
from subbyte.calibrate.moments import Moments, merge, moments_of


def direct(x: Tensor, y: Tensor) -> Moments:
    """The definition in float64."""
    x, y = x.double(), y.double()
    dx, dy = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return Moments(x.shape[1], x.mean(dim=1), y.mean(dim=1), dx.mT @ dx, dx.mT @ dy, dy.square().sum(dim=1))


def check(found: Moments, expected: Moments, tolerance: float) -> None:
    assert found.count == expected.count
    sizes = {"xx": expected.xx.abs().max(), "yy": expected.yy.max(), "xy": (expected.xx.abs().max() * expected.yy.max()).sqrt()}
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        given, wanted = getattr(found, name), getattr(expected, name)
        assert given.dtype == torch.float64
        assert given.shape == wanted.shape
        torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance * float(sizes.get(name, wanted.abs().max()) + 1e-6))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Inputs (G, R, n) and targets (G, R, O)."""
    groups, count, n, outputs = (draw(st.integers(1, high)) for high in (3, 30, 5, 4))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shift, size = draw(st.sampled_from((0.0, 1.0, -30.0))), draw(st.sampled_from((1e-3, 1.0, 1e3)))
    return (torch.randn(groups, count, n, generator=chance) + shift) * size, torch.randn(groups, count, outputs, generator=chance) - shift


@given(rows())
def test_moments_are_their_definition(case: tuple[Tensor, Tensor]) -> None:
    check(moments_of(*case), direct(*case), 1e-4)


@given(rows(), st.lists(st.integers(1, 10), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_parts_add_up_in_any_order(case: tuple[Tensor, Tensor], sizes: list[int], random: object) -> None:
    x, y = case
    parts, at = [], 0
    while at < x.shape[1]:
        size = sizes[len(parts) % len(sizes)]
        parts.append(moments_of(x[:, at : at + size], y[:, at : at + size]))
        at += size
    while len(parts) > 1:
        random.shuffle(parts)  # type: ignore[attr-defined]
        parts = [merge(parts[0], parts[1]), *parts[2:]]
    check(parts[0], direct(x, y), 1e-4)


@given(rows(), st.integers(1, 7))
def test_chunks_do_not_matter(case: tuple[Tensor, Tensor], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CHUNK_ROWS", chunk)
        check(moments_of(*case), direct(*case), 1e-4)


@pytest.mark.parametrize("mean", [10.0, 1e3, 1e5])
def test_a_large_mean_does_not_drown_a_small_spread(mean: float) -> None:
    x, y = torch.randn(1, 20_000, 4) + mean, torch.randn(1, 20_000, 3) - mean
    check(moments_of(x, y), direct(x, y), 2e-3)


def test_many_rows_with_a_drifting_mean_add_up() -> None:
    drift = torch.linspace(0, 1000, 20_000)[None, :, None]
    x, y = torch.randn(1, 20_000, 3) + drift, torch.randn(1, 20_000, 2) + drift
    check(moments_of(x, y), direct(x, y), 1e-4)


def test_constant_rows_have_no_spread() -> None:
    found = moments_of(torch.full((2, 9, 3), 0.1), torch.full((2, 9, 1), 7.3))
    assert float(found.xx.abs().max()) < 1e-12 and float(found.yy.abs().max()) < 1e-9


def test_one_row_is_enough() -> None:
    found = moments_of(torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[5.0]]]))
    assert astuple(found)[0] == 1
    assert found.mean_x.tolist() == [[2, 3]] and not found.xx.any()
