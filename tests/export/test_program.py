"""A packed file with its program is loaded without the model's class, computes the same numbers, and runs nothing that it should not."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.errors import FileError, ModelError
from subbyte.export.packed import read_packed
from subbyte.export.program import Program


class Everything(nn.Module):
    """Layers of many kinds, state of its own, and an output that is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.alone = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.register_buffer("shift", torch.full((6, 1, 1), 0.25), persistent=False)
        self.attend = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu6(self.norm(self.conv(x)))
        x = self.alone(F.hardswish(self.up(self.depthwise(x)) + self.shift))
        tokens = self.attend(x.flatten(2).mT * self.scale)
        return {"logits": self.fc(tokens.mean(1)), "parts": (tokens[:, :2], x.amax((2, 3)))}


def saved(model: nn.Module, data: Any, path: Path) -> subbyte.Result:
    torch.manual_seed(0)
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest())
    result = subbyte.quantize(model.eval(), data, widths=subbyte.Widths(3, 8), recipe=recipe)
    assert result.save(path, program=True) == path.stat().st_size > result.size_bytes
    return result


def test_outputs_are_those_of_the_model_for_any_number_of_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    result = saved(model, torch.randn(32, 3, 8, 8), tmp_path / "m")
    loaded = subbyte.load(tmp_path / "m")
    x = torch.randn(5, 3, 8, 8)
    expected, found = result.model(x), loaded(x)  # with gradients: else nn.TransformerEncoderLayer takes a fused path of its own
    again = subbyte.load(tmp_path / "m", into=model)(x)
    assert torch.equal(found["logits"], expected["logits"]) and torch.equal(again["logits"], expected["logits"])
    assert isinstance(found["parts"], tuple) and all(torch.equal(a, b) for a, b in zip(found["parts"], expected["parts"], strict=True))


def test_keyword_arguments_tables_and_groups(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(50, 24), nn.Linear(24, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.table(ids) * mask[..., None]
            return self.fc(x.sum(1) / mask.sum(1, keepdim=True))

    torch.manual_seed(0)
    batches = [{"ids": torch.randint(0, 50, (16, n)), "mask": torch.ones(16, n)} for n in (4, 9)]
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=False, weight_group=16)
    result = subbyte.quantize(Text().eval(), batches, widths=subbyte.Widths(4, None), recipe=recipe)
    result.save(tmp_path / "m", program=True)
    batch = {"mask": torch.ones(3, 6), "ids": torch.randint(0, 50, (3, 6))}
    assert torch.equal(subbyte.load(tmp_path / "m")(**batch), result.model(**batch))


def test_numbers_that_are_made_and_checks_of_dtypes(tmp_path: Path) -> None:
    """What models of the transformers library do: positions counted from 0, tensors that are what they are converted to."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places, self.fc = nn.Embedding(50, 12), nn.Embedding(16, 12), nn.Linear(12, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
            return self.fc(x.to(self.fc.weight.dtype)).mean(1)

    torch.manual_seed(0)
    result = saved(Positions(), list(torch.randint(0, 50, (2, 16, 9))), tmp_path / "m")
    ids = torch.randint(0, 50, (3, 5))
    assert torch.equal(subbyte.load(tmp_path / "m")(ids), result.model(ids))


def test_a_language_model_that_keeps_keys_and_values_is_saved_without_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 40, (8, 6))}]
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest())
    result = subbyte.quantize(model, batches, widths=subbyte.Widths(4, None), recipe=recipe)
    result.save(tmp_path / "m", program=True)
    ids = torch.randint(0, 40, (3, 5))
    with torch.no_grad():
        found, expected = subbyte.load(tmp_path / "m")(input_ids=ids), result.model(input_ids=ids)
    assert torch.equal(found["logits"], expected.logits) and set(found) == {"logits"}
    assert result.model.config.use_cache and expected.past_key_values is not None


def test_a_file_without_a_program_needs_a_model(tmp_path: Path) -> None:
    result = subbyte.quantize(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(32, 8), widths=subbyte.Widths(4, 8))
    result.save(tmp_path / "m")
    with pytest.raises(FileError, match="holds no program; give the float model as `into`"):
        subbyte.load(tmp_path / "m")


def test_what_cannot_be_traced_is_said_when_saving(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else -self.fc(x)

    result = subbyte.quantize(Branching().eval(), torch.rand(32, 8), widths=subbyte.Widths(4, 8))
    with pytest.raises(ModelError, match=r"torch\.export cannot follow this Branching"):
        result.save(tmp_path / "m", program=True)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "step",
    [
        ["aten.from_file.default", ["/etc/hostname"], {}],
        ["aten.add_.Tensor", [{"step": 0}, 1], {}],
        ["python.__import__", ["os"], {}],
        ["python.attrgetter", ["x"], {}],
        ["os.system", ["true"], {}],
        ["aten.__class__.default", [], {}],
        ["aten.relu.default", [{"step": 7}], {}],
        ["tensor", ["missing"], {}],
    ],
)
def test_a_program_calls_nothing_but_operators_without_effects(step: list[Any]) -> None:
    about = {"version": 1, "keys": [], "output": 0, "steps": [["input", [], {}], step, ["output", [[{"step": 1}]], {}]]}
    with pytest.raises((ValueError, KeyError)):
        Program(zlib.compress(json.dumps(about).encode()), {}, {})


def test_a_damaged_program_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(nn.Sequential(nn.Linear(8, 4)), torch.randn(32, 8), tmp_path / "m")
    packed = read_packed(tmp_path / "m")
    packed.tensors["subbyte.program"][3] ^= 255  # type: ignore[index]
    monkeypatch.setattr("subbyte.export.loading.read_packed", lambda path: packed)
    with pytest.raises(FileError, match="the program in .* is damaged"):
        subbyte.load(tmp_path / "m")
