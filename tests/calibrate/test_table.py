"""Embeddings: quantized row by row, weights only, whatever the input's width is elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import subbyte


class Words(nn.Module):
    """Two embeddings, of which one is looked up twice in a forward."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(rows, 12), nn.Embedding(9, 12)
        self.norm, self.hidden, self.head = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.words(ids.flip(1)) + self.places(torch.arange(ids.shape[1], device=ids.device))
        pooled = torch.relu(self.hidden(self.norm(x))).mean(1)
        logits: Tensor = self.head(pooled)
        return logits


def ids(samples: int = 64, rows: int = 40) -> Tensor:
    return torch.randint(0, rows, (samples, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("flavour", subbyte.Flavour)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_embedding_gets_codes_and_its_indices_no_width(flavour: subbyte.Flavour, symmetric: bool) -> None:
    recipe = subbyte.Recipe(flavour=flavour, symmetric_weights=symmetric)
    result = subbyte.quantize(Words().eval(), ids(), widths=subbyte.Widths(4, 4), recipe=recipe)
    assert result.allocation == {"words": (4, None), "places": (4, None), "hidden": (4, 4), "head": (4, 4)}
    assert all(layer.error <= layer.baseline_error for layer in result.layers)
    rows = result.model.get_submodule("words").weight
    assert isinstance(rows, Tensor)
    assert max(len(row.unique()) for row in rows) <= 16


def test_rows_on_the_grid_come_back_exactly() -> None:
    model = Words().eval()
    with torch.no_grad():
        codes = torch.randint(-8, 8, (40, 12), generator=torch.Generator().manual_seed(0))
        codes[:, 0] = -8
        model.words.weight.copy_(codes * torch.linspace(0.01, 0.3, 40)[:, None])
    result = subbyte.quantize(model, ids(), widths=subbyte.Widths(4, 8), recipe=subbyte.Recipe(symmetric_weights=True))
    weight = result.model.get_submodule("words").weight
    assert isinstance(weight, Tensor)
    torch.testing.assert_close(weight, model.words.weight.detach(), rtol=1e-6, atol=0)


def test_refined_steps_are_never_worse_than_rounding_and_better_at_three_bits() -> None:
    result = subbyte.quantize(Words().eval(), ids(), widths=subbyte.Widths(3, 8))
    words = result.layers[0]
    assert words.name == "words" and words.solver == "Table" and words.error < words.baseline_error


def test_the_packed_file_gives_the_same_outputs_and_has_the_promised_size(tmp_path: Path) -> None:
    model = Words().eval()
    result = subbyte.quantize(model, ids(), widths=subbyte.Widths(3, 8))
    size = result.save(tmp_path / "words.safetensors")
    assert size == result.size_bytes == (tmp_path / "words.safetensors").stat().st_size
    again = subbyte.load(tmp_path / "words.safetensors", into=model)
    assert torch.equal(again(ids()), result.model(ids()))


@pytest.mark.parametrize("method", [subbyte.Fisher(), subbyte.Measured()], ids=["fisher", "measured"])
def test_a_budget_counts_and_chooses_embeddings_to_the_byte(method: subbyte.Fisher | subbyte.Measured) -> None:
    model = Words(rows=400).eval()
    result = subbyte.quantize(model, ids(rows=400), budget=subbyte.Budget(size=0.3), recipe=subbyte.Recipe(sensitivity=method))
    assert result.plan is not None
    assert result.plan.allocation.size_bytes == result.size_bytes <= 0.3 * result.float_bytes
    assert result.allocation["words"][1] is None
    assert result.plan.sensitivity.losses["words"][2, None] > result.plan.sensitivity.losses["words"][8, None]
    assert result.plan.solve(subbyte.Budget(size=0.35)).options["words"][1] is None


def test_refinements_leave_tables_as_they_are() -> None:
    refinements = (
        subbyte.BatchNormTuning(without_batch_norm=True),
        subbyte.BiasTuning(epochs=1),
        subbyte.Blockwise(iterations=10),
        subbyte.Networkwise(iterations=10),
    )
    model = Words().eval()
    plain = subbyte.quantize(model, ids(), widths=subbyte.Widths(3, 8))
    refined = subbyte.quantize(model, ids(), widths=subbyte.Widths(3, 8), recipe=subbyte.Recipe(refinements=refinements))
    assert any(report.kept for report in refined.refinements)
    assert torch.equal(plain.model.get_submodule("words").codes, refined.model.get_submodule("words").codes)  # type: ignore[arg-type]


def test_an_embedding_that_rewrites_its_weight_stays_float() -> None:
    model = Words().eval()
    model.places = nn.Embedding(9, 12, max_norm=1.0).eval()
    result = subbyte.quantize(model, ids(), widths=subbyte.Widths(4, 8))
    assert "places" in [left.name for left in result.left_out]


class TiedHead(nn.Module):
    """The output head's weight is the embedding's."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(rows, 12), nn.Linear(12, 12), nn.Linear(12, rows)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.hidden(self.words(ids))))
        return logits


@pytest.mark.parametrize("flavour", subbyte.Flavour)
def test_a_tied_weight_has_one_set_of_codes_stored_once(tmp_path: Path, flavour: subbyte.Flavour) -> None:
    model = TiedHead().eval()
    refinements = (subbyte.BatchNormTuning(without_batch_norm=True), subbyte.Networkwise(iterations=10), subbyte.Blockwise(iterations=10))
    recipe = subbyte.Recipe(flavour=flavour, refinements=refinements)
    result = subbyte.quantize(model, ids(), widths=subbyte.Widths(4, 8), recipe=recipe)
    words, head = result.model.get_submodule("words"), result.model.get_submodule("head")
    assert torch.equal(words.weight, head.weight)  # type: ignore[arg-type]
    assert result.allocation["words"] == (4, None) and result.allocation["head"] == (4, 8)
    assert {layer.name: layer.size_bytes for layer in result.layers}["head"] == 40 * 4 + 5
    assert "codes and steps are those of words" in str(result)
    size = result.save(tmp_path / "tied.safetensors")
    assert size == result.size_bytes
    again = subbyte.load(tmp_path / "tied.safetensors", into=TiedHead().eval())
    assert torch.equal(again(ids()), result.model(ids()))
    again_size = subbyte.quantize(model, ids(), widths=subbyte.Widths(4, 8, exclude=("words",))).size_bytes
    assert size < again_size


def test_a_budget_gives_a_tied_weight_one_width() -> None:
    model = TiedHead(rows=400).eval()
    choices = subbyte.Choices((2, 3, 4, 6, 8), activation_bits=(8,))
    budget = subbyte.Budget(size=0.4, choices=choices)
    result = subbyte.quantize(model, ids(rows=400), budget=budget)
    assert result.plan is not None
    assert result.plan.allocation.size_bytes == result.size_bytes <= 0.4 * result.float_bytes
    assert result.allocation["words"][0] == result.allocation["head"][0]
    solved = result.plan.solve(subbyte.Budget(size=0.5, choices=choices))
    assert solved.options["words"][0] == solved.options["head"][0]
    assert result.plan.allocation.average_bits == pytest.approx(
        sum(bits * count for bits, count in ((result.allocation["words"][0], 4800), (result.allocation["hidden"][0], 144))) / 4944
    )


def test_two_widths_for_one_weight_are_refused() -> None:
    with pytest.raises(subbyte.OptionError, match="share one weight"):
        subbyte.quantize(TiedHead().eval(), ids(), widths=subbyte.Widths(4, 8, pinned={"head": 8}))


def test_an_owner_that_is_called_twice_is_refused_with_a_remedy() -> None:
    class Twice(TiedHead):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(12, 12)
            self.again.weight = self.hidden.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.again(self.hidden(self.hidden(self.words(ids)))))
            return logits

    recipe = subbyte.Recipe(flavour=subbyte.Flavour.PARALLEL)
    with pytest.raises(subbyte.LayerError, match="exclude one of the two"):
        subbyte.quantize(Twice().eval(), ids(), widths=subbyte.Widths(4, 8), recipe=recipe)
