"""What became of every layer, what stays in float32, and what the user should know: the part of a receipt that goes layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from subbyte.allocate.cost import LayerSize
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.models import CalibratedLayer
from subbyte.calibrate.whole import Measured
from subbyte.model.fold import Fold
from subbyte.model.layers import EXCLUDED, Layer, LeftOut, Survey
from subbyte.plan import Plan

MUCH = 0.1  # of the weights in float32 are worth a warning
MOST_NAMED = 3  # modules in it


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name: qualified name.
        kind: class and settings of the float module.
        weight_bits: width of its weight codes.
        weight_group: weights that share a step; None: all of an output channel.
        activation_bits: width of its input, or None where that stays in float32.
        weight_count: weights that are stored for it: 0 where they are another layer's.
        float_bytes: weight and bias in float32.
        size_bytes: codes, steps, zero-points and bias in the packed file, header not counted.
        solver: whose solution is kept.
        error: of the kept solution, relative, on held-out rows (see `calibrate.problem.relative_error`).
        baseline_error: of plain rounding, likewise.
        rejected_error: of a solution that the guard turned down, likewise; None if it was kept.
        unknowns: weights of one output channel.
        equations: independent rows that the calibration set offered for them.
        note: anything unusual about the layer.
    """

    name: str
    kind: str
    weight_bits: int
    weight_group: int | None
    activation_bits: int | None
    weight_count: int
    float_bytes: int
    size_bytes: int
    solver: str
    error: float
    baseline_error: float
    rejected_error: float | None
    unknowns: int
    equations: int
    note: str

    @property
    def weights(self) -> str:
        """Bits of its weights, and how many share a step where these are not all of an output channel."""
        return f"{self.weight_bits}" if self.weight_group is None else f"{self.weight_bits}/{self.weight_group}"


def layer_report(item: CalibratedLayer, judged: Judged, measured: Measured, shared: Collection[str]) -> LayerReport:
    """What became of one layer.

    Args:
        item: the layer and its grids.
        judged: what its solver and plain rounding reached.
        measured: of the whole; if the calibrated model was given up, the layer has the baseline's codes.
        shared: names of the layers that share their codes with others.
    """
    layer, grid = item.layer, item.weight_grid
    whole_rejected = measured.rejected_loss is not None
    kept = judged.baseline if whole_rejected else judged.solution
    activation_bits = None if item.activation_grid is None else item.activation_grid.bits
    stored = 0 if layer.shares else layer.weight_count
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        weight_bits=grid.bits,
        weight_group=grid.group,
        activation_bits=activation_bits,
        weight_count=stored,
        float_bytes=4 * (stored + (layer.outputs if layer.has_bias else 0)),
        size_bytes=LayerSize.of(layer, item.weights).bytes((grid.bits, activation_bits)),
        solver=kept.solver,
        error=judged.baseline_error if kept is judged.baseline else judged.error,
        baseline_error=judged.baseline_error,
        rejected_error=judged.error if judged.rejected and not judged.error <= judged.baseline_error else None,
        unknowns=judged.unknowns,
        equations=judged.equations,
        note=_note(layer, shared),
    )


def still_float(found: Survey, folds: Sequence[Fold]) -> tuple[LeftOut, ...]:
    """What stays in float32: everything left out but the batch norms that were folded away.

    Args:
        found: the model's layers.
        folds: batch norms that were folded.
    """
    folded = {fold.batch_norm for fold in folds}
    return tuple(left for left in found.left_out if left.name not in folded)


def _note(layer: Layer, shared: Collection[str]) -> str:
    notes = []
    if layer.calls > 1:
        notes.append(f"called {layer.calls} times, calibrated on the float inputs of all calls")
    if layer.other_names:
        notes.append(f"also {', '.join(layer.other_names)}")
    if layer.shares:
        notes.append(f"codes and steps are those of {layer.shares}, stored there")
    elif layer.tied_with and layer.name not in shared:
        notes.append(f"weight was shared with {', '.join(layer.tied_with)}, no longer is")
    return "; ".join(notes)


def warnings_for(found: Survey, judged: Mapping[str, Judged], measured: Measured, plan: Plan | None = None) -> tuple[str, ...]:
    """What the user should know before trusting the result.

    Args:
        found: the model's layers.
        judged: by layer name.
        measured: of the whole.
        plan: how a budget was met; None where widths were given.
    """
    warnings = [] if plan is None else list(plan.sensitivity.notes)
    if plan is not None:
        limits = plan.budget.degradations
        warnings += [
            f"{name} is {value:.4g}, above its limit of {limits[name]:.4g}: the best that was found" for name, value in plan.missed.items()
        ]
    poor = [(name, j.unknowns, j.equations) for name, j in judged.items() if j.equations < j.unknowns]
    if poor:
        listed = ", ".join(f"{name} ({unknowns} unknowns, {equations} equations)" for name, unknowns, equations in poor)
        warnings.append(f"too few samples to determine these layers, so that the ridge or plain rounding decides them: {listed}")
    rejected = [name for name, j in judged.items() if j.rejected and not j.error <= j.baseline_error]
    if rejected:
        warnings.append(f"plain rounding was better on held-out rows and is kept in: {', '.join(rejected)}")
    if measured.held_out_samples == 0:
        warnings.append("with a single calibration sample nothing could be held out to judge by")
    if measured.rejected_loss is not None:
        warnings.append("the calibrated model lost to plain rounding on held-out samples; the returned model is plainly rounded")
    never = [left.name for left in found.left_out if left.reason.startswith("never called")]
    if never:
        warnings.append(f"never called in a forward, so left in float32: {', '.join(never)}")
    return (*warnings, *_much_in_float(found))


def _much_in_float(found: Survey) -> list[str]:
    """A warning where a good part of the model is not quantized and nobody asked for that."""
    left = sorted((left for left in found.left_out if left.reason != EXCLUDED), key=lambda left: -left.parameters)
    parameters = sum(left.parameters for left in left)
    share = parameters / (parameters + sum(layer.weight_count for layer in found.layers if layer.shares is None))
    if share < MUCH:
        return []
    largest = "; ".join(f"{one.name} ({one.kind}, {one.parameters} parameters): {one.reason}" for one in left[:MOST_NAMED])
    more = f"; and {len(left) - MOST_NAMED} smaller ones" if len(left) > MOST_NAMED else ""
    return [f"{share:.0%} of the weights stay in float32: {largest}{more}"]
