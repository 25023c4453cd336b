"""The small network learns the digits, quickly and the same each time."""

from __future__ import annotations

import sys

import pytest
import torch

from subbyte.errors import DataError
from subbyte.tasks import DigitsNet, digits_split, top1, train_digits_net


def test_accuracy_on_the_test_part(trained_digits_net: DigitsNet) -> None:
    _, _, test_x, test_y = digits_split(seed=0)
    assert not trained_digits_net.training
    assert top1(trained_digits_net, test_x, test_y) >= 98


def test_training_again_gives_the_same_network_and_leaves_the_global_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # by sys.modules, because the package's attribute of that name is the task's builder
    monkeypatch.setattr(sys.modules["subbyte.tasks.digits"], "EPOCHS", 1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = train_digits_net(seed=0).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    torch.rand(1)
    for name, tensor in train_digits_net(seed=0).state_dict().items():
        assert torch.equal(tensor, first[name]), name
    assert not torch.equal(train_digits_net(seed=1).conv1.weight, first["conv1.weight"])


def test_split_shares_no_sample_and_depends_on_the_seed() -> None:
    train_x, train_y, test_x, test_y = digits_split(seed=0)
    assert (train_x.shape, test_x.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert train_x.dtype == torch.float32
    assert (train_x.min(), train_x.max()) == (0, 1)
    assert sorted(set(train_y.tolist()) | set(test_y.tolist())) == list(range(10))
    assert torch.equal(digits_split(seed=0)[2], test_x)
    assert not torch.equal(digits_split(seed=1)[2], test_x)
    # scikit-learn's set holds no picture twice, so that parts sharing a picture share a sample
    assert not {x.numpy().tobytes() for x in train_x} & {x.numpy().tobytes() for x in test_x}


def test_without_scikit_learn_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install \"subbyte\[demo\]\""):
        digits_split()
