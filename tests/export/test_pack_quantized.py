"""Folders in compressed-tensors' layout: the packing by hand, and read by compressed-tensors and transformers where they are installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import subbyte
from subbyte import LayerError, ModelError, Recipe, RoundToNearest, Widths
from subbyte.calibrate.whole import Judge
from subbyte.export.pack_quantized import _packed_rows
from subbyte.model.quantized_layer import QuantizedLayer

SYMMETRIC = replace(subbyte.rounding(), symmetric_weights=True)
MIXED = Widths(4, None, pinned={"0": (8, None), "4": (3, None)}, exclude=["6"])


def net() -> nn.Module:
    layers = [nn.Linear(33, 20), nn.ReLU(), nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 3)]
    return nn.Sequential(*layers).eval()


def quantized(model: nn.Module, *, symmetric: bool = True, widths: Widths = MIXED, group: int | None = None) -> subbyte.Result:
    recipe = Recipe(symmetric_weights=symmetric, solver=RoundToNearest(), weight_group=group)
    return subbyte.quantize(model, torch.randn(64, 33), widths=widths, recipe=recipe)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@given(bits=st.integers(2, 8), rows=st.integers(1, 3), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_code_i_of_a_row_is_in_bits_i_b_and_on(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = _packed_rows(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-count * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        assert stream == sum(code << (bits * index) for index, code in enumerate(row))


def test_the_folder_holds_what_the_layout_asks_for(tmp_path: Path) -> None:
    model = net()
    result = quantized(model)
    done = result.export_compressed_tensors(tmp_path / "out")
    assert done.with_zero_points == () and "zero-points" not in str(done)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert done.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert shapes["2.weight_packed"] == ((40, 3), torch.int32) and shapes["2.weight_scale"] == ((40, 1), torch.float32)
    assert tensors["2.weight_shape"].tolist() == [40, 20] and torch.equal(tensors["6.weight"], model[6].weight)
    assert {"0.bias", "2.bias", "5.weight", "6.bias"} <= set(tensors) and "4.bias" not in tensors and "2.weight" not in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = {name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]}
    assert found == {"4": 3, "2": 4, "0": 8} and config["ignore"] == ["6"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")


def test_a_bias_that_the_float_layer_has_not_goes_and_the_loss_is_measured_without_it(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(33, 20, bias=False), nn.ReLU(), nn.Linear(20, 5)).eval()
    result = subbyte.quantize(model, torch.rand(128, 33), widths=Widths(2, None))
    done = result.export_compressed_tensors(tmp_path)
    assert done.without_bias == ("0",) and "biases that calibration gave to 0" in str(done)
    held_out = Judge.of(result.original, result.calibration, result.recipe.loss).loss_of(result.model)
    assert done.model_loss == pytest.approx(held_out) and done.loss != done.model_loss
    assert result.model[0].bias.abs().sum() > 0


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_it(symmetric: bool, group: int | None, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install 'subbyte[compressed-tensors]'")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    widths = MIXED if group is None else Widths(4, None, pinned={"4": (3, None)}, exclude=["0", "6"])
    result = quantized(net(), symmetric=symmetric, widths=widths, group=group)
    done = result.export_compressed_tensors(tmp_path)
    affine = () if symmetric else tuple(name for name in ("0", "2", "4") if name in result.allocation and result.allocation[name][0] < 8)
    assert done.with_zero_points == affine and ("transformers does not read" in str(done)) == bool(affine)
    config = QuantizationConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    model, compressor = net(), ModelCompressor(quantization_config=config)
    apply_quantization_config(model, config)
    compressor.compress_model(model)
    problems = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not problems.missing_keys and not problems.unexpected_keys
    compressor.decompress_model(model)
    for name, weight in weights(result.model).items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    x = torch.randn(9, 33)
    bare = subbyte.model.replace.copy_of(result.model)
    bare[4].bias = torch.zeros_like(bare[4].bias)
    assert torch.allclose(model(x), bare(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install 'subbyte[compressed-tensors]'")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (32, 12))
    widths = Widths(4, None, pinned={"*down_proj": (8, None)}, exclude=["lm_head", "*embed_tokens"])
    result = subbyte.quantize(model, [{"input_ids": tokens, "use_cache": False}], widths=widths, recipe=SYMMETRIC)
    result.export_compressed_tensors(tmp_path / "llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        for module in result.model.modules():
            if isinstance(module, QuantizedLayer):
                module.bias.zero_()
        bare = result.model(input_ids=tokens, use_cache=False).logits
        found = loaded(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(found, bare, atol=1e-4), (found - bare).abs().max()
    assert not torch.allclose(found, model(input_ids=tokens, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "widths", "error", "message"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(44, 3)), Widths(4, None), LayerError, "'0': is no torch.nn.Linear"),
        (nn.Sequential(nn.Linear(33, 4)), Widths(4, 8), LayerError, "'0': has a quantized input"),
        (nn.Sequential(nn.Linear(33, 4), nn.BatchNorm1d(4)), Widths(4, None), ModelError, "batch norms were folded"),
    ],
    ids=["convolution", "quantized input", "batch norm"],
)
def test_what_the_layout_has_no_place_for_is_said(
    model: nn.Module, widths: Widths, error: type[Exception], message: str, tmp_path: Path
) -> None:
    data = torch.randn(32, 3, 11) if isinstance(model[0], nn.Conv1d) else torch.randn(32, 33)
    result = subbyte.quantize(model.eval(), data, widths=widths, recipe=subbyte.rounding())
    with pytest.raises(error, match=message):
        result.export_compressed_tensors(tmp_path / "out")
    assert not (tmp_path / "out").exists()
