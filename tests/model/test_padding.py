"""What stands at padded positions changes nothing: no code, no step, no loss, no sensitivity."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte.allocate.sensitivity import SensitivityMethod
from subbyte.calibrate.loss import KLDivergence, compare
from subbyte.model.padding import read_outputs, real_positions, real_rows, spread

LENGTHS = [5, 2, 4, 1, 5, 3, 2, 4]


class Tokens(nn.Module):
    """Position by position, and the mean over real positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.each, self.all = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.second(torch.relu(self.first(x)))
        weight = attention_mask[..., None].float()
        pooled = torch.where(weight > 0, x, 0.0).sum(1) / weight.sum(1)
        return {"each": self.each(x), "start": self.each(x)[..., 0], "all": self.all(pooled)}


def batches(garbage: float, count: int = 4) -> list[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    made = []
    for _ in range(count):
        x = torch.randn(len(LENGTHS), 5, 6, generator=generator)
        made.append({"x": torch.where(mask[..., None], x, garbage), "attention_mask": mask.long()})
    return made


REFINEMENTS = {
    "none": (),
    "statistics": (subbyte.BatchNormTuning(without_batch_norm=True),),
    "biases": (subbyte.BiasTuning(epochs=2, mixing=0.0),),
    "blocks": (subbyte.Blockwise(iterations=20),),
    "network": (subbyte.Networkwise(iterations=20, mixing=0.0),),
}


@pytest.mark.parametrize("refinements", REFINEMENTS.values(), ids=REFINEMENTS)
@pytest.mark.parametrize("flavour", subbyte.Flavour)
def test_garbage_at_padded_positions_changes_no_bit(refinements: tuple[subbyte.Refinement, ...], flavour: subbyte.Flavour) -> None:
    model = Tokens().eval()
    recipe = subbyte.Recipe(refinements=refinements, flavour=flavour)
    zeros, garbage = (subbyte.quantize(model, batches(g), widths=subbyte.Widths(4, 4), recipe=recipe) for g in (0.0, 50.0))
    assert zeros.model.state_dict().keys() == garbage.model.state_dict().keys()
    for name, tensor in zeros.model.state_dict().items():
        assert torch.equal(tensor, garbage.model.state_dict()[name]), name
    assert zeros.measured == garbage.measured
    assert [report.loss for report in zeros.refinements] == [report.loss for report in garbage.refinements]


def test_without_a_mask_garbage_does_change_codes() -> None:
    class Unmasked(Tokens):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return super().forward(x, torch.ones(x.shape[:2]))

    model = Unmasked().eval()
    zeros, garbage = (
        subbyte.quantize(model, [batch["x"] for batch in batches(g)], widths=subbyte.Widths(4, 4)).model.state_dict() for g in (0.0, 50.0)
    )
    assert any(not torch.equal(zeros[name], garbage[name]) for name in zeros)


@pytest.mark.parametrize("method", [subbyte.Fisher(), subbyte.Measured()], ids=["fisher", "measured"])
def test_sensitivities_do_not_see_padding(method: SensitivityMethod) -> None:
    model = Tokens().eval()
    budget = subbyte.Budget(average_bits=4.0)
    recipe = subbyte.Recipe(sensitivity=method)
    zeros, garbage = (subbyte.quantize(model, batches(g), budget=budget, recipe=recipe).plan for g in (0.0, 50.0))
    assert zeros is not None and garbage is not None
    assert zeros.sensitivity.losses == garbage.sensitivity.losses


def test_equations_count_real_positions_only() -> None:
    result = subbyte.quantize(Tokens().eval(), batches(0.0), widths=subbyte.Widths(8, 8))
    assert {layer.name: layer.equations for layer in result.layers} == {
        "first": 4 * sum(LENGTHS),
        "second": 4 * sum(LENGTHS),
        "each": 2 * 4 * sum(LENGTHS),
        "all": 4 * len(LENGTHS),
    }


@pytest.mark.parametrize(
    ("layout", "kept"),
    [((2, 3), 3), ((3, 2), 3), ((6,), 3), ((2, 4, 3), 12), ((2, 3, 7), 21)],
    ids=["samples first", "positions first", "flat", "heads", "more behind"],
)
def test_every_layout_keeps_the_real_rows(layout: tuple[int, ...], kept: int) -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    mask = real_rows(batch, layout)
    assert mask is not None and mask.shape == (layout[0], mask.numel() // layout[0]) and int(mask.sum()) == kept


def test_one_vector_for_each_sample_has_no_padding() -> None:
    assert spread(torch.ones(2, 3, dtype=torch.bool), (2,)) is None
    assert real_positions({"attention_mask": torch.ones(2, 3)}) is None
    assert real_positions(torch.ones(2, 3)) is None


def test_where_an_answer_starts_is_compared_among_real_positions() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    a, b = torch.tensor([[0.0, 1.0, 9.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, -9.0], [0.0, 0.0, 0.0]])
    above, below = compare(a, b, KLDivergence(), batch)
    assert float(above) == 0.0 and float(below) == 2.0
    assert [tuple(part.shape) for part in read_outputs(a, batch)] == [(1, 2), (1, 3)]
