"""Sample rows of a layer across samples and positions, and keep the rows of some samples back.

A few tens of rows for each unknown are plenty; more cost time and memory without telling more. Which samples are held out is drawn once for
the whole calibration set, so that a layer is never judged by a sample that another layer was fitted on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.calibrate.problem import Rows
from subbyte.errors import OptionError
from subbyte.model.operators import Operator


@dataclass(frozen=True)
class RowSampling:
    """How many rows, and which samples judge.

    Args:
        rows_per_unknown: rows to fit on, for each weight of one output channel.
        least_rows: rows to fit on, at least, where the calibration set has them.
        most_megabytes: limit on the fitted rows' inputs of one layer, in float32, 10^6 bytes.
        held_out: share of the samples that nothing is fitted on, above 0 and at most 0.5; ridges and iterates are chosen by them.

    Raises:
        OptionError: if a value is outside its range.

    Example:
        >>> RowSampling().wanted(groups=1, unknowns=576)
        36864
    """

    rows_per_unknown: int = 64
    least_rows: int = 2048
    most_megabytes: float = 256.0
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.rows_per_unknown < 1 or self.least_rows < 1 or self.most_megabytes <= 0 or not 0.0 < self.held_out <= 0.5:
            raise OptionError(f"rows and megabytes are positive and held_out is above 0 and at most 0.5, not {self}")

    def wanted(self, groups: int, unknowns: int) -> int:
        """Number of rows to fit a layer on.

        Args:
            groups: G.
            unknowns: n.
        """
        fits = int(self.most_megabytes * 1e6 / (4 * groups * unknowns))
        return max(1, min(max(self.rows_per_unknown * unknowns, self.least_rows), fits))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU that depends on the run's seed and a name only, not on what ran before.

    Args:
        seed: of the run.
        name: of the layer or task.

    Example:
        >>> generator_for(0, "a").initial_seed() == generator_for(0, "a").initial_seed() != generator_for(0, "b").initial_seed()
        True
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def held_out_samples(counts: Sequence[int], share: float, seed: int) -> tuple[Tensor, ...]:
    """Which samples of each batch are held out.

    Args:
        counts: number of samples in each batch.
        share: of all samples to hold out.
        seed: of the run.

    Returns:
        bool (samples,) for each batch. With one sample in all, none is held out.

    Example:
        >>> sum(int(mask.sum()) for mask in held_out_samples([10, 6], share=0.25, seed=0))
        4
    """
    total = sum(counts)
    chosen = torch.zeros(total, dtype=torch.bool)
    if total > 1:
        order = torch.randperm(total, device="cpu", generator=generator_for(seed, "held-out samples"))
        chosen[order[: max(1, round(share * total))]] = True
    return tuple(chosen.split(list(counts)))


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Positions of the sampled rows in one batch's input of one layer.

    Args:
        samples: int64 (R,), index along the layer's sample dimension.
        positions: int64 (R,), index of the output position.
        held_out: bool (R,).
    """

    samples: Tensor
    positions: Tensor
    held_out: Tensor


@dataclass(frozen=True, eq=False)
class RowCounts:
    """How many rows one batch's input of a layer offers.

    Args:
        samples: length of the layer's first dimension.
        positions: output positions of each.
        real: bool (samples, positions), the positions that are no padding; None if all are real.
    """

    samples: int
    positions: int
    real: Tensor | None = None

    @property
    def equations(self) -> int:
        """Rows that are no padding."""
        return self.samples * self.positions if self.real is None else int(self.real.sum())

    @property
    def of_each(self) -> Tensor:
        """Rows of each sample that are no padding, int64 (samples,)."""
        return torch.full((self.samples,), self.positions) if self.real is None else self.real.sum(dim=1).cpu()

    def real_place(self, samples: Tensor, places: Tensor) -> Tensor:
        """From a place among a sample's real positions to the position.

        Args:
            samples: int64 (R,).
            places: int64 (R,), below `of_each` of the sample.
        """
        if self.real is None:
            return places
        return (~self.real.cpu()).to(torch.int8).argsort(dim=1, stable=True)[samples, places]


def draw_rows(counts: Sequence[RowCounts], masks: Sequence[Tensor], wanted: int, generator: torch.Generator) -> list[RowIndex]:
    """Draw rows evenly over all samples and positions, without padding and without repetition inside a sample.

    Args:
        counts: of the layer's input, for each batch.
        masks: bool (samples of the batch,), the samples that are held out, for each batch.
        wanted: rows to fit on; a quarter as many are held out.
        generator: on the CPU.

    Returns:
        One index for each batch. With nothing held out, every eighth row is, so that a single sample can be judged too.
    """
    held = [spread_mask(mask, count.samples) for mask, count in zip(masks, counts, strict=True)]
    fit_samples = sum(int((~mask).sum()) for mask in held)
    held_samples = sum(int(mask.sum()) for mask in held)
    per_fit = -(-wanted // max(fit_samples, 1))
    per_held = -(-wanted // (4 * max(held_samples, 1)))
    indices = []
    for mask, count in zip(held, counts, strict=True):
        of_each = count.of_each
        take = torch.minimum(torch.where(mask, per_held, per_fit), of_each)
        which = torch.arange(count.samples).repeat_interleave(take)
        rank = torch.arange(len(which)) - (take.cumsum(0) - take).repeat_interleave(take)
        # rank-th of `take` positions: one in each of `take` equal parts, all moved by a random start, so that none repeats inside a sample
        start = torch.randint(0, count.positions, (count.samples,), device="cpu", generator=generator)[which]
        positions = of_each[which]
        first, after = rank * positions // take[which], (rank + 1) * positions // take[which]
        place = (start + first + (torch.rand(len(which), device="cpu", generator=generator) * (after - first)).long()) % positions
        indices.append(RowIndex(which, count.real_place(which, place), mask[which]))
    if held_samples == 0 and len(indices) == 1 and len(indices[0].samples) > 1:
        only = indices[0]
        indices = [RowIndex(only.samples, only.positions, torch.arange(len(only.samples)) % 8 == 7)]
    return indices


def spread_mask(mask: Tensor, samples: int) -> Tensor:
    """The held-out mask of a batch, for a layer whose first dimension counts something else than the batch's samples.

    Windows or tokens of one sample are taken to stand together. Where time comes first, early and late rows are told apart instead.

    Args:
        mask: bool (samples of the batch,).
        samples: length of the layer's first dimension.
    """
    if samples == len(mask):
        return mask
    return mask[torch.arange(samples) * len(mask) // samples]


def gather_rows(operator: Operator, x: Tensor, index: RowIndex) -> Tensor:
    """Rows of one batch at drawn positions.

    Args:
        operator: of the layer.
        x: the layer's input, float32, shape as the layer accepts it.
        index: which rows.

    Returns:
        float32 (G, R, n).
    """
    return operator.rows(x, index.samples.to(x.device), index.positions.to(x.device))


def split_rows(inputs: Tensor, targets: Tensor, held_out: Tensor) -> tuple[Rows, Rows]:
    """Rows to fit on, and rows to judge by; where there are none of one kind, the other serves as both.

    Args:
        inputs: float32 (G, R, n).
        targets: float32 (G, R, O).
        held_out: bool (R,).
    """
    held_out = held_out.to(inputs.device)
    if bool(held_out.all()) or not bool(held_out.any()):
        rows = Rows(inputs, targets)
        return rows, rows
    fit, judge = torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
    return Rows(inputs[:, fit], targets[:, fit]), Rows(inputs[:, judge], targets[:, judge])
