"""Weight-only quantization of causal language models: a GPT-2 and a Llama, trained here in minutes, and how their perplexity rises.

Each is trained on the validation text of WikiText-2 with a tokenizer made from it, calibrated on 256 windows of the same text, without
labels, and scored on all of the test text: perplexity, and KL divergence from the float model in thousandths of a nat a token. Seed 0 has
windows spaced evenly, the others have random ones. *subbyte* is `weight_only()`, *layers* the same without its tuning, and *network* has
`Networkwise()` behind these, where weights are in groups; *columns* is error feedback alone, as GPTQ does it; *rounding* is plain rounding.

    python benchmarks/causal_lm.py train --folder FOLDER                                # once; about 15 minutes on two cores
    python benchmarks/causal_lm.py measure --folder FOLDER --out docs/results/causal_lm.json
    python benchmarks/causal_lm.py table --out docs/results/causal_lm.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

import subbyte
from subbyte.export.pretrained import open_pretrained, open_tokenizer
from subbyte.tasks import default_data_root
from subbyte.tasks.texts import windows

TOKENS, WORDS = 128, 2048
KINDS = ("gpt2", "llama")
ROWS: dict[str, tuple[int, int | None]] = {"4": (4, None), "4,64": (4, 64), "3,64": (3, 64), "2,64": (2, 64)}  # bits, group
RECIPES = ("subbyte", "layers", "network", "columns", "rounding")
NEAR = ("subbyte", "layers", "columns")  # whose distance from the float model the table shows
KEY = ("model", "bits", "group", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Weight-only quantization of causal language models.")
    parser.add_argument("what", choices=["train", "measure", "table"])
    parser.add_argument("--folder", type=Path, help="where the trained models are")
    parser.add_argument("--data", type=Path, help="folder with wikitext2/; otherwise the one beside the checkout")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--row", choices=ROWS, action="append", help="only this one: bits, group (may be repeated)")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seeds", default="0", help="of the calibration windows, such as 0,1,2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added as they are measured, and replace those of the same kind")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subbyte.keep_freed_memory()
    if options.what == "table":
        print(table(json.loads(options.out.read_text())["rows"]))
        return
    data = (options.data or default_data_root() or Path()) / "wikitext2"
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    for kind in options.kind or KINDS:
        if options.what == "train":
            train(kind, options.folder / kind, data, options.epochs)
            continue
        wanted = [ROWS[name] for name in options.row or ROWS]
        for seed in map(int, options.seeds.split(",")):
            for new in measured(options.folder / kind, data, wanted, options.recipe or RECIPES, seed):
                row = {"model": kind} | new
                old = next((one for one in rows if all(one[key] == row[key] for key in KEY)), None)
                rows = [row if one is old else one for one in rows] if old else [*rows, row]
                row |= {name: value for name, value in (old or {}).items() if name not in row}
                print(table([row]).splitlines()[-1], flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if rows:
        print(table(rows))


def train(kind: str, folder: Path, data: Path, epochs: int) -> None:
    """Train a tokenizer and a model, and write both."""
    torch.manual_seed(0)
    tokenizer = trained_tokenizer(data / "valid.txt")
    shared: dict[str, Any] = {"vocab_size": WORDS, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    config = (
        transformers.GPT2Config(n_embd=192, n_layer=4, n_head=6, n_positions=TOKENS, **shared)
        if kind == "gpt2"
        else transformers.LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=False,
            **shared,
        )
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(tokenizer((data / "valid.txt").read_text(), verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    per_epoch = len(ids) // (TOKENS * 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * per_epoch, pct_start=0.1)
    started, model = time.perf_counter(), model.train()
    for epoch in range(epochs):
        offset = int(torch.randint(0, TOKENS, ()))
        rows = ids[offset : offset + (len(ids) - TOKENS) // TOKENS * TOKENS].view(-1, TOKENS)
        total = 0.0
        parts = rows[torch.randperm(len(rows))].split(16)[:per_epoch]
        for part in parts:
            logits = model(input_ids=part).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"{kind} epoch {epoch + 1}: loss {total / len(parts):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{kind}: perplexity {perplexity(model, batches(model, tokenizer, data / 'test.txt', None)):.3f} on the test text", flush=True)


def trained_tokenizer(path: Path) -> Any:
    """Byte pairs of a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train([str(path)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>", model_max_length=TOKENS)


def batches(model: torch.nn.Module, tokenizer: Any, path: Path, limit: int | None) -> tuple[Any, ...]:
    """Windows of a text."""
    return windows(model, tokenizer, path.read_text().splitlines(), most_tokens=TOKENS, limit=limit)


@torch.no_grad()
def perplexity(model: torch.nn.Module, parts: Sequence[Any]) -> float:
    """Of the next token, over all windows."""
    total, count = 0.0, 0
    for part in parts:
        target = part["input_ids"][:, 1:].flatten()
        total += float(F.cross_entropy(model(**part).logits[:, :-1].flatten(0, 1), target, reduction="sum"))
        count += len(target)
    return math.exp(total / count)


@torch.no_grad()
def divergence(model: torch.nn.Module, reference: torch.nn.Module, parts: Sequence[Any]) -> float:
    """KL divergence of the next token from what the float model expects, mean over all windows, in nats."""
    total, count = 0.0, 0
    for part in parts:
        p, q = (one(**part).logits[:, :-1].log_softmax(-1).flatten(0, 1) for one in (reference, model))
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
        count += len(p)
    return total / count


def measured(folder: Path, data: Path, rows: Sequence[tuple[int, int | None]], names: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one model and seed, one after the other."""
    model, tokenizer = open_pretrained(folder), open_tokenizer(folder)
    calibration, test = batches(model, tokenizer, data / "valid.txt", 256), batches(model, tokenizer, data / "test.txt", None)
    if seed:
        every = torch.cat([part["input_ids"] for part in batches(model, tokenizer, data / "valid.txt", None)])
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:256]
        calibration = tuple({"input_ids": part} for part in every[chosen].split(8))
    reference = perplexity(model, test)
    for bits, group in rows:
        recipes = {
            "subbyte": replace(subbyte.weight_only(), weight_group=group),
            "layers": subbyte.Recipe(weight_group=group),
            "network": subbyte.Recipe(weight_group=group, refinements=(subbyte.Networkwise(),)),
            "columns": subbyte.Recipe(weight_group=group, solver=subbyte.Lattice.columns()),
            "rounding": replace(subbyte.rounding(), weight_group=group),
        }
        row: dict[str, Any] = {"bits": bits, "group": group, "seed": seed, "float": round(reference, 4)}
        for name in names:
            if name == "network" and group is None:
                continue
            started = time.perf_counter()
            result = subbyte.quantize(model, calibration, widths=subbyte.Widths(bits, None), recipe=recipes[name], seed=seed)
            row |= {name: round(perplexity(result.model, test), 4), f"{name} seconds": round(time.perf_counter() - started, 1)}
            row |= {f"{name} kl": round(divergence(result.model, model, test), 6)}
            row |= {"bytes": result.size_bytes, "float bytes": result.float_bytes}
        yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: perplexities, means over seeds, and by how many percent they rise; KL divergences, in thousandths of a nat."""
    head = ["model", "bits", "group", "seeds", "float", *RECIPES, *(f"KL: {name}" for name in NEAR), "bytes", "float bytes"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model, bits, group in dict.fromkeys((row["model"], row["bits"], row["group"]) for row in rows):
        same = [row for row in rows if (row["model"], row["bits"], row["group"]) == (model, bits, group)]
        rises = [rise(same, name) for name in RECIPES]
        first = same[0]
        cells = [model, bits, group or "channel", len(same), f"{first['float']:.3f}", rises[0] and f"**{rises[0]}**", *rises[1:]]
        cells += [thousandths(same, name) for name in NEAR]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {first['bytes']:,} | {first['float bytes']:,} |")
    return "\n".join(lines)


def rise(rows: Sequence[dict[str, Any]], name: str) -> str:
    """A recipe's cell; empty where no seed has it."""
    found = [row[name] for row in rows if name in row]
    if not found:
        return ""
    mean, seeds = sum(found) / len(found), "" if len(found) == len(rows) else f", {len(found)} seed{'s' * (len(found) > 1)}"
    return f"{mean:.3f} ({100 * (mean / rows[0]['float'] - 1):+.2f} %{seeds})"


def thousandths(rows: Sequence[dict[str, Any]], name: str) -> str:
    """A recipe's KL divergence; empty where no seed has it."""
    found = [1000 * row[f"{name} kl"] for row in rows if f"{name} kl" in row]
    if not found:
        return ""
    seeds = "" if len(found) == len(rows) else f" ({len(found)} seed{'s' * (len(found) > 1)})"
    return f"{sum(found) / len(found):.2f}{seeds}"


if __name__ == "__main__":
    main()
