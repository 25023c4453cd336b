"""From forwards that wait at a layer to the layer's problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.calibrate.models import CalibratedLayer
from subbyte.calibrate.problem import LayerProblem
from subbyte.calibrate.rows import RowCounts, RowSampling, draw_rows, gather_rows, generator_for, held_out_samples, split_rows
from subbyte.errors import LayerError
from subbyte.model.batches import Batch, describe, sample_count
from subbyte.model.lockstep import Stop
from subbyte.model.operators import Operator
from subbyte.model.padding import real_rows


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Batches, and which of their samples judge.

    Args:
        batches: see `model.batches.as_batches`.
        held_out: bool (samples,) for each batch, any shape of the samples.
        seed: of the run.
    """

    batches: tuple[Batch, ...]
    held_out: tuple[Tensor, ...]
    seed: int

    @classmethod
    def drawn(cls, batches: tuple[Batch, ...], share: float, seed: int) -> CalibrationSet:
        """Batches of which a share of the samples is held out, drawn by the seed.

        Args:
            batches: see `model.batches.as_batches`.
            share: of all samples to hold out.
            seed: of the run.
        """
        return cls(batches, held_out_samples([sample_count(batch) for batch in batches], share, seed), seed)


@dataclass(frozen=True, eq=False)
class StopRows:
    """Rows of one stop.

    Args:
        inputs: `x'`, float32 (G, R, n).
        targets: `y`, float32 (G, R, O).
        held_out: bool (R,).
        equations: how many rows there would have been.
        constant: whether the float model feeds the same in all rows.
    """

    inputs: Tensor
    targets: Tensor
    held_out: Tensor
    equations: int
    constant: bool


def sample_at(item: CalibratedLayer, stop: Stop, data: CalibrationSet, sampling: RowSampling, *, sequential: bool) -> StopRows:
    """Gather rows from every forward that waits at a layer.

    Args:
        item: the layer.
        stop: forwards of the float model, by the index of their batch; sequential: those of the quantized model follow, in the same order.
        data: calibration set.
        sampling: how many rows.
        sequential: whether the inputs are those of the quantized model.

    Raises:
        LayerError: if inputs do not fit the layer, or the two models do not reach it with the same samples.
    """
    layer, operator, count = item.layer, item.layer.operator, len(data.batches)
    here = [index for index in range(count) if index in stop.runs]
    if sequential:
        unpaired = [index for index in here if index + count not in stop.runs]
        if unpaired or 2 * len(here) != len(stop.runs):
            raise LayerError(layer.name, "is reached by other samples in the quantized model than in the float one; use Flavour.PARALLEL")
    weight, bias = item.float_weight(), item.float_bias()
    counts = [_counts(operator, stop.input(index), data.batches[index]) for index in here]
    wanted = -(-sampling.wanted(weight.shape[0], weight.shape[2]) // layer.calls)
    rows = draw_rows(counts, [data.held_out[index] for index in here], wanted, generator_for(data.seed, f"rows {layer.name}"))
    gathered = [gather_rows(operator, stop.input(index), row) for index, row in zip(here, rows, strict=True)]
    for index, part in zip(here, gathered, strict=True):
        if (part.shape[0], part.shape[2]) != (weight.shape[0], weight.shape[2]):
            batch, x = describe(data.batches[index]), describe(stop.input(index))
            raise LayerError(layer.name, f"receives {x} from batch {batch}, which does not fit its weight {layer.weight_shape}")
    inputs = torch.cat(gathered, dim=1)
    del gathered
    constant = inputs.shape[1] > 1 and bool((inputs == inputs[:, :1]).all())
    targets = torch.baddbmm(bias[:, None, :], inputs, weight.mT)
    if sequential:
        for index in here:
            if stop.input(index).shape != stop.input(index + count).shape:
                shapes = f"{describe(stop.input(index))} in the float model, {describe(stop.input(index + count))} in the quantized one"
                raise LayerError(layer.name, f"receives {shapes}; use Flavour.PARALLEL")
        inputs = torch.cat([gather_rows(operator, stop.input(index + count), row) for index, row in zip(here, rows, strict=True)], dim=1)
    held_out = torch.cat([row.held_out for row in rows])
    return StopRows(inputs, targets, held_out, sum(count.equations for count in counts), constant)


def _counts(operator: Operator, x: Tensor, batch: Batch) -> RowCounts:
    return RowCounts(*operator.count(x), real_rows(batch, operator.layout(x)))


def problem_of(item: CalibratedLayer, samples: Sequence[StopRows]) -> LayerProblem:
    """The problem of a layer from the rows of all its stops.

    Args:
        item: the layer.
        samples: of its stops.

    Raises:
        LayerError: if the float model feeds the same to the layer in all rows.
    """
    if all(sample.constant for sample in samples):
        raise LayerError(
            item.layer.name,
            f"receives the same input in all {samples[0].inputs.shape[1]} sampled rows, so nothing can be calibrated; check the "
            "calibration data and its preprocessing, or exclude the layer",
        )
    inputs, targets = samples[0].inputs, samples[0].targets
    if len(samples) > 1:
        inputs, targets = torch.cat([s.inputs for s in samples], dim=1), torch.cat([s.targets for s in samples], dim=1)
    fit, held_out = split_rows(inputs, targets, torch.cat([s.held_out for s in samples]))
    return LayerProblem(
        name=item.layer.name,
        weight=item.float_weight(),
        bias=item.float_bias(),
        fit=fit,
        held_out=held_out,
        weight_grid=item.weight_grid,
        activation_grid=item.activation_grid,
        equations=sum(s.equations for s in samples),
        clip=item.clip,
    )
