"""Texts come out of files as they went in, and into batches with as little padding as there can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from subbyte.errors import DataError, OptionError
from subbyte.tasks.texts import read_column, read_texts, token_limit, tokenized, windows
from tests import text_models


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("a.txt", "one two\n\nthree\n", None),
        ("a.jsonl", '{"label": 0, "text": "one two"}\n{"label": 1, "text": "three"}\n', None),
        ("a.jsonl", '{"body": "one two"}\n{"body": "three"}\n', "body"),
        ("a.tsv", "one two\t1\nthree\t0\n", None),
        ("a.tsv", "label\tsentence\n1\tone two\n0\tthree\n", None),
        ("a.tsv", "1\tone two\n0\tthree\n", "1"),
    ],
)
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, name: str, content: str, key: str | None) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name, key) == ["one two", "three"]
    assert read_texts(tmp_path / name, key, limit=1) == ["one two"]


def test_a_quote_is_a_character_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('a "quoted\t1\nword" here\t0\n')
    assert read_texts(tmp_path / "a.tsv") == ['a "quoted', 'word" here']
    assert read_column(tmp_path / "a.tsv", "1", ()) == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "content", "key", "message"),
    [
        ("a.txt", "\n\n", None, "holds no text"),
        ("a.csv", "x", None, "unknown kind"),
        ("a.jsonl", "{", None, "no file of JSON lines"),
        ("a.jsonl", '{"text": "a"}\n{"tex": "b"}', None, "no entry 'text' in line 2"),
        ("a.tsv", "a\tb\nc", "1", "no column 1 in line 2"),
        ("a.tsv", "a\tb", "text", "no column 'text' in its first line"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: str, key: str | None, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name, key)


def test_a_limit_is_positive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OptionError, match="at least 1"):
        read_texts(tmp_path / "a.txt", limit=0)


def test_batches_hold_every_text_once_and_say_which(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer, model, texts = text_models.tokenizer(), text_models.model("BertModel"), text_models.texts(20)
    made = tokenized(model, tokenizer, texts, batch_size=6)
    assert sorted(made.order.tolist()) == list(range(20))
    at = 0
    for batch in made.batches:
        assert set(batch) <= {"input_ids", "attention_mask", "token_type_ids"}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            text = texts[int(made.order[at])]
            assert ids[mask.bool()].tolist() == tokenizer(text)["input_ids"]
            assert bool((ids[~mask.bool()] == tokenizer.pad_token_id).all())
            at += 1
    padding = sum(int((1 - batch["attention_mask"]).sum()) for batch in made.batches)
    assert padding < 0.2 * sum(batch["attention_mask"].numel() for batch in made.batches)


def test_windows_are_the_text_in_order() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer, model, texts = text_models.tokenizer(), text_models.model("GPT2LMHeadModel"), text_models.texts(40)
    whole = torch.tensor(tokenizer("\n".join(texts), verbose=False)["input_ids"])
    parts: list[Tensor] = [batch["input_ids"] for batch in windows(model, tokenizer, texts, most_tokens=10)]
    assert torch.equal(torch.cat(parts).flatten(), whole[: len(whole) // 10 * 10])
    assert sum(len(batch["input_ids"]) for batch in windows(model, tokenizer, texts, most_tokens=10, limit=3)) == 3
    with pytest.raises(DataError, match="fewer than one window"):
        windows(model, tokenizer, texts[:1], most_tokens=24)


def test_the_limit_is_the_models() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer, model = text_models.tokenizer(), text_models.model("BertModel")
    assert token_limit(model, tokenizer, None) == 24
    assert token_limit(model, tokenizer, 7) == 7
    with pytest.raises(OptionError, match="1 to 24 tokens, not 25"):
        token_limit(model, tokenizer, 25)


def test_json_texts_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": 5}))
    assert read_texts(tmp_path / "a.jsonl") == ["5"]
