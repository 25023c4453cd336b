"""Scores of networks whose outputs are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from subbyte.errors import DataError, ModelError, OptionError
from subbyte.tasks import agreement, kl_divergence, top1


class Recorder(nn.Module):
    """Gives its input back and keeps how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: list[int] = []
        self.inference: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batch_sizes.append(len(x))
        self.inference.append(torch.is_inference_mode_enabled())
        return x


def test_top1_counts_in_percent() -> None:
    assert top1(Recorder().eval(), torch.eye(8), torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])) == 75


def test_batches_are_cut_and_run_in_inference_mode() -> None:
    model = Recorder().eval()
    assert top1(model, torch.eye(8), torch.arange(8), batch_size=3) == 100
    assert model.batch_sizes == [3, 3, 2]
    assert all(model.inference)
    assert not torch.is_inference_mode_enabled()


def test_preprocess_sees_each_batch() -> None:
    counts = (10 * torch.eye(4)).to(torch.uint8)
    assert top1(nn.Linear(4, 4).eval(), counts, torch.arange(4), preprocess=lambda batch: batch.float()) >= 0
    assert top1(Recorder().eval(), counts, torch.tensor([1, 0, 2, 3]), batch_size=2, preprocess=lambda x: x.float()[:, [1, 0, 2, 3]]) == 100


def test_agreement_and_divergence_of_a_network_with_itself() -> None:
    model = nn.Linear(6, 5).eval()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert agreement(model, model, x, batch_size=7) == 100
    assert kl_divergence(model, model, x, batch_size=7) == 0


def test_agreement_counts_in_percent() -> None:
    reverse = nn.Linear(4, 4, bias=False).eval()
    with torch.no_grad():
        reverse.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]))
    assert agreement(Recorder().eval(), reverse, torch.eye(4)) == 50


def test_divergence_in_nats_is_the_closed_form() -> None:
    uniform, logits = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    table = nn.Embedding.from_pretrained(torch.cat([uniform, logits])).eval()
    p_first = kl_divergence(table, Constant(logits), torch.tensor([0]))
    assert p_first == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    averaged = kl_divergence(table, Constant(logits), torch.tensor([0, 1]))
    assert averaged == pytest.approx(p_first / 2, rel=1e-6)


def test_divergence_averages_over_positions() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    by_row = kl_divergence(Recorder().eval(), nn.ReLU().eval(), x.flatten(0, 1))
    assert kl_divergence(Recorder().eval(), nn.ReLU().eval(), x, batch_size=2) == pytest.approx(by_row)


class Constant(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(x), -1)


def test_what_cannot_be_scored_is_refused() -> None:
    model, x, y = Recorder().eval(), torch.eye(4), torch.arange(4)
    with pytest.raises(DataError, match="4 inputs, but 3 labels"):
        top1(model, x, y[:3])
    with pytest.raises(DataError, match="no inputs"):
        top1(model, x[:0], y[:0])
    with pytest.raises(OptionError, match="batch_size"):
        top1(model, x, y, batch_size=0)
    with pytest.raises(DataError, match="cannot be compared"):
        kl_divergence(model, nn.Linear(4, 3).eval(), x)
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        agreement(model, Recorder().train(), x)
