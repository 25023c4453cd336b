"""The guard of the whole model: calibrated layers are kept only if the model is no worse than plainly rounded on held-out samples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from subbyte.calibrate.fit_samples import mixable, mixed
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.loss import OutputLoss, check_output, measure
from subbyte.calibrate.models import Models, assign_
from subbyte.calibrate.rows import generator_for
from subbyte.errors import ModelError
from subbyte.model.batches import Batch, call, joined, sample_count, select_samples
from subbyte.run.events import Observer, StageFinished, StageStarted

PIECE = 32  # samples that are mixed with each other, and run at once
MIXTURES = 3  # for each held-out sample


@dataclass(frozen=True)
class Measured:
    """Losses of the whole model on held-out samples.

    Args:
        loss_name: what is measured, for example ``"KLDivergence"``.
        loss: of the model that is returned.
        baseline_loss: of the model with plain rounding in every layer (in the sequential flavour with input steps that were chosen on what
            arrives through the calibrated layers).
        rejected_loss: of the calibrated model, where it lost to plain rounding and was given up; else None.
        samples: calibration samples in all.
        held_out_samples: how many of them judged; 0 where there was only one sample, which then did both.
        mixtures: of held-out samples, how many judged beside them.
    """

    loss_name: str
    loss: float
    baseline_loss: float
    rejected_loss: float | None
    samples: int
    held_out_samples: int
    mixtures: int = 0


@dataclass(frozen=True, eq=False)
class Judge:
    """The held-out samples of a calibration set, and what the float model returns for them. With none held out, all samples judge.

    Args:
        batches: what models are called with.
        references: what the float model returned for each, tensors of any shape.
        loss: distance from it.
        samples: calibration samples in all.
        held_out_samples: how many of them are held out.
        mixtures: of them, how many judge beside them.
        start_loss: of the quantized model, as a refinement is given it; None where that was not measured.
    """

    batches: tuple[Batch, ...]
    references: tuple[object, ...]
    loss: OutputLoss
    samples: int
    held_out_samples: int
    mixtures: int = 0
    start_loss: float | None = None

    @classmethod
    def of(cls, original: nn.Module, data: CalibrationSet, loss: OutputLoss) -> Judge:
        """Run the float model on the held-out samples.

        Args:
            original: float model.
            data: calibration set.
            loss: distance from the float model's outputs.

        Raises:
            ModelError: if the float model returns NaN or infinite numbers.
        """
        held = sum(int(mask.sum()) for mask in data.held_out)
        judging = [
            _judging(original, batch, mask) for batch, mask in zip(data.batches, data.held_out, strict=True) if bool(mask.any()) or not held
        ]
        for _, reference in judging:
            check_output(reference)
        batches, references = tuple(batch for batch, _ in judging), tuple(reference for _, reference in judging)
        return cls(batches, references, loss, sum(len(mask) for mask in data.held_out), held)

    def with_mixtures(self, original: nn.Module, each: int, seed: int) -> Judge:
        """Let mixtures of held-out samples judge too: `(1 - a) x_i + a x_j`, `a` evenly from 0 to 1.

        A few dozen samples, on which a classifier was perhaps trained and is sure of itself, say little about which of two quantized models
        is the better one; between samples it is less sure, and there are as many of them as are wanted.

        Args:
            original: float model.
            each: mixtures for each held-out sample; 0: none.
            seed: of the run.

        Returns:
            Itself where nothing can be mixed (see `fit_samples.mixable`), and where the float model does not take mixtures or returns NaN
            or infinite numbers for them.
        """
        generator = generator_for(seed, "mixtures that judge")
        parts = [part for part in _pieces(joined(self.batches)) if mixable(part)]
        batches = tuple(mixed(part, 1.0, generator) for _ in range(each) for part in parts)
        try:
            with torch.no_grad():
                references = tuple(call(original, batch) for batch in batches)
            for reference in references:
                check_output(reference)
        except Exception:  # noqa: BLE001 - whatever a user's model says to inputs that it was not made for
            return self
        count = sum(sample_count(batch) for batch in batches)
        return replace(self, batches=self.batches + batches, references=self.references + references, mixtures=count)

    def loss_of(self, model: nn.Module) -> float:
        """The loss of a model; NaN where it returns NaN.

        Args:
            model: in evaluation mode.
        """
        return measure(model, self.batches, self.references, self.loss)


def _pieces(batches: Sequence[Batch]) -> list[Batch]:
    return [select_samples(batch, some) for batch in batches for some in torch.arange(sample_count(batch)).split(PIECE)]


def _judging(model: nn.Module, batch: Batch, mask: Tensor) -> tuple[Batch, object]:
    """The held-out samples of a batch and what the float model returns for them; the whole batch where the model takes no part of it."""
    with torch.no_grad():
        if bool(mask.any()):
            with contextlib.suppress(Exception):  # a fixed batch size, say
                part = select_samples(batch, mask)
                return part, call(model, part)
        return batch, call(model, batch)


def guard_whole_(models: Models, judged: Mapping[str, Judged], judge: Judge, observer: Observer) -> Measured:
    """Measure the calibrated model and the plainly rounded one, and leave the better one in `models.quantized`.

    Args:
        models: `models.quantized` has its codes; is changed in place where plain rounding wins.
        judged: by layer name.
        judge: measures.
        observer: is told when it starts and ends.

    Raises:
        ModelError: if the returned model's loss is NaN or infinite.
    """
    started = time.perf_counter()
    observer(StageStarted("verify"))
    reached = judge.loss_of(models.quantized)
    assign_(models, {name: j.baseline for name, j in judged.items()})
    plain = judge.loss_of(models.quantized)
    rejected = not reached <= plain
    if not rejected:
        assign_(models, {name: j.solution for name, j in judged.items()})
    final = plain if rejected else reached
    if not torch.isfinite(torch.tensor(final)):
        raise ModelError("the quantized model returns NaN or infinite numbers on held-out samples; give more bits or exclude layers")
    observer(StageFinished("verify", time.perf_counter() - started))
    return Measured(
        type(judge.loss).__name__, final, plain, reached if rejected else None, judge.samples, judge.held_out_samples, judge.mixtures
    )
