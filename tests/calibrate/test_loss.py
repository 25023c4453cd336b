"""Distances between outputs: closed forms, and means over any batching."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from subbyte.calibrate.loss import KLDivergence, OutputLoss, RelativeSquaredError, check_output, measure
from subbyte.errors import ModelError, OptionError

LOSSES: list[OutputLoss] = [KLDivergence(), KLDivergence(temperature=3.0), RelativeSquaredError()]
losses = pytest.mark.parametrize("loss", LOSSES, ids=str)


def value(loss: OutputLoss, reference: Tensor, output: Tensor) -> float:
    above, below = loss.total(reference, output)
    assert above.dtype == below.dtype == torch.float64 and above.shape == below.shape == ()
    return float(above / below)


@losses
def test_equal_outputs_have_no_distance_and_others_have(loss: OutputLoss) -> None:
    reference = torch.randn(6, 4, 5)
    assert value(loss, reference, reference.clone()) == 0
    assert value(loss, reference, reference + torch.randn(6, 4, 5)) > 0
    assert value(loss, reference, reference + 0.1 * torch.randn(6, 4, 5)) < value(loss, reference, reference + torch.randn(6, 4, 5))


@losses
def test_parts_add_up(loss: OutputLoss) -> None:
    reference, output = torch.randn(7, 5), torch.randn(7, 5)
    parts = [loss.total(reference[part], output[part]) for part in (slice(0, 3), slice(3, 7))]
    assert float(sum(above for above, _ in parts) / sum(below for _, below in parts)) == pytest.approx(value(loss, reference, output))


def test_divergence_in_nats() -> None:
    uniform, logits = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    assert value(KLDivergence(), uniform, logits) == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert value(KLDivergence(2.0), 2 * uniform, 2 * logits) == pytest.approx(value(KLDivergence(), uniform, logits))
    assert value(KLDivergence(), torch.tensor([[0.0, -1e4]]), torch.tensor([[0.0, -2e4]])) == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(OptionError, match="temperature is above 0"):
        KLDivergence(temperature)


@losses
def test_a_model_is_measured_over_every_tensor_of_every_batch(loss: OutputLoss) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": x, "b": [2 * x, x.long()], "c": None}

    batches = [torch.randn(3, 4), torch.randn(1, 4)]
    other = [torch.randn(3, 4), torch.randn(1, 4)]
    references = [Two()(batch) for batch in other]
    above = below = torch.zeros(())
    for reference, batch in zip(other, batches, strict=True):
        for factor in (1, 2):
            top, bottom = loss.total(factor * reference, factor * batch)
            above, below = above + top, below + bottom
    assert measure(Two(), batches, references, loss) == pytest.approx(float(above / below))
    assert measure(Two(), other, references, loss) == 0


@losses
def test_outputs_that_are_not_finite_show(loss: OutputLoss) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("nan")

    assert math.isnan(measure(Broken(), [torch.ones(2, 3)], [torch.ones(2, 3)], loss))


@pytest.mark.parametrize(
    "output", [None, torch.ones(2, dtype=torch.int64), {"label": torch.ones(2, dtype=torch.bool)}, "text", ()], ids=str
)
def test_outputs_without_numbers_are_refused(output: object) -> None:
    with pytest.raises(ModelError, match="no floating-point tensor"):
        check_output(output)


def test_outputs_with_numbers_are_accepted() -> None:
    check_output({"label": torch.ones(2, dtype=torch.int64), "logits": (torch.ones(2),)})
