"""Step search: the steps of all layers together, with plain rounding, so that the quantized model returns what the float model does.

    minimise over the steps s_w, s_x of all layers        loss(float(x), quantized(x; s)),    codes round(w / s_w)

A step that is best for its own layer is not the best for the model: at few bits, what one layer clips or rounds away matters to the others.
Powell's method needs no gradient: along one step after the other a parabola through three losses says where the loss is least, then the way
that all steps have gone together is followed farther.

It is a baseline. Codes are rounded anew wherever a step moves, so it belongs behind `RoundToNearest`; what another solver found it would
undo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subbyte.calibrate.fit_samples import fit_parts
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.loss import OutputLoss, RelativeSquaredError, measure
from subbyte.calibrate.models import CalibratedLayer, Models, assign_, solution_of
from subbyte.calibrate.problem import LayerSolution
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.whole import Judge
from subbyte.errors import OptionError
from subbyte.model.batches import Batch, call, sample_count, select_samples
from subbyte.quantizers.affine import quantize
from subbyte.run.events import Observer, StageFinished, StageStarted

FARTHEST = 2.0  # of the three points' distance, that a line search goes


@dataclass(frozen=True)
class StepSearch(Refinement):
    """Powell's method over the steps of weights and inputs of all layers; all steps of a layer's weights move together.

    Args:
        loss: what is to become small on samples that are not held out.
        sweeps: over all layers; each takes up to six forward passes over the samples for every layer.
        distance: of the points of a line search, in the logarithm of a step.
        samples: that are used, at most.

    Raises:
        OptionError: if a value is not positive.

    Source:
        LAPQ (Nahshan et al. 2019, arXiv 1911.07190), its joint optimisation; Powell 1964 (doi 10.1093/comjnl/7.2.155).

    Example:
        >>> StepSearch(sweeps=1).name
        'StepSearch'
    """

    loss: OutputLoss = RelativeSquaredError()
    sweeps: int = 2
    distance: float = 0.1
    samples: int = 128

    def __post_init__(self) -> None:
        if min(self.sweeps, self.samples) < 1 or self.distance <= 0:
            raise OptionError(f"StepSearch needs positive counts and a positive distance, not {self}")

    @torch.no_grad()
    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there.
            judge: see there.
            observer: is told when it starts and ends.
        """
        parts = fit_parts(models.original, data)
        if not parts:
            return ("nothing done: the model does not run on a part of a batch, so that samples cannot be held out",)
        started = time.perf_counter()
        observer(StageStarted(self.name))
        search = _Search(models, _few(parts, self.samples), self)
        first = search.least
        for _ in range(self.sweeps):
            search.sweep_()
        observer(StageFinished(self.name, time.perf_counter() - started))
        return (f"{type(self.loss).__name__} of the samples it sees {first:.4g} -> {search.least:.4g}",)


def _few(parts: Sequence[Batch], most: int) -> list[Batch]:
    """The first samples of every batch, as many of each, at most so many of all."""
    each = max(1, most // len(parts))
    return [select_samples(part, torch.arange(min(each, sample_count(part)))) for part in parts]


@dataclass(eq=False)
class _Layer:
    """A layer, where its steps were, and the logarithms of how far the steps of its weights and of its input are from there."""

    item: CalibratedLayer
    start: LayerSolution
    moved: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def solution(self) -> LayerSolution:
        start, (of_weights, of_input) = self.start, self.moved
        activation = start.activation
        if activation is not None:
            activation = (activation[0] * math.exp(of_input), activation[1])
        if not of_weights:
            return replace(start, activation=activation)
        scale = start.scale * math.exp(of_weights)
        steps, zeros = start.per_weight(scale), start.per_weight(start.zero_point)
        codes: Tensor = quantize(self.item.float_weight(), steps, zeros, self.item.weight_grid).to(torch.int16)
        return replace(start, codes=codes, scale=scale, activation=activation)


class _Search:
    """The steps, the loss that they have, and moves that lower it."""

    def __init__(self, models: Models, batches: Sequence[Batch], settings: StepSearch) -> None:
        self._models, self._batches, self._settings = models, batches, settings
        self._references = [call(models.original, batch) for batch in batches]
        self._layers = [_Layer(item, solution_of(item)) for item in models.free]
        self.least = self._loss()

    def sweep_(self) -> None:
        """Along every step, then along the way that all went."""
        before = [tuple(layer.moved) for layer in self._layers]
        for layer in self._layers:
            for which in range(2 if layer.start.activation is not None else 1):
                self._search_([(layer, which, 1.0)], self._settings.distance)
        way = [(layer, k, layer.moved[k] - old[k]) for layer, old in zip(self._layers, before, strict=True) for k in range(2)]
        if any(change for _, _, change in way):
            self._search_([one for one in way if one[2]], 1.0)

    def _search_(self, direction: Sequence[tuple[_Layer, int, float]], distance: float) -> None:
        """Move to the least of three points and of the parabola through them."""
        start = [layer.moved[which] for layer, which, _ in direction]

        def go(far: float) -> None:
            for (layer, which, share), old in zip(direction, start, strict=True):
                layer.moved[which] = old + far * share
            assign_(self._models, {layer.item.layer.name: layer.solution() for layer, _, _ in direction})

        def loss_at(far: float) -> float:
            go(far)
            return self._loss()

        losses = {0.0: self.least, -distance: loss_at(-distance), distance: loss_at(distance)}
        below, above = losses[-distance], losses[distance]
        curvature = below + above - 2 * self.least
        farthest = FARTHEST * distance
        aim = 0.5 * distance * (below - above) / curvature if curvature > 0 else math.copysign(farthest, below - above)
        aim = max(-farthest, min(farthest, aim))
        if math.isfinite(aim) and aim not in losses:
            losses[aim] = loss_at(aim)
        best = min(losses, key=lambda far: losses[far] if not math.isnan(losses[far]) else math.inf)
        go(best)
        self.least = losses[best]

    def _loss(self) -> float:
        return measure(self._models.quantized, self._batches, self._references, self._settings.loss)
