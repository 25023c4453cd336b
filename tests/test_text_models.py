"""Models of transformers, from a folder to a quantized folder and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import subbyte
from subbyte.cli.program import main
from subbyte.export.pretrained import is_causal, open_pretrained, open_tokenizer
from subbyte.model.batches import call, floating_tensors
from subbyte.model.sentence_encoder import SentenceEncoder
from subbyte.tasks.texts import tokenized, windows
from tests import text_models

pytest.importorskip("transformers", reason="transformers is not installed")

ENCODERS = ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "BertForMaskedLM", "BertModel"]
CAUSAL = ["GPT2LMHeadModel", "LlamaForCausalLM"]


def batches(name: str, model: torch.nn.Module) -> list[dict[str, Tensor]]:
    tokenizer, texts = text_models.tokenizer(), text_models.texts()
    made = windows(model, tokenizer, texts, most_tokens=16) if name in CAUSAL else tokenized(model, tokenizer, texts, batch_size=16).batches
    return [dict(batch) for batch in made]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def outputs(model: torch.nn.Module, batch: object) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(call(model, batch))


@pytest.mark.parametrize("name", [*ENCODERS, *CAUSAL])
def test_every_head_is_quantized_saved_and_loaded(tmp_path: Path, name: str) -> None:
    model = text_models.model(name)
    data = batches(name, model)
    result = subbyte.quantize(model, data, widths=subbyte.Widths(4, 8))
    allowed = ("Norm", "LMPredictionHead")  # the latter holds a bias beside its decoder's
    assert all(left.kind.endswith(allowed) or "never called" in left.reason for left in result.left_out), result.left_out
    assert all(
        bits[1] == (None if "embed" in layer or "wte" in layer or "wpe" in layer else 8) for layer, bits in result.allocation.items()
    )
    assert result.measured.loss <= result.measured.baseline_loss
    size = result.save_pretrained(tmp_path / "out", text_models.tokenizer())
    assert size == result.size_bytes == (tmp_path / "out" / "model.subbyte.safetensors").stat().st_size
    again = subbyte.load_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    for ours, theirs in zip(outputs(result.model, data[0]), outputs(again, data[0]), strict=True):
        assert torch.equal(ours, theirs)
    assert open_tokenizer(tmp_path / "out")("word1 word5")["input_ids"] == [2, 5, 9, 3]


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_what_stands_at_padded_positions_changes_no_code(name: str) -> None:
    model = text_models.model(name)
    first = batches(name, model)
    second = [dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)) for batch in first]
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    one, other = (subbyte.quantize(model, data, widths=subbyte.Widths(4, 4)) for data in (first, second))
    for key, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[key], rtol=1e-5, atol=1e-6)
    assert one.measured.loss == pytest.approx(other.measured.loss, rel=1e-4)


def test_a_sentence_encoder_pools_real_tokens_and_survives_its_folder(tmp_path: Path) -> None:
    folder = text_models.folder(tmp_path / "float", "BertModel")
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    model = open_pretrained(folder)
    assert isinstance(model, SentenceEncoder) and model.normalize
    data = [dict(batch) for batch in tokenized(model, open_tokenizer(folder), text_models.texts()).batches]
    vectors = outputs(model, data[-1])[0]
    alone = {key: value[:1, : int(data[-1]["attention_mask"][0].sum())] for key, value in data[-1].items()}
    torch.testing.assert_close(outputs(model, alone)[0], vectors[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    result = subbyte.quantize(model, data, widths=subbyte.Widths(4, 8), recipe=subbyte.Recipe(loss=subbyte.CosineDistance()))
    result.save_pretrained(tmp_path / "out")
    assert torch.equal(outputs(subbyte.load_pretrained(tmp_path / "out"), data[0])[0], outputs(result.model, data[0])[0])


def test_causal_models_are_told_from_others() -> None:
    assert is_causal(text_models.model("GPT2LMHeadModel")) and is_causal(text_models.model("LlamaForCausalLM"))
    assert not is_causal(text_models.model("BertForMaskedLM")) and not is_causal(torch.nn.Linear(2, 2))


def test_the_command_line_quantizes_and_scores_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"hf:{text_models.folder(tmp_path / 'float', 'BertForSequenceClassification')}"
    (tmp_path / "texts.tsv").write_text("".join(f"{text}\t{index % 3}\n" for index, text in enumerate(text_models.texts())))
    data = ["--model", source, "--data", str(tmp_path / "texts.tsv"), "--max-tokens", "16"]
    assert run(["quantize", *data, "--weight-bits", "8", "--attention-bits", "8", "--out", f"{tmp_path}/run/"]) == 0
    printed = capsys.readouterr().out
    assert "attention products at 8 bits in 2 layers" in printed and "bert.embeddings.word_embeddings" in printed
    packed = tmp_path / "run" / "model.subbyte.safetensors"
    labels = ["--labels", str(tmp_path / "texts.tsv"), "--labels-key", "1", "--packed", str(packed), "--json"]
    assert run(["evaluate", *data, *labels]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["agreement"] > 90 and measured["samples"] == 64 and measured["packed_bytes"] == packed.stat().st_size
    model, tokenizer = open_pretrained(tmp_path / "float"), text_models.tokenizer()
    right = sum(
        int(outputs(model, dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=16)))[0].argmax()) == index % 3
        for index, text in enumerate(text_models.texts())
    )
    assert measured["float_top1"] == pytest.approx(100 * right / 64)
    assert type(subbyte.load_pretrained(tmp_path / "run")).__name__ == "BertForSequenceClassification"


def test_the_command_line_gives_perplexities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"hf:{text_models.folder(tmp_path / 'float', 'GPT2LMHeadModel')}"
    (tmp_path / "texts.txt").write_text("\n".join(text_models.texts()))
    data = ["--model", source, "--data", str(tmp_path / "texts.txt"), "--max-tokens", "16"]
    assert run(["quantize", *data, "--weight-bits", "8", "--activation-bits", "none", "--out", f"{tmp_path}/run/"]) == 0
    capsys.readouterr()
    assert run(["evaluate", *data, "--packed", f"{tmp_path}/run/model.subbyte.safetensors", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    model = text_models.model("GPT2LMHeadModel")
    losses = [float(model(**batch, labels=batch["input_ids"]).loss.detach()) for batch in batches("GPT2LMHeadModel", model)]
    sizes = [len(batch["input_ids"]) for batch in batches("GPT2LMHeadModel", model)]
    expected = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert measured["float_perplexity"] == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-4)
    assert measured["packed_perplexity"] == pytest.approx(measured["float_perplexity"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model", "hf:{missing}", "--data", "{texts}"], 3, "transformers cannot open"),
        (["--model", "torch.nn:Identity", "--data", "{texts}"], 2, "need a tokenizer"),
        (["--model", "hf:{float}", "--data", "{texts}", "--max-tokens", "99"], 2, "1 to 24 tokens"),
        (["--model", "hf:{float}", "--data", "{texts}", "--mean", "0.5"], 2, "options for images"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], kind: int, message: str
) -> None:
    places = {"missing": tmp_path / "none", "float": text_models.folder(tmp_path / "float", "BertModel"), "texts": tmp_path / "texts.txt"}
    (tmp_path / "texts.txt").write_text("word1 word2\n")
    given = [argument.format(**places) for argument in arguments]
    assert run(["quantize", *given, "--out", str(tmp_path / "a.safetensors")]) == kind
    assert message in capsys.readouterr().err


def test_a_folder_without_a_packed_file_and_a_foreign_model_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
    result = subbyte.quantize(model, torch.randn(16, 4))
    with pytest.raises(subbyte.ModelError, match="no model of transformers"):
        result.save_pretrained(tmp_path / "out")
    with pytest.raises(subbyte.FileError, match="holds no 'model.subbyte.safetensors'"):
        subbyte.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", *CAUSAL])
def test_attention_products_are_quantized_where_asked_for(tmp_path: Path, name: str) -> None:
    model = text_models.model(name)
    data = batches(name, model)
    losses = {}
    for bits in (None, 8, 3):
        result = subbyte.quantize(model, data, widths=subbyte.Widths(8, 8), recipe=subbyte.Recipe(attention_bits=bits))
        losses[bits] = result.measured.loss
        assert (f"attention products at {bits} bits in 2 layers" in str(result)) == (bits is not None)
        assert result.save_pretrained(tmp_path / f"{bits}") == result.size_bytes
        again = subbyte.load_pretrained(tmp_path / f"{bits}")
        assert torch.equal(outputs(again, data[0])[0], outputs(result.model, data[0])[0])
    assert losses[8] < 2 * losses[None] + 1e-4 < losses[3]
    assert model.config._attn_implementation == "eager"  # the user's model is as it was


def test_factors_of_attention_lie_on_their_grids() -> None:
    model = text_models.model("BertForSequenceClassification")
    data = batches("BertForSequenceClassification", model)
    result = subbyte.quantize(model, data, widths=subbyte.Widths(8, 8), recipe=subbyte.Recipe(attention_bits=3))
    seen: dict[str, Tensor] = {}
    products = result.model.get_submodule("bert.encoder.layer.0.attention.self.attention_products")
    products.register_forward_hook(lambda module, args, output: seen.__setitem__(args[0], output))
    outputs(result.model, data[0])
    assert set(seen) == {"query", "key", "weights", "value"}
    assert all(len(factor.unique()) <= 8 for factor in seen.values())
    assert float(seen["weights"].min()) == 0.0


def test_gradients_pass_the_products() -> None:
    model = text_models.model("BertForSequenceClassification")
    recipe = subbyte.Recipe(attention_bits=4, refinements=(subbyte.BiasTuning(epochs=1, mixing=0.0),))
    result = subbyte.quantize(model, batches("BertForSequenceClassification", model), widths=subbyte.Widths(3, 8), recipe=recipe)
    assert not any("nothing done" in note for note in result.refinements[0].notes)


def test_products_need_an_attention_layer_of_the_library() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with pytest.raises(subbyte.OptionError, match="this model holds none"):
        subbyte.quantize(model, torch.randn(16, 4), recipe=subbyte.Recipe(attention_bits=8))
    with pytest.raises(subbyte.OptionError, match="2 to 8 bits"):
        subbyte.Recipe(attention_bits=9)
