"""The samples that a gradient is taken on: those that are not held out, shuffled, mixed with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.model.batches import Batch, call, floating_tensors, joined, map_tensors, sample_count, select_samples
from subbyte.model.padding import real_positions

Augmentation = Callable[[Batch, torch.Generator], Batch]
"""Makes of a batch another one that the model could meet too, with chance from the generator; the number of samples stays."""


def fit_parts(model: nn.Module, data: CalibrationSet) -> tuple[Batch, ...]:
    """The samples that are not held out, in one batch where they fit together; none if the model does not run on a part of a batch.

    Args:
        model: float model.
        data: calibration set; where all samples of all batches are held out, or none, all of them.
    """
    parts = [select_samples(batch, ~mask) for batch, mask in zip(data.batches, data.held_out, strict=True) if not bool(mask.all())]
    try:
        with torch.no_grad():
            call(model, parts[0])
    except Exception:  # noqa: BLE001 - whatever a user's model says to another batch size
        return ()
    return joined(parts)


def shuffled(parts: Sequence[Batch], most: int, generator: torch.Generator) -> Iterator[Batch]:
    """All samples once, in random order, parts of batches in random order.

    Args:
        parts: see `fit_parts`.
        most: samples in one batch.
        generator: on the CPU.

    Example:
        >>> [len(batch) for batch in shuffled([torch.zeros(5, 2)], 2, torch.Generator().manual_seed(0))]
        [2, 2, 1]
    """
    for index in torch.randperm(len(parts), device="cpu", generator=generator).tolist():
        for chosen in torch.randperm(sample_count(parts[index]), device="cpu", generator=generator).split(most):
            yield select_samples(parts[index], chosen)


def mixable(batch: Batch) -> bool:
    """Whether anything can be mixed: two samples or more, of floating-point numbers, none of which is padding.

    Args:
        batch: see `mixed`.

    Example:
        >>> mixable(torch.zeros(2, 3)), mixable(torch.zeros(1, 3)), mixable(torch.zeros(2, 3, dtype=torch.int64))
        (True, False, False)
    """
    count = sample_count(batch)
    numbers = any(x.dim() > 0 and x.shape[0] == count for x in floating_tensors(batch))
    return count > 1 and numbers and real_positions(batch) is None


def mixed(batch: Batch, most: float, generator: torch.Generator) -> Batch:
    """Every sample with some of another one mixed in: `(1 - a) x_i + a x_j`, `a` evenly from 0 to `most`; or, if not `mixable`, the batch.

    Args:
        batch: its floating-point tensors are mixed, those with samples along their first dimension; a tensor (samples, ...), or a tuple or
            mapping of such.
        most: the largest share of the other sample.
        generator: draws shares and partners, on the CPU.

    Example:
        >>> mixed(torch.tensor([[0.0], [1.0]]), 0.0, torch.Generator()).tolist()
        [[0.0], [1.0]]
    """
    if not mixable(batch):
        return batch
    count = sample_count(batch)
    partner = torch.randperm(count, device="cpu", generator=generator)
    share = most * torch.rand(count, device="cpu", generator=generator)

    def mix(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[0] != count:
            return x
        return x.lerp(x[partner.to(x.device)], share.to(x).view(-1, *([1] * (x.dim() - 1))))

    return map_tensors(batch, mix)


@torch.no_grad()
def varied(batch: Batch, augment: Augmentation | None, mixing: float, generator: torch.Generator) -> Batch:
    """A batch, augmented and mixed.

    Args:
        batch: see `mixed`.
        augment: the user's; None: nothing.
        mixing: see `mixed`; 0: nothing.
        generator: on the CPU.

    Example:
        >>> varied(torch.ones(2), lambda batch, generator: -batch, 0.0, torch.Generator()).tolist()
        [-1.0, -1.0]
    """
    batch = augment(batch, generator) if augment else batch
    return mixed(batch, mixing, generator) if mixing else batch
