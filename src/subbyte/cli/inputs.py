"""What the model is called with, from what `--data` names: images, arrays or texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from subbyte.cli.model_source import HUB
from subbyte.errors import DataError, OptionError
from subbyte.export.pretrained import is_causal, open_tokenizer
from subbyte.model.batches import Batch
from subbyte.tasks import Preprocessing, load_labels, load_samples
from subbyte.tasks.texts import LABEL_NAMES, TEXT_SUFFIXES, read_column, read_texts, tokenized, windows

__all__ = ["DataOptions", "Inputs", "load_inputs", "wanted_labels"]


@dataclass(frozen=True)
class DataOptions:
    """How data is read.

    Args:
        preprocessing: of images, or None.
        key: array in a file of several; entry or column of texts.
        samples: so many only, or None.
        batch_size: samples in one forward.
        most_tokens: of a text, or None.
    """

    preprocessing: Preprocessing | None
    key: str | None
    samples: int | None
    batch_size: int
    most_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Batches, and where each sample stood in the data.

    Args:
        batches: tensors (samples, ...), or keyword arguments of a text model.
        order: int64 (samples,), index in the data of each sample of all batches in turn.
    """

    batches: Sequence[Batch]
    order: Tensor

    def in_order(self, outputs: Tensor) -> Tensor:
        """What was computed batch by batch, in the order of the data.

        Args:
            outputs: any dtype, (samples, ...).
        """
        sorted_outputs = torch.empty_like(outputs)
        sorted_outputs[self.order] = outputs
        return sorted_outputs


def load_inputs(source: str, model: nn.Module, data: Path, options: DataOptions) -> Inputs:
    """Read what a model is called with.

    Args:
        source: as `--model` named it; a text model's tokenizer is there too.
        model: of that source.
        data: as `--data` named it.
        options: how to read it.

    Raises:
        DataError: if the data cannot be used.
        OptionError: if options do not go with the data.
    """
    if data.suffix.lower() not in TEXT_SUFFIXES:
        if options.most_tokens is not None:
            raise OptionError(f"--max-tokens is for texts ({', '.join(TEXT_SUFFIXES)}), not for '{data}'")
        samples = load_samples(data, options.preprocessing, limit=options.samples, key=options.key)
        return Inputs(samples.split(options.batch_size), torch.arange(len(samples)))
    if not source.startswith(HUB):
        raise OptionError(f"'{data}' holds texts, which need a tokenizer: name a folder of transformers, --model {HUB}FOLDER")
    if options.preprocessing is not None:
        raise OptionError(f"'{data}' holds texts; options for images do not go with them")
    tokenizer = open_tokenizer(source.removeprefix(HUB))
    if is_causal(model):
        texts = read_texts(data, options.key)
        parts = windows(model, tokenizer, texts, most_tokens=options.most_tokens, limit=options.samples)
        return Inputs(parts, torch.arange(sum(len(part["input_ids"]) for part in parts)))
    texts = read_texts(data, options.key, limit=options.samples)
    made = tokenized(model, tokenizer, texts, batch_size=options.batch_size, most_tokens=options.most_tokens)
    return Inputs(made.batches, made.order)


def wanted_labels(labels: Path | None, key: str | None, samples: int | None, count: int) -> Tensor | None:
    """Labels of the samples, int64 (samples,), or None where there are none.

    Args:
        labels: as `--labels` named them, or None.
        key: array or column, or None.
        samples: so many only, or None.
        count: of the samples that were read.

    Raises:
        DataError: if the labels cannot be used, or are not as many as the samples.
    """
    if labels is None:
        return None
    if labels.suffix.lower() in TEXT_SUFFIXES:
        found = _text_labels(labels, key)
        chosen = torch.arange(len(found)) if samples is None or samples >= len(found) else torch.arange(samples) * len(found) // samples
        found = found[chosen]
    else:
        found = load_labels(labels, key, limit=samples)
    if len(found) != count:
        raise DataError(f"{count} samples in the data, but {len(found)} labels in '{labels}'; they must be as many, in the same order")
    return found


def _text_labels(path: Path, key: str | None) -> Tensor:
    column = read_column(path, key, LABEL_NAMES)
    try:
        return torch.tensor([int(value) for value in column])
    except (TypeError, ValueError):
        raise DataError(
            f"'{path}' holds labels that are no class indices, such as {column[0]!r}; name their column with --labels-key"
        ) from None
