"""What becomes of the layouts of the transformers library, small and with random weights: quantized, saved with a program, exported.

    python benchmarks/architectures.py --out docs/results/architectures.json      # all rows: about 15 minutes on one core
    python benchmarks/architectures.py --only swinv2 --only t5                    # some
    python benchmarks/architectures.py --table docs/results/architectures.json    # print the table of an earlier run

Every row is a fresh process. Encoders and vision models get 4.5 bits a weight on average, are loaded back from their programs, and run in
ONNX Runtime beside their simulations; models that predict the next token get 4 bits and float32 inputs. Weights are random, so that nothing
is said of accuracy, but of what is quantized and runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import subbyte

SAMPLES, TOKENS, WORDS = 32, 24, 200
IMAGE = {"num_labels": 10}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
PATCHES = {"image_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
LENGTH = {"max_position_embeddings": 64}
GROUPED = {**TEXT, **LENGTH, "num_key_value_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 16, **STAGES}),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", {"embedding_size": 16, "groups_width": 8, **STAGES}),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25, "initializer_range": 0.2}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35, "initializer_range": 0.2}),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64], "initializer_range": 0.2},
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "initializer_range": 0.2},
    ),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES),
    "convnext_v2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES),
    "focalnet": (
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {"image_size": 64, "embed_dim": 24, "depths": [1] * 3, "focal_levels": [2] * 3, "focal_windows": [3] * 3},
    ),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", STAGES),
    "vit": ("ViTForImageClassification", "ViTConfig", PATCHES),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PATCHES),
    "beit": ("BeitForImageClassification", "BeitConfig", PATCHES),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**PATCHES, "patch_size": 16, "mlp_ratio": 2}),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 64, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 64, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1] * 3, "key_dim": [8] * 3},
    ),
    "cvt": ("CvtForImageClassification", "CvtConfig", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    "pvt": ("PvtForImageClassification", "PvtConfig", {"image_size": 64, "num_attention_heads": [1, 1, 2, 4], **STAGES}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32, **STAGES},
    ),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**TEXT, **LENGTH}),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", {**TEXT, **LENGTH}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, **LENGTH, "embedding_size": 32}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, **LENGTH, "embedding_size": 32}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TEXT, **LENGTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", {**TEXT, **LENGTH}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**TEXT, **LENGTH, **ENDS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "esm": ("EsmForSequenceClassification", "EsmConfig", {**TEXT, **LENGTH, "pad_token_id": 0, "mask_token_id": 4}),
    "funnel": (
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {"vocab_size": WORDS, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 96, "block_sizes": [1, 1]},
    ),
    "t5": ("T5EncoderModel", "T5Config", {"vocab_size": WORDS, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}),
}
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, **LENGTH}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            **LENGTH,
        },
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": WORDS, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 12}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**TEXT, **LENGTH}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, **ENDS}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {**TEXT, **LENGTH}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
}
LAYOUTS = {**VISION, **ENCODERS, **CAUSAL}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=LAYOUTS, action="append", help="this layout (may be repeated)")
    parser.add_argument("--out", type=Path, help="write the rows here")
    parser.add_argument("--table", type=Path, help="print the table of this file instead of measuring")
    parser.add_argument("--row", choices=LAYOUTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measured(given.row)))
        return
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))["rows"]))
        return
    rows = []
    for name in given.only or LAYOUTS:
        command = [sys.executable, __file__, "--row", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if given.out:
            about = {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}
            given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def built(name: str) -> tuple[nn.Module, list[Any]]:
    """A model with random weights, and batches for it."""
    kind, config, settings = LAYOUTS[name]
    torch.manual_seed(0)
    labels = IMAGE if name in VISION else {}
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings, **labels)).eval()
    if name in VISION:
        return model, list(torch.randn(SAMPLES, 3, 64, 64).split(8))
    ids = torch.randint(5, WORDS, (SAMPLES, TOKENS))
    return model, [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in ids.split(8)]


def measured(name: str) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, batches = built(name)
    causal = name in CAUSAL
    budget = subbyte.Budget(average_bits=4.0 if causal else 4.5)
    result = subbyte.quantize(model, batches, budget=budget, recipe=subbyte.weight_only() if causal else subbyte.default())
    in_float = sum(left.parameters for left in result.left_out)
    everything = in_float + sum(layer.weight_count for layer in result.layers)
    row = {
        "layout": name,
        "model": type(model).__name__,
        "layers": len(result.layers),
        "in_float": in_float / everything,
        "size": result.size_bytes / result.float_bytes,
        "warned": any("stay in float32" in text for text in result.warnings),
    }
    if causal:
        return row
    with tempfile.TemporaryDirectory() as folder:
        row["program"] = _tried(lambda: _program(result, batches[0], Path(folder) / "m"))
        row["onnx"] = _tried(lambda: _onnx(result, Path(folder) / "m.onnx"))
    return row


def _tried(what: Callable[[], Any]) -> Any:
    """What it returns, or the message of its error."""
    try:
        return what()
    except subbyte.SubbyteError as error:
        return str(error)


def _program(result: subbyte.Result, batch: Any, path: Path) -> bool:
    """Whether the model of the file, without its class, returns the same bits."""
    result.save(path, program=True)
    loaded = subbyte.load(path)
    with torch.no_grad():
        expected, found = (model(**batch) if isinstance(batch, dict) else model(batch) for model in (result.model, loaded))
    pairs = [(value, found[key]) for key, value in expected.items() if isinstance(value, Tensor)]
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def _onnx(result: subbyte.Result, path: Path) -> dict[str, Any]:
    """What ONNX Runtime makes of the file."""
    check = result.export_onnx(path, allow_float=True).verification
    optimized = next(one for one in check.checks if one.optimized)
    return {
        "int8": len(check.kernels) - len(check.float_layers),
        "layers": len(check.kernels),
        "steps": optimized.largest_steps,
        "agreement": optimized.agreement,
        "size": path.stat().st_size / result.size_bytes,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as markdown."""
    lines = ["| layout | layers | weights in float32 | bytes of float32 | program | int8 in ONNX Runtime | output steps apart |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        program, onnx = row.get("program", ""), row.get("onnx", "")
        runs = f"{onnx['int8']} of {onnx['layers']} | {onnx['steps']:.2f}" if isinstance(onnx, dict) else f"{'no' if onnx else ''} |"
        told = {True: "same bits", False: "other bits", "": ""}.get(program, "no")
        lines.append(f"| {row['layout']} | {row['layers']} | {row['in_float']:.1%} | {row['size']:.3f} | {told} | {runs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
