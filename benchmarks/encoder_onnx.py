"""ONNX file of a BERT-like sentence classifier: bytes, accuracy, agreement with its simulation, and speed beside the float file.

    python benchmarks/encoder_onnx.py --model MODEL --data DATA                    # weights of 8 bits, inputs of 8 bits
    python benchmarks/encoder_onnx.py --model MODEL --data DATA --bits 4 --out docs/results/encoder_onnx.json

MODEL is a folder of the transformers library with a sequence classifier and its tokenizer; DATA holds train.tsv, of which 256 texts without
labels calibrate, and test.tsv. Both files are timed in turns in one process, at each batch size and length. Embeddings stay in float32
unless `--embeddings` gives their bits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import subbyte
from subbyte.export.onnx_model import OnnxModel
from subbyte.export.translation import Example, marked, to_file, trace
from subbyte.export.verify import as_arrays, in_turns
from subbyte.model.batches import call
from subbyte.tasks.texts import Tokenized, read_column, read_texts, tokenized

CALIBRATION, MOST_TOKENS = 256, 64
BATCH_SIZES, LENGTHS = (1, 8), (16, 24, 32, 128)
TIMED = 150  # runs of each file
RECIPES = {"rounding": subbyte.rounding(), "lattice": subbyte.Recipe()}


def classes(model: Callable[..., Any] | nn.Module, test: Tokenized) -> Tensor:
    """The class of every text, int64 (texts,)."""
    found = torch.empty(len(test.order), dtype=torch.int64)
    with torch.no_grad():
        outputs = [call(model, batch) for batch in test.batches]
    logits = [output if isinstance(output, Tensor) else output["logits"] for output in outputs]
    found[test.order] = torch.cat(logits).argmax(-1)
    return found


def latencies(files: tuple[bytes, bytes], example: Example, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of the file and of the float file at each batch size and length, and how many times faster the file is."""
    runs = [subbyte.OnnxRuntimeCPU().open(content, optimized=True, threads=threads) for content in files]
    rows = []
    for batch_size in BATCH_SIZES:
        for length in LENGTHS:
            batch = {name: torch.ones(batch_size, length, dtype=torch.int64) for name in example.batch}
            batch["input_ids"] = torch.randint(100, 20000, (batch_size, length))
            ours, floats = (1000.0 * min(seconds) for seconds in in_turns(runs, as_arrays(batch), TIMED))
            rows.append({"batch_size": batch_size, "length": length, "ms": ours, "float_ms": floats, "times_faster": floats / ours})
    return rows


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, dtype=torch.float32).eval()
    texts = read_texts(given.data / "train.tsv", given.column, limit=CALIBRATION)
    calibration = tokenized(model, tokenizer, texts, most_tokens=MOST_TOKENS).batches
    test = tokenized(model, tokenizer, read_texts(given.data / "test.tsv", given.column), most_tokens=MOST_TOKENS)
    labels = torch.tensor([int(label) for label in read_column(given.data / "test.tsv", given.label, ())])
    widths = subbyte.Widths(given.bits, 8, exclude=("*embeddings*",))
    if given.embeddings:
        widths = subbyte.Widths(given.bits, 8, pinned={"*embeddings*": (given.embeddings, None)})
    result = subbyte.quantize(model, calibration, widths=widths, recipe=RECIPES[given.recipe])
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        exported = result.export_onnx(path, threads=given.threads)
        content = path.read_bytes()
        in_runtime = classes(OnnxModel(path, threads=given.threads), test)
    example = Example.of(calibration)
    plain, _ = to_file(trace(marked(model).model, example), example, {})
    simulated, quantized, floats = (classes(one, test) for one in (exported.simulation, result.model, model))
    kernels = exported.verification.kernels
    share = {
        "accuracy": in_runtime == labels,
        "simulation_accuracy": simulated == labels,
        "model_accuracy": quantized == labels,
        "float_accuracy": floats == labels,
        "agreement": in_runtime == simulated,
        "agreement_with_float": in_runtime == floats,
    }
    return {
        "model": given.model.name,
        "bits": given.bits,
        "embeddings": given.embeddings,
        "recipe": given.recipe,
        "threads": given.threads,
        "layers": len(kernels),
        "int8": len(kernels) - len(exported.verification.float_layers),
        "bytes": len(content),
        "float_bytes": len(plain),
        "texts": len(labels),
        **{name: 100.0 * float(equal.double().mean()) for name, equal in share.items()},
        "latency": latencies((content, plain), example, given.threads),
    }


def table(row: dict[str, Any]) -> str:
    """The figures as markdown."""
    first = f"{row['model']}, weights of {row['bits']} bits, {row['recipe']}: {row['int8']} of {row['layers']} layers in int8, "
    first += f"{row['bytes']:,} bytes, float {row['float_bytes']:,}"
    names = [name for name in row if "accuracy" in name or "agreement" in name]
    second = f"{row['texts']} texts: " + ", ".join(f"{name} {row[name]:.2f} %" for name in names)
    lines = ["| samples | tokens | ms | float ms | times faster |", "|---|---|---|---|---|"]
    lines += [
        f"| {one['batch_size']} | {one['length']} | {one['ms']:.2f} | {one['float_ms']:.2f} | {one['times_faster']:.2f} |"
        for one in row["latency"]
    ]
    return "\n".join([first, second, "", *lines])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--column", help="of the texts; otherwise the first")
    parser.add_argument("--label", default="1", help="column of the labels in test.tsv")
    parser.add_argument("--bits", type=int, default=8, help="of the weights of linear layers")
    parser.add_argument("--embeddings", type=int, help="bits of the embeddings; otherwise float32")
    parser.add_argument("--recipe", choices=RECIPES, default="rounding")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    row = measure(given)
    if given.out:
        given.out.write_text(json.dumps(row, indent=1) + "\n")
    print(table(row))


if __name__ == "__main__":
    main()
