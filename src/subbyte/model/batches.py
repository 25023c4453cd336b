"""Batches, what a model is called with: tensors, tuples (positional arguments) or mappings (keyword arguments)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import DataError

Batch = Any

DEFAULT_BATCH_SIZE = 32
MOST_BATCHES = 1024  # each has a call stack of its own, and its input waits at every layer


def as_batches(data: Tensor | Iterable[Batch]) -> tuple[Batch, ...]:
    """Calibration data as a tuple of non-empty batches.

    Args:
        data: a tensor (samples, ...), any dtype and any shape after the first dimension, which is cut into batches of 32; or any iterable
            of batches, each a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments) of the model.

    Raises:
        DataError: if there is no sample or there are more than 1,024 batches, if a batch has no tensor with a sample dimension, or if a
            number in it is NaN or infinite.

    Example:
        >>> [batch.shape[0] for batch in as_batches(torch.zeros(70, 3))]
        [32, 32, 6]
    """
    if isinstance(data, Mapping | str | bytes) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise DataError(f"calibration data is a tensor or an iterable of batches, not {kind}; put a single batch into a list")
    if isinstance(data, Tensor) and data.dim() == 0:
        raise DataError("calibration data is a tensor (samples, ...), not a single number")
    batches = tuple(data.split(DEFAULT_BATCH_SIZE)) if isinstance(data, Tensor) else tuple(data)
    batches = tuple(batch for batch in batches if not (isinstance(batch, Tensor) and batch.numel() == 0))
    if not batches:
        raise DataError("the calibration set is empty; a few hundred unlabeled samples are wanted, one is the least")
    if len(batches) > MOST_BATCHES:
        raise DataError(f"{len(batches)} calibration batches run at once, {MOST_BATCHES} are the most; put more samples into each batch")
    for index, batch in enumerate(batches):
        if sample_count(batch) == 0:
            raise DataError(f"calibration batch {index} holds no tensor with samples along dimension 0: {describe(batch)}")
        for tensor in tensors(batch):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(f"calibration batch {index} holds NaN or infinite numbers; remove those samples or mend the preprocessing")
    return tuple(map_tensors(batch, _plain) for batch in batches)


def _plain(tensor: Tensor) -> Tensor:
    """Without a past: one made in inference mode could never be part of a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a batch or in a model's output, in a fixed order.

    Args:
        value: a tensor of any shape, or tuples, lists, mappings and dataclasses of such; anything else is passed over.

    Example:
        >>> [t.item() for t in tensors({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def floating_tensors(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a batch or in a model's output, in a fixed order.

    Args:
        value: see `tensors`, any shape.

    Example:
        >>> [t.item() for t in floating_tensors((torch.tensor(1.5), torch.tensor(2)))]
        [1.5]
    """
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed.

    Args:
        value: a tensor of any shape, or tuples, lists and mappings of such; anything else is kept as it is.
        change: what to do with one tensor.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def sample_count(batch: Batch) -> int:
    """Number of samples in a batch: the first dimension of its first tensor that has one; 0 if there is none.

    Args:
        batch: a batch, see `as_batches`.
    """
    return next((tensor.shape[0] for tensor in tensors(batch) if tensor.dim() > 0), 0)


def select_samples(batch: Batch, chosen: Tensor) -> Batch:
    """Some samples of a batch: every tensor whose first dimension counts the samples is cut, the others are kept.

    Args:
        batch: a batch, see `as_batches`.
        chosen: bool (samples,), True for the samples to keep; or int64 (k,), their indices.
    """
    count = sample_count(batch)
    return map_tensors(batch, lambda tensor: tensor[chosen.to(tensor.device)] if tensor.dim() and tensor.shape[0] == count else tensor)


def joined(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """One batch of all samples, where all batches are of one structure and shape; otherwise the batches as they are.

    Args:
        batches: see `as_batches`.

    Example:
        >>> [batch.shape for batch in joined([torch.zeros(2, 3), torch.zeros(4, 3)])]
        [torch.Size([6, 3])]
        >>> len(joined([torch.zeros(2, 3), torch.zeros(2, 5)]))
        2
    """
    batches = tuple(batches)
    described = [describe(map_tensors(batch, lambda tensor: tensor[:0] if tensor.dim() else tensor)) for batch in batches]
    columns = [list(tensors(batch)) for batch in batches]
    whole = all(tensor.dim() and tensor.shape[0] == sample_count(batch) for batch in batches for tensor in tensors(batch))
    none = torch.empty(0)
    others = [map_tensors(batch, lambda tensor: none) for batch in batches]  # what is no tensor: flags, names
    if len(batches) < 2 or not whole or len(set(described)) > 1 or any(str(other) != str(others[0]) for other in others):
        return batches
    together = iter([torch.cat(same) for same in zip(*columns, strict=True)])
    return (map_tensors(batches[0], lambda tensor: next(together)),)


def probes(batches: Sequence[Batch]) -> list[Batch]:
    """Two samples of up to four batches, spread evenly: enough to see whether a change of the model changed what it computes.

    Args:
        batches: see `as_batches`.

    Example:
        >>> [probe.shape[0] for probe in probes(as_batches(torch.zeros(70, 3)))]
        [2, 2, 2]
    """
    chosen = batches[:: -(-len(batches) // 4)]
    return [select_samples(batch, torch.arange(sample_count(batch)) < 2) for batch in chosen]


def call(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch, which is brought to the model's device first.

    Args:
        model: any module.
        batch: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    """
    owned = next(iter(model.parameters()), next(iter(model.buffers()), None))
    if owned is not None:
        device = owned.device
        batch = map_tensors(batch, lambda tensor: tensor.to(device))
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    return model(batch)


def describe(value: Any) -> str:
    """Shapes and dtypes of a batch in words, for error messages.

    Args:
        value: a batch or a model's output.

    Example:
        >>> describe((torch.zeros(2, 3), {"n": torch.tensor(1)}))
        '(float32 (2, 3), {n: int64 ()})'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return type(value).__name__
