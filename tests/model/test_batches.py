"""Batches: tensors, tuples and mappings, with samples along dimension 0."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from subbyte.errors import DataError
from subbyte.model.batches import as_batches, call, describe, map_tensors, sample_count, select_samples, tensors

Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - the plain kind is what models return


@given(st.integers(1, 200))
def test_a_tensor_is_cut_into_batches_and_none_is_lost(count: int) -> None:
    x = torch.arange(float(count))[:, None]
    batches = as_batches(x)
    assert torch.equal(torch.cat(batches), x)
    assert {batch.shape[0] for batch in batches[:-1]} <= {32}
    assert 1 <= batches[-1].shape[0] <= 32


def test_an_iterator_is_read_once_and_kept() -> None:
    batches = as_batches(torch.ones(2, 3) * i for i in range(3))
    assert [float(batch[0, 0]) for batch in batches] == [0, 1, 2]


def test_a_data_loader_gives_its_batches() -> None:
    loader = torch.utils.data.DataLoader(torch.arange(10.0)[:, None], batch_size=4)
    assert [len(batch) for batch in as_batches(loader)] == [4, 4, 2]


def test_empty_batches_are_passed_over() -> None:
    assert [len(batch) for batch in as_batches([torch.ones(0, 3), torch.ones(2, 3)])] == [2]


@pytest.mark.parametrize(
    "data",
    [[], (), iter(()), torch.zeros(0, 3), [torch.zeros(0, 3)], torch.utils.data.DataLoader(torch.zeros(0, 3))],
    ids=["list", "tuple", "iterator", "tensor", "list of a tensor", "loader"],
)
def test_no_sample_at_all_is_refused(data: object) -> None:
    with pytest.raises(DataError, match="calibration set is empty"):
        as_batches(data)


@pytest.mark.parametrize("data", [None, 3, "images/", b"x", {"x": torch.ones(2, 3)}], ids=repr)
def test_what_is_no_iterable_of_batches_is_refused(data: object) -> None:
    with pytest.raises(DataError, match="a tensor or an iterable of batches, not"):
        as_batches(data)


@pytest.mark.parametrize("batch", [3, "text", (), {}, torch.tensor(1.0), (torch.tensor(1.0),), {"x": None}], ids=repr)
def test_a_batch_without_samples_is_refused_by_its_number(batch: object) -> None:
    with pytest.raises(DataError, match="batch 1 holds no tensor with samples"):
        as_batches([torch.ones(2, 3), batch])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (torch.ones(2), x), lambda x: {"x": {"deep": [x]}}])
def test_numbers_that_are_not_finite_are_refused_by_the_batchs_number(bad: float, wrap: object) -> None:
    x = torch.ones(2, 3)
    x[1, 2] = bad
    with pytest.raises(DataError, match="batch 1 holds NaN or infinite"):
        as_batches([torch.ones(2, 3), wrap(x)])  # type: ignore[operator]


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    name: str = "text"


def test_every_tensor_is_found_in_order() -> None:
    value = Output(torch.tensor(0), [torch.tensor(1), torch.tensor(2)])
    nested = {"a": value, "b": Pair(torch.tensor(3), {"c": torch.tensor(4)}), "d": None}
    assert [int(tensor) for tensor in tensors(nested)] == [0, 1, 2, 3, 4]


def test_structure_is_kept_when_tensors_change() -> None:
    nested = {"a": Pair(torch.tensor(1), "text"), "b": [torch.tensor(2), (torch.tensor(3),)]}
    changed = map_tensors(nested, lambda tensor: tensor * 2)
    assert changed == {"a": Pair(torch.tensor(2), "text"), "b": [torch.tensor(4), (torch.tensor(6),)]}
    assert isinstance(changed["a"], Pair)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.ones(5, 2), 5),
        ((torch.tensor(1.0), torch.ones(3)), 3),
        ({"scale": 2, "x": torch.ones(4, 1)}, 4),
        ((), 0),
    ],
)
def test_samples_are_counted_by_the_first_tensor_that_has_some(batch: object, count: int) -> None:
    assert sample_count(batch) == count


def test_chosen_samples_are_cut_out_of_every_tensor_that_holds_them() -> None:
    batch = {"x": torch.arange(4), "mask": torch.arange(8).view(4, 2), "table": torch.arange(3), "scale": torch.tensor(2.0), "name": "n"}
    cut = select_samples(batch, torch.tensor([True, False, False, True]))
    assert cut["x"].tolist() == [0, 3]
    assert cut["mask"].tolist() == [[0, 1], [6, 7]]
    assert cut["table"].tolist() == [0, 1, 2]
    assert cut["scale"] == 2 and cut["name"] == "n"


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return (x if y is None else x + y) * scale


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(2), 1.0),
        ((torch.ones(2), torch.ones(2)), 2.0),
        ([torch.ones(2), torch.ones(2)], 2.0),
        ({"x": torch.ones(2), "scale": 3.0}, 3.0),
        (OrderedDict(x=torch.ones(2), y=torch.ones(2), scale=2.0), 4.0),
    ],
)
def test_tuples_are_positional_and_mappings_are_keywords(batch: object, expected: float) -> None:
    assert call(Sum(), batch).tolist() == [expected, expected]


def test_a_batch_is_described_by_shapes() -> None:
    described = describe({"ids": torch.zeros(2, 3, dtype=torch.int64), "n": [torch.zeros(()), "text"]})
    assert described == "{ids: int64 (2, 3), n: (float32 (), str)}"
