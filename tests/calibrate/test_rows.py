"""Row sampling: evenly over samples and positions, each row once, held out by whole samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from subbyte.calibrate.rows import RowCounts, RowIndex, RowSampling, draw_rows, gather_rows, generator_for, held_out_samples, split_rows
from subbyte.errors import OptionError
from subbyte.model.operators import operator_of

batch_counts = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def drawn(counts: list[int], positions: int, wanted: int, share: float = 0.25, seed: int = 0) -> tuple[list[RowIndex], tuple[Tensor, ...]]:
    masks = held_out_samples(counts, share, seed)
    return draw_rows([RowCounts(count, positions) for count in counts], masks, wanted, generator_for(seed, "rows")), masks


@given(batch_counts, st.integers(1, 50), st.integers(1, 300), st.integers(0, 1000))
def test_no_row_is_drawn_twice(counts: list[int], positions: int, wanted: int, seed: int) -> None:
    for index in drawn(counts, positions, wanted, seed=seed)[0]:
        rows = index.samples * positions + index.positions
        assert len(rows.unique()) == len(rows)


@given(batch_counts, st.integers(1, 50), st.integers(1, 300), st.integers(0, 1000))
def test_rows_are_inside_and_held_out_by_sample(counts: list[int], positions: int, wanted: int, seed: int) -> None:
    indices, masks = drawn(counts, positions, wanted, seed=seed)
    assert len(indices) == len(counts)
    for index, mask, count in zip(indices, masks, counts, strict=True):
        assert len(index.samples) == len(index.positions) == len(index.held_out)
        assert ((index.samples >= 0) & (index.samples < count)).all()
        assert ((index.positions >= 0) & (index.positions < positions)).all()
        if sum(counts) > 1:
            assert torch.equal(index.held_out, mask[index.samples])


@given(batch_counts, st.integers(1, 50), st.integers(1, 300))
def test_every_sample_gives_the_same_number_and_enough_are_drawn(counts: list[int], positions: int, wanted: int) -> None:
    indices, masks = drawn(counts, positions, wanted)
    held = int(torch.cat(masks).sum())
    for held_out, samples, goal in ((False, sum(counts) - held, wanted), (True, held, wanted / 4)):
        if sum(counts) == 1:
            break
        numbers = torch.cat(
            [index.samples.bincount(minlength=len(mask))[mask == held_out] for index, mask in zip(indices, masks, strict=True)]
        )
        assert numbers.unique().numel() == 1
        each = int(numbers[0])
        assert each == positions or each * samples >= goal > (each - 1) * samples


@given(st.integers(2, 40), st.integers(0, 100))
def test_positions_are_spread_evenly(positions: int, seed: int) -> None:
    """Half of the positions of many samples: each is drawn about half of the time, the first no more often than the last."""
    samples = 400
    masks = (torch.zeros(samples, dtype=torch.bool),)
    take = -(-positions // 2)
    (index,) = draw_rows([RowCounts(samples, positions)], masks, samples * take, generator_for(seed, "rows"))
    often = index.positions.bincount(minlength=positions).float() / samples
    assert (often - take / positions).abs().max() < 0.2


@given(batch_counts, st.integers(1, 30), st.integers(1, 100), st.integers(0, 100))
def test_the_same_seed_draws_the_same(counts: list[int], positions: int, wanted: int, seed: int) -> None:
    for one, other in zip(drawn(counts, positions, wanted, seed=seed)[0], drawn(counts, positions, wanted, seed=seed)[0], strict=True):
        assert torch.equal(one.samples, other.samples)
        assert torch.equal(one.positions, other.positions)


def test_another_seed_draws_other_rows() -> None:
    one, other = (drawn([8], 400, 100, seed=seed)[0][0] for seed in (0, 1))
    assert not torch.equal(one.positions, other.positions)


def test_all_positions_are_taken_where_they_do_not_suffice() -> None:
    (index,), _ = drawn([4], 5, 10_000)
    assert sorted((index.samples * 5 + index.positions).tolist()) == list(range(20))


def test_a_single_sample_judges_by_every_eighth_row() -> None:
    (index,), (mask,) = drawn([1], 64, 64)
    assert not mask.any()
    assert int(index.held_out.sum()) == len(index.held_out) // 8 == 8


def test_a_layer_whose_first_dimension_is_not_the_batchs() -> None:
    """Four windows of each sample: all four go where the sample goes."""
    masks = (torch.tensor([True, False, False]),)
    (index,) = draw_rows([RowCounts(12, 5)], masks, 1000, generator_for(0, "rows"))
    assert torch.equal(index.held_out, index.samples < 4)


def test_a_layer_that_sees_fewer_rows_than_samples() -> None:
    (index,) = draw_rows([RowCounts(1, 5)], (torch.tensor([True, False, False]),), 1000, generator_for(0, "rows"))
    assert len(index.samples) == 5


@given(batch_counts, st.floats(0.01, 0.5), st.integers(0, 1000))
def test_held_out_samples_are_the_share_and_never_all(counts: list[int], share: float, seed: int) -> None:
    masks = held_out_samples(counts, share, seed)
    assert [len(mask) for mask in masks] == counts
    held, total = int(torch.cat(masks).sum()), sum(counts)
    assert held == (0 if total == 1 else max(1, round(share * total)))
    assert total == 1 or 1 <= held < total


def test_held_out_samples_do_not_depend_on_how_they_are_batched() -> None:
    whole, parts = held_out_samples([12], 0.25, 3), held_out_samples([5, 5, 2], 0.25, 3)
    assert torch.equal(torch.cat(whole), torch.cat(parts))


def test_generators_depend_on_seed_and_name_only() -> None:
    first = torch.rand(3, generator=generator_for(1, "conv"))
    torch.rand(100)
    assert torch.equal(torch.rand(3, generator=generator_for(1, "conv")), first)
    assert not torch.equal(torch.rand(3, generator=generator_for(2, "conv")), first)
    assert not torch.equal(torch.rand(3, generator=generator_for(1, "fc")), first)


def test_gathered_rows_are_the_operators() -> None:
    module, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 6, 6)
    operator = operator_of(module)
    assert operator is not None
    (index,), _ = drawn([3], 16, 20)
    rows = gather_rows(operator, x, index)
    y = (rows @ operator.to_matrix(module.weight.detach()).mT).permute(1, 0, 2).flatten(1) + module.bias.detach()
    torch.testing.assert_close(y, module(x).detach().flatten(2)[index.samples, :, index.positions])


@pytest.mark.parametrize("held", [[True, False, True, False], [False] * 4, [True] * 4])
def test_rows_are_split_by_the_mask(held: list[bool]) -> None:
    inputs, targets = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    fit, judge = split_rows(inputs, targets, torch.tensor(held))
    if len(set(held)) == 1:
        assert fit is judge and torch.equal(fit.inputs, inputs)
    else:
        assert torch.equal(fit.inputs, inputs[:, 1::2]) and torch.equal(judge.targets, targets[:, 0::2])


def test_rows_that_are_wanted() -> None:
    assert RowSampling(rows_per_unknown=10, least_rows=100).wanted(groups=1, unknowns=50) == 500
    assert RowSampling(rows_per_unknown=10, least_rows=100).wanted(groups=1, unknowns=5) == 100
    limited = RowSampling(most_megabytes=1.0).wanted(groups=4, unknowns=500)
    assert limited == 125
    assert RowSampling(most_megabytes=1e-6).wanted(groups=4, unknowns=500) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"rows_per_unknown": 0}, {"least_rows": 0}, {"most_megabytes": 0.0}, {"held_out": 0.0}, {"held_out": 0.6}, {"held_out": float("nan")}],
    ids=str,
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="held_out is above 0 and at most 0.5"):
        RowSampling(**wrong)  # type: ignore[arg-type]
