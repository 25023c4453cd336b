"""Texts for models of the transformers library: read from files, cut into tokens, put into batches.

Texts of similar length go into one batch, so that little of it is padding. A model that predicts the next token gets windows of one long
text instead, all of the same length.
"""

from __future__ import annotations

import csv
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import DataError, OptionError

__all__ = ["TEXT_SUFFIXES", "Tokenized", "read_column", "read_texts", "tokenized", "windows"]

TEXT_SUFFIXES = (".txt", ".jsonl", ".tsv")
TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = ("label",)
MOST_TOKENS = 512  # where neither model nor tokenizer has a limit


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Batches of texts, and where each text came from.

    Args:
        batches: keyword arguments of the model, int64 (samples, tokens) each.
        order: int64 (samples,), index among the texts of each sample of all batches in turn.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    order: Tensor


def read_texts(path: str | Path, key: str | None = None, *, limit: int | None = None) -> list[str]:
    """Texts of a file: .txt, one a line, empty ones left out; .jsonl, one object a line; .tsv, between tabs, with or without names above.

    Args:
        path: of the file, UTF-8.
        key: entry of the objects or column of the table, by its name or its number from 0; None: ``text`` or ``sentence`` if there is one,
            else the first.
        limit: take so many only, evenly spaced; None takes all.

    Raises:
        DataError: if the file is missing, damaged, of another kind, or holds no text or no such column.
        OptionError: if `limit` is not positive.

    Example:
        >>> read_texts("absent.txt")
        Traceback (most recent call last):
        subbyte.errors.DataError: 'absent.txt' does not exist
    """
    texts = [str(text) for text in read_column(path, key, TEXT_NAMES)]
    if limit is not None and limit < 1:
        raise OptionError(f"limit must be at least 1, not {limit}")
    if limit is not None and limit < len(texts):
        texts = [texts[index * len(texts) // limit] for index in range(limit)]
    return texts


def read_column(path: str | Path, key: str | None, names: Sequence[str]) -> list[Any]:
    """One column of a file of texts, see `read_texts`.

    Args:
        path: of the file, UTF-8.
        key: entry or column, by name or number; None: the first of `names` that there is, else the first column.
        names: of the column that is meant without a key.

    Raises:
        DataError: if the file is missing, damaged, of another kind, or holds no such column.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise DataError(f"'{path}' is of an unknown kind; texts come as {', '.join(TEXT_SUFFIXES)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    kind = path.suffix.lower()
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError(f"'{path}' holds no text")
    if kind == ".txt":
        return lines
    return _entries(path, lines, key, names) if kind == ".jsonl" else _cells(path, lines, key, names)


def tokenized(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 32, most_tokens: int | None = None) -> Tokenized:
    """Texts as batches, those of similar length together, padded where they differ.

    Args:
        model: that the batches are for; it says which entries it takes, and how many tokens.
        tokenizer: of the library.
        texts: at least one.
        batch_size: texts in one batch, at most.
        most_tokens: longer texts are cut; None: what the model takes.

    Raises:
        DataError: if a text has no tokens.
        OptionError: if the model does not take so many tokens.
    """
    most = token_limit(model, tokenizer, most_tokens)
    rows = [tokenizer(text, truncation=True, max_length=most) for text in texts]
    lengths = [len(row["input_ids"]) for row in rows]
    if min(lengths) == 0:
        raise DataError(f"text {lengths.index(0)} has no tokens: {texts[lengths.index(0)]!r}")
    taken = inspect.signature(model.forward).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    names = [name for name in rows[0] if name in taken or (every and name != "token_type_ids")]
    padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    order = sorted(range(len(texts)), key=lambda index: (lengths[index], index))
    batches = []
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        longest = max(lengths[index] for index in some)
        batches.append({name: _padded([rows[index][name] for index in some], longest, padding.get(name, 0)) for name in names})
    return Tokenized(tuple(batches), torch.tensor(order))


def windows(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, most_tokens: int | None = None, limit: int | None = None
) -> tuple[Mapping[str, Tensor], ...]:
    """One long text, cut into windows of equal length without overlap, for a model that predicts the next token.

    Args:
        model: that the windows are for.
        tokenizer: of the library.
        texts: are put behind each other, a line break between them.
        most_tokens: length of a window; None: what the model takes, at most 512.
        limit: so many windows only, evenly spaced; None takes all.

    Returns:
        Batches of up to 8 windows, `input_ids` int64 (samples, tokens) each.

    Raises:
        DataError: if the texts are shorter than one window.
        OptionError: if the model does not take so many tokens.
    """
    length = token_limit(model, tokenizer, most_tokens)
    ids = torch.tensor(tokenizer("\n".join(texts), verbose=False)["input_ids"])
    count = len(ids) // length
    if count == 0:
        raise DataError(f"the texts have {len(ids)} tokens, fewer than one window of {length}; give more, or a smaller --max-tokens")
    whole = ids[: count * length].view(count, length)
    if limit is not None and limit < count:
        whole = whole[torch.arange(limit) * count // limit]
    return tuple({"input_ids": part} for part in whole.split(8))


def token_limit(model: nn.Module, tokenizer: Any, asked: int | None) -> int:
    """How many tokens a text may have.

    Args:
        model: of the library; its configuration may have a limit.
        tokenizer: of the library; it may have one too.
        asked: by the user, or None.

    Raises:
        OptionError: if more are asked for than the model takes, or less than 1.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or MOST_TOKENS
    if asked is not None and not 1 <= asked <= own:
        raise OptionError(f"the model takes 1 to {own} tokens, not {asked}")
    limits = [own, MOST_TOKENS, getattr(tokenizer, "model_max_length", MOST_TOKENS)]
    return asked or int(min(limits))


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _entries(path: Path, lines: Sequence[str], key: str | None, names: Sequence[str]) -> list[Any]:
    try:
        objects = [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"'{path}' is no file of JSON lines: {error}") from error
    first = objects[0] if isinstance(objects[0], dict) else {}
    chosen = key or next((name for name in names if name in first), next(iter(first), ""))
    missing = [index for index, item in enumerate(objects) if not isinstance(item, dict) or chosen not in item]
    if missing:
        raise DataError(f"'{path}' has no entry '{chosen}' in line {missing[0] + 1}; the first has: {', '.join(first) or 'none'}")
    return [item[chosen] for item in objects]


def _cells(path: Path, lines: Sequence[str], key: str | None, names: Sequence[str]) -> list[Any]:
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    head = rows[0]
    chosen = key or next((name for name in names if name in head), None)
    if chosen is None or chosen.isdecimal():
        column = int(chosen or 0)
    elif chosen in head:
        column, rows = head.index(chosen), rows[1:]
    else:
        raise DataError(f"'{path}' has no column '{chosen}' in its first line: {', '.join(head)}; name one, or give its number from 0")
    short = [index for index, row in enumerate(rows) if len(row) <= column]
    if short or not rows:
        raise DataError(f"'{path}' has no column {column} in line {short[0] + 1 if short else 2}")
    return [row[column] for row in rows]
