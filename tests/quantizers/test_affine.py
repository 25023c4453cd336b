"""The affine equations, on numbers that hypothesis makes up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subbyte.errors import OptionError
from subbyte.quantizers.affine import dequantize, fake_quantize, quantize, scale_and_zero_point, soft_quantize
from subbyte.quantizers.grid import Grid, WeightGrids

ROUNDING = 1e-4  # of a step: what float32 may add to half a step at 8 bits

grids = st.builds(Grid, st.integers(2, 8), symmetric=st.booleans())
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
lists = st.lists(numbers, min_size=1, max_size=20).map(torch.tensor)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """`low <= high`, any signs, any sizes."""
    size = 10.0 ** draw(st.integers(-20, 20))
    ends = sorted(draw(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2)))
    return torch.tensor(ends[0] * size), torch.tensor(ends[1] * size)


def inside(low: Tensor, high: Tensor) -> Tensor:
    """Numbers from the range's one end to its other, after it was widened to hold zero."""
    return torch.lerp(low.clamp(max=0.0), high.clamp(min=0.0), torch.linspace(0, 1, 257))


@given(grids)
def test_a_grid_has_two_to_the_bits_codes_and_zero_among_them(grid: Grid) -> None:
    assert grid.highest - grid.lowest + 1 == 2**grid.bits
    assert grid.lowest <= 0 <= grid.highest
    assert grid.lowest == (-(2 ** (grid.bits - 1)) if grid.symmetric else 0)


@pytest.mark.parametrize("bits", [1, 0, -1, 9, 16, 4.0, "4", None, True])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(OptionError, match="a grid has 2 to 8 bits, not"):
        Grid(bits)  # type: ignore[arg-type]


@given(lists, ranges(), grids)
def test_codes_are_whole_numbers_of_the_grid(x: Tensor, interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    codes = quantize(x, *scale_and_zero_point(*interval, grid), grid)
    assert codes.shape == x.shape and codes.dtype == x.dtype
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.lowest and codes.max() <= grid.highest


@given(ranges(), grids)
def test_inside_the_range_the_error_is_half_a_step(interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    x = inside(*interval)
    error = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point) - x
    assert error.abs().max() <= scale * (0.5 + ROUNDING)


@given(ranges(), grids)
def test_a_symmetric_grid_clips_neither_end(interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, Grid(grid.bits, symmetric=True))
    assert scale * -(2 ** (grid.bits - 1)) <= interval[0] * (1 - 1e-6)
    assert scale * (2 ** (grid.bits - 1) - 1) >= interval[1] * (1 - 1e-6)
    assert zero_point == 0


@given(ranges(), grids)
def test_zero_is_represented_exactly(interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    zero = torch.zeros(())
    assert torch.equal(dequantize(quantize(zero, scale, zero_point, grid), scale, zero_point), zero)
    assert torch.equal(fake_quantize(zero, scale, zero_point, grid), zero)


@given(ranges(), grids)
def test_scale_is_positive_and_zero_point_a_code(interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert scale > 0 and torch.isfinite(scale)
    assert grid.lowest <= zero_point <= grid.highest


@given(ranges(), grids)
def test_numbers_on_the_grid_stay(interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    codes = torch.arange(grid.lowest, grid.highest + 1)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, grid), codes.float())


@given(lists, ranges(), grids)
def test_quantizing_twice_changes_nothing(x: Tensor, interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    once = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    assert torch.equal(dequantize(quantize(once, scale, zero_point, grid), scale, zero_point), once)


@given(lists, ranges(), grids)
def test_order_is_kept(x: Tensor, interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    codes = quantize(x.sort().values, *scale_and_zero_point(*interval, grid), grid)
    assert (codes.diff() >= 0).all()


@given(lists, ranges(), grids)
def test_fake_quantize_is_the_equations_to_the_bit(x: Tensor, interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    for values in (x, inside(*interval)):
        before = values.clone()
        expected = dequantize(quantize(values, scale, zero_point, grid), scale, zero_point)
        assert torch.equal(fake_quantize(values, scale, zero_point, grid), expected)
        assert torch.equal(values, before)


@pytest.mark.parametrize("shape", [(), (3,), (2**18 + 5,), (5, 2**17), (0, 4)])
def test_fake_quantize_of_any_size_is_the_equations_to_the_bit(shape: tuple[int, ...]) -> None:
    x, scale, zero_point, grid = torch.randn(shape), torch.tensor(0.02), torch.tensor(100, dtype=torch.int32), Grid(8)
    for values in (x, x.T if x.dim() == 2 else x, x.expand(2, *shape)):
        expected = dequantize(quantize(values, scale, zero_point, grid), scale, zero_point)
        assert torch.equal(fake_quantize(values, scale, zero_point, grid), expected)


def test_fake_quantize_can_be_exported_with_any_batch() -> None:
    class Rounding(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), Grid(3))

    program = torch.export.export(Rounding(), (torch.randn(4, 2**17),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(7, 2**17)
    assert torch.equal(program.module()(x), Rounding()(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_empty_range_keeps_zero(symmetric: bool) -> None:
    grid = Grid(4, symmetric=symmetric)
    scale, zero_point = scale_and_zero_point(torch.zeros(3), torch.zeros(3), grid)
    assert (scale > 0).all()
    assert torch.equal(dequantize(quantize(torch.zeros(3), scale, zero_point, grid), scale, zero_point), torch.zeros(3))


def test_ties_go_to_the_even_code() -> None:
    codes = quantize(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0), torch.tensor(0), Grid(4, symmetric=True))
    assert codes.tolist() == [-2, 0, 0, 2, 2]


def test_channels_are_independent() -> None:
    low, high = torch.tensor([-1.0, 0.0, -5.0, 2.0]), torch.tensor([1.0, 3.0, -2.0, 6.0])
    for grid in (Grid(4), Grid(4, symmetric=True)):
        scale, zero_point = scale_and_zero_point(low, high, grid)
        for channel in range(4):
            one = scale_and_zero_point(low[channel], high[channel], grid)
            assert (scale[channel], zero_point[channel]) == one


@given(lists, ranges(), grids)
def test_soft_quantize_has_the_values_of_the_equations(x: Tensor, interval: tuple[Tensor, Tensor], grid: Grid) -> None:
    scale, zero_point = scale_and_zero_point(*interval, grid)
    values = torch.cat([x.clamp(-1e6 * scale, 1e6 * scale), inside(*interval)])
    expected = dequantize(quantize(values, scale, zero_point, grid), scale, zero_point)
    torch.testing.assert_close(soft_quantize(values, scale, zero_point.float(), grid) / scale, expected / scale, rtol=0, atol=1e-3)


def test_soft_gradients_pass_inside_the_range_and_end_outside() -> None:
    x, scale, zero_point = (
        torch.tensor([-9.0, 0.3, 9.0], requires_grad=True),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(4.0, requires_grad=True),
    )
    for part, by_scale, by_zero in ((0, -4.0, -0.5), (1, 1 - 0.6, 0.0), (2, 3.0, -0.5)):
        gradients = torch.autograd.grad(soft_quantize(x, scale, zero_point, Grid(3))[part], (x, scale, zero_point))
        assert gradients[0].tolist() == [float(k == 1 and part == 1) for k in range(3)]
        assert float(gradients[1]) == pytest.approx(by_scale)
        assert float(gradients[2]) == pytest.approx(by_zero)


@pytest.mark.parametrize("group", [None, 16])
def test_weights_have_zero_points_up_to_6_bits_unless_they_are_symmetric(group: int | None) -> None:
    for bits in range(2, 9):
        assert WeightGrids(group=group).at(bits) == Grid(bits, symmetric=bits > 6, group=group)
        assert WeightGrids(symmetric=True, group=group).at(bits) == Grid(bits, symmetric=True, group=group)
    with pytest.raises(OptionError, match="a group is a positive number"):
        WeightGrids(group=0)
