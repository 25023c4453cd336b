"""What every range promises: one body over all of them."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subbyte.errors import OptionError
from subbyte.quantizers.ranges import LeastOutputError, MinMax, Percentile, Range

RANGES: list[Range] = [
    MinMax(),
    Percentile(),
    Percentile(99.0),
    Percentile(50.1),
    Percentile(100.0),
    LeastOutputError(),
    LeastOutputError(count=2, smallest=0.01),
    LeastOutputError(count=24, smallest=0.99),
]


@st.composite
def channels(draw: st.DrawFn) -> Tensor:
    """Values (C, N) of one sign or of both, wide or narrow, now and then all the same."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 30)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from((0.0, 1e-20, 1.0, 1e20)))
    return values + draw(st.sampled_from((0.0, -3.0, 3.0, 1e6)))


@pytest.mark.parametrize("interval", RANGES, ids=str)
@given(values=channels())
def test_candidates_lie_in_order_inside_the_values(interval: Range, values: Tensor) -> None:
    low, high = interval.candidates(values)
    assert low.shape == high.shape and low.shape[1] == len(values)
    assert low.dtype == high.dtype == torch.float32
    assert (low <= high).all()
    smallest, largest = values.aminmax(dim=1)
    slack = 1e-6 * values.abs().amax(dim=1)
    assert (low >= smallest.clamp(max=0.0) - slack).all()
    assert (high <= largest.clamp(min=0.0) + slack).all()


@pytest.mark.parametrize("interval", RANGES, ids=str)
@given(values=channels(), other=channels())
def test_the_number_of_candidates_does_not_depend_on_the_values(interval: Range, values: Tensor, other: Tensor) -> None:
    assert len(interval.candidates(values)[0]) == len(interval.candidates(other)[0])


@pytest.mark.parametrize("interval", RANGES, ids=str)
@given(values=channels())
def test_channels_are_independent(interval: Range, values: Tensor) -> None:
    low, high = interval.candidates(values)
    for channel in range(len(values)):
        alone = interval.candidates(values[channel : channel + 1])
        assert torch.equal(low[:, channel : channel + 1], alone[0])
        assert torch.equal(high[:, channel : channel + 1], alone[1])


@pytest.mark.parametrize("interval", RANGES, ids=str)
@given(values=channels())
def test_values_are_not_changed_and_order_does_not_matter(interval: Range, values: Tensor) -> None:
    before = values.clone()
    forwards = interval.candidates(values)
    backwards = interval.candidates(values.flip(1))
    assert torch.equal(values, before)
    assert torch.equal(forwards[0], backwards[0]) and torch.equal(forwards[1], backwards[1])


@pytest.mark.parametrize("interval", RANGES, ids=str)
def test_a_range_is_a_value(interval: Range) -> None:
    assert pickle.loads(pickle.dumps(interval)) == interval
    assert hash(interval) == hash(pickle.loads(pickle.dumps(interval)))


@pytest.mark.parametrize("interval", [MinMax(), Percentile(100.0), LeastOutputError()], ids=str)
@given(values=channels())
def test_the_first_candidate_is_the_whole_range_where_nothing_is_clipped(interval: Range, values: Tensor) -> None:
    low, high = interval.candidates(values)
    assert torch.equal(low[0], values.amin(dim=1)) and torch.equal(high[0], values.amax(dim=1))


def test_a_percentile_is_the_quantile() -> None:
    values = torch.randn(3, 101)
    for percent in (60.0, 90.0, 99.9):
        low, high = Percentile(percent).candidates(values)
        share = (100.0 - percent) / 200.0
        torch.testing.assert_close(low[0], values.quantile(share, dim=1))
        torch.testing.assert_close(high[0], values.quantile(1.0 - share, dim=1))


def test_clippings_shrink_in_equal_steps() -> None:
    low, high = LeastOutputError(count=4, smallest=0.25).candidates(torch.tensor([[-4.0, 8.0]]))
    assert low[:, 0].tolist() == [-4, -3, -2, -1]
    assert high[:, 0].tolist() == [8, 6, 4, 2]


@pytest.mark.parametrize("percent", [50.0, 0.0, 100.1, -1.0, float("nan")])
def test_impossible_percentiles_are_refused(percent: float) -> None:
    with pytest.raises(OptionError, match="more than 50 and at most 100"):
        Percentile(percent)


@pytest.mark.parametrize(("count", "smallest"), [(1, 0.5), (0, 0.5), (10, 0.0), (10, 1.0), (10, float("nan"))])
def test_impossible_clippings_are_refused(count: int, smallest: float) -> None:
    with pytest.raises(OptionError, match="count >= 2 and 0 < smallest < 1"):
        LeastOutputError(count, smallest)
