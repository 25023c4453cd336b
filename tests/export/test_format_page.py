"""The reader on docs/packed-format.md, which knows nothing of subbyte, reads what subbyte writes."""

from __future__ import annotations

import ast
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import subbyte
from subbyte.model.quantized_layer import QuantizedLayer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "packed-format.md"
(READER,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


class Everything(nn.Module):
    """Every kind of layer that the page tells apart; the transposed ones have channels by which a wrong axis would fit, too."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.plain_up = nn.ConvTranspose2d(4, 6, 3)
        self.conv = nn.Conv2d(6, 5, 3, stride=2)
        self.scale = nn.Parameter(torch.full((5,), 1.5))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.plain_up(self.up(self.norm(self.depthwise(x)).relu())))
        return self.fc(x.mean((2, 3)) * self.scale)


class Words(nn.Module):
    """Layers that may have column groups: a table, a Linear, and the Conv1D of transformers, whose weight counts inputs first."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.table, self.fc, self.mix = nn.Embedding(11, 10), nn.Linear(10, 7), conv1d(6, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.fc(self.table(ids)).relu())


def reader() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(READER, names)
    return names


def saved(path: Path, *, symmetric: bool) -> subbyte.Result:
    widths = subbyte.Widths(3, 4, pinned={"depthwise": 8, "up": (5, 7), "fc": (2, None)})
    recipe = subbyte.Recipe(symmetric_weights=symmetric)
    result = subbyte.quantize(Everything().eval(), torch.randn(24, 4, 5, 5), widths=widths, recipe=recipe)
    result.save(path)
    return result


def test_the_reader_is_short_and_needs_only_numpy() -> None:
    assert len(READER.splitlines()) <= 60
    imported = {alias.name for node in ast.walk(ast.parse(READER)) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(READER)))
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("group", [None, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_reader_knows_column_groups_and_layers_without_a_bias(tmp_path: Path, symmetric: bool, group: int | None) -> None:
    ids = torch.randint(0, 11, (32, 5))
    recipe = subbyte.Recipe(symmetric_weights=symmetric, weight_group=group)
    result = subbyte.quantize(Words().eval(), ids, widths=subbyte.Widths(3, 8), recipe=recipe)
    result.save(tmp_path / "words")
    read, about = reader()["read"](tmp_path / "words")
    assert about["group"] == [group or 0] * 3 and about["bias"] == [0, 1, 1] and about["transposed"] == [0, 0, 1]
    for name, (weight, bias, _, _) in read.items():
        layer = result.model.get_submodule(name)
        np.testing.assert_array_equal(weight, layer.weight.numpy(), err_msg=name)
        assert (bias is None) == (layer.bias is None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_reader_gives_exactly_the_weights_of_the_model(tmp_path: Path, symmetric: bool) -> None:
    path = tmp_path / "all.subbyte.safetensors"
    result = saved(path, symmetric=symmetric)
    read, about = reader()["read"](path)
    expected = {name: module for name, module in result.model.named_modules() if isinstance(module, QuantizedLayer)}
    assert list(read) == about["names"] and set(read) == set(expected) == set(result.allocation)
    for name, (weight, bias, step, _) in read.items():
        layer = expected[name]
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, layer.weight.numpy(), err_msg=name)
        np.testing.assert_array_equal(bias, layer.state().bias.numpy(), err_msg=name)
        if step is None:
            assert layer.state().activation is None
            continue
        scale, zero_point, grid = layer.state().activation
        assert (step[0], step[1], step[2]) == (scale.item(), zero_point.item(), grid.bits)
        assert result.allocation[name][1] == step[2]


def test_the_reader_knows_factors_of_inputs(tmp_path: Path) -> None:
    result = subbyte.quantize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(32, 4), widths=subbyte.Widths(4, 8))
    result.model[1].input_exponents = torch.tensor([0, 2, -1], dtype=torch.int8)
    result.save(tmp_path / "net")
    read, about = reader()["read"](tmp_path / "net")
    assert about["input_exponents"] == [0, 1] and read["0"][3] == 1
    np.testing.assert_array_equal(read["1"][3], np.array([1.0, 4.0, 0.5], dtype=np.float32))


def test_the_reader_notices_damage_and_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "all.subbyte.safetensors"
    saved(path, symmetric=True)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        reader()["read"](path)
    content[-1] ^= 1
    path.write_bytes(content.replace(b'\\"format_version\\":4,', b'\\"format_version\\":5,'))
    with pytest.raises(ValueError, match="format 5"):
        reader()["read"](path)


def test_the_page_lists_every_tensor_and_every_key(tmp_path: Path) -> None:
    path = tmp_path / "all.subbyte.safetensors"
    saved(path, symmetric=False)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    text = PAGE.read_text(encoding="utf-8")
    keys = json.loads(header.pop("__metadata__")["subbyte"][32:])
    named = [*keys, *(name for name in header if name.startswith("subbyte."))]
    assert len(named) == 15 + 6
    assert [name for name in named if f"| `{name}` |" not in text] == []
    assert "codes 1, 2, 3 at\n3 bits are the bytes 209, 0" in text  # the doctest of export.bits
