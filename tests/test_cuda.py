"""A model on CUDA is quantized there, to what it becomes on the CPU; skipped where there is no GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import subbyte
from subbyte import BatchNormTuning, BiasTuning, Blockwise, Budget, Choices, Flavour, Networkwise, Recipe, Widths
from subbyte.model.batches import map_tensors
from tests import text_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RECIPES = {
    "default": Recipe(),
    "parallel": Recipe(flavour=Flavour.PARALLEL),
    "hybrid": Recipe(flavour=Flavour.HYBRID),
    "groups": Recipe(weight_group=4),
    "blocks": Recipe(refinements=(Blockwise(iterations=20),)),
    "network": Recipe(refinements=(Networkwise(iterations=20),)),
    "tuning": Recipe(refinements=(BatchNormTuning(), BiasTuning(epochs=2))),
}


class Net(nn.Module):
    """Batch norm, depthwise convolution, residual sum, clipping activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)
        self.bn.running_mean.normal_(0, 0.3)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)))
        x = F.relu(x + self.depthwise(x))
        logits: Tensor = self.head(F.relu(self.wide(x)).mean(dim=(2, 3)))
        return logits


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_is_quantized_on_its_device(recipe: Recipe) -> None:
    model, data = Net().eval(), torch.randn(48, 3, 10, 10)
    widths = Widths(3, 4, pinned={"stem": 8})
    here = subbyte.quantize(model, data, widths=widths, recipe=recipe)
    there = [subbyte.quantize(copy.deepcopy(model).cuda(), batches, widths=widths, recipe=recipe) for batches in (data, data.cuda())]
    assert all(tensor.is_cuda for tensor in there[0].model.state_dict().values())
    assert there[0].loss == pytest.approx(here.loss, rel=0.3) and there[0].loss < there[0].measured.baseline_loss
    assert there[0].model(data.cuda()).shape == (48, 5)
    first, second = (states(result.model) for result in there)
    assert all(torch.equal(first[name], second[name]) for name in first), "the same seed gives the same bits, wherever the samples lie"


@pytest.mark.parametrize("method", [subbyte.Fisher(), subbyte.Measured()], ids=lambda method: type(method).__name__)
def test_budgets(method: Any, tmp_path: Path) -> None:
    model, data = Net().eval(), torch.randn(48, 3, 10, 10)
    recipe = Recipe(sensitivity=method, choices=Choices((2, 4, 8), activation_bits=(8,)))
    here, there = (subbyte.quantize(one, data, budget=Budget(size=0.5), recipe=recipe) for one in (model, copy.deepcopy(model).cuda()))
    assert here.plan is not None and there.plan is not None
    for name, row in here.plan.sensitivity.losses.items():
        assert list(there.plan.sensitivity.losses[name].values()) == pytest.approx(list(row.values()), rel=0.3)
    limited = subbyte.quantize(copy.deepcopy(model).cuda(), data, budget=Budget(minimize="size", kl=0.05), recipe=recipe)
    assert limited.plan is not None and limited.plan.rounds
    there.save(tmp_path / "packed")
    assert (tmp_path / "packed").stat().st_size == there.size_bytes
    restored = subbyte.load(tmp_path / "packed", into=copy.deepcopy(model).cuda())
    assert torch.equal(restored(data.cuda()), there.model(data.cuda()))


@pytest.mark.filterwarnings("ignore::subbyte.ExportWarning")  # so small a net runs no faster
def test_onnx_files(tmp_path: Path) -> None:
    result = subbyte.quantize(Net().eval().cuda(), torch.randn(48, 3, 10, 10), widths=Widths(4, 8))
    exported = result.export_onnx(tmp_path / "model.onnx")
    assert all(check.agreement is not None and check.agreement >= 99 for check in exported.verification.checks)
    assert next(result.model.buffers()).is_cuda, "the model stays where it is"


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_text_models(name: str) -> None:
    batches = [{"input_ids": torch.randint(4, 64, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.int64)} for _ in range(4)]
    if name.startswith("Bert"):
        batches[0]["attention_mask"][:, 9:] = 0
    recipe = Recipe(refinements=(Networkwise(iterations=10),))
    here = subbyte.quantize(text_models.model(name), batches, widths=Widths(4, 8), recipe=recipe)
    for data in (batches, [map_tensors(batch, lambda tensor: tensor.cuda()) for batch in batches]):
        there = subbyte.quantize(text_models.model(name).cuda(), data, widths=Widths(4, 8), recipe=recipe)
        assert here.loss / 3 < there.loss < here.loss * 3  # random weights: ten steps find more or less by chance
