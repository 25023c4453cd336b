"""One pass over the calibration set that gives every layer its solution, by lockstep forwards.

* **Parallel** flavour: the float model runs; a layer's input is the float input, layers do not see each other.
* **Sequential** flavour: the float model and the quantized one run side by side; a layer is fitted to the float model's output from what
  arrives through the layers that are already quantized, and so corrects their errors.
* **Hybrid** flavour: codes as in the parallel one, which a budget has solved already; then steps and biases are fitted, layer by layer, to
  what arrives.

A layer that is called several times in one forward has one set of codes for all calls. It is fitted on the rows of all of them, which the
sequential flavour cannot offer (the later inputs depend on the codes): it is solved in a parallel pass of its own first.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from subbyte.calibrate.gather import CalibrationSet, StopRows, problem_of, sample_at
from subbyte.calibrate.given_codes import refit
from subbyte.calibrate.guard import Judged, solve_guarded
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.models import CalibratedLayer, Models, assign_
from subbyte.calibrate.problem import Solver
from subbyte.calibrate.rows import RowSampling, generator_for
from subbyte.calibrate.shared import owner_of, solve_shared
from subbyte.calibrate.table import solve_table
from subbyte.errors import LayerError, naming_layer
from subbyte.model.lockstep import Forward, Lockstep, Stop
from subbyte.run.events import LayerSolved, Observer, StageFinished, StageStarted


class Flavour(Enum):
    """What a layer's input is during calibration.

    Example:
        >>> Flavour("parallel")
        <Flavour.PARALLEL: 'parallel'>
    """

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class Method:
    """How layers are solved.

    Args:
        solver: gives each layer its codes.
        baseline: what it has to beat.
        sampling: how many rows it sees.
        behind_clips: whether errors count as what clips a layer's output lets them through.
    """

    solver: Solver
    baseline: Solver
    sampling: RowSampling
    behind_clips: bool = True


def calibrate_(models: Models, data: CalibrationSet, method: Method, flavour: Flavour, kept: Kept, observer: Observer) -> dict[str, Judged]:
    """Solve every layer and give the quantized model its codes.

    Args:
        models: `models.quantized` is changed in place.
        data: calibration set.
        method: how to solve.
        flavour: what a layer's input is.
        kept: what is in it is not solved again; the rest is put into it, layer by layer.
        observer: is told of every layer.

    Returns:
        By layer name, in running order, what was found.

    Raises:
        LayerError: if a layer cannot be solved, or was reached by no batch.
    """
    started = time.perf_counter()
    repeated = tuple(item for item in models.multiplying if item.layer.calls > 1)
    alone = models.layers if flavour is not Flavour.SEQUENTIAL else repeated
    in_order = tuple(item for item in models.layers if item not in repeated) if flavour is not Flavour.PARALLEL else ()
    observer(StageStarted("calibrate", len(alone) + len(in_order)))
    solving = _Solving(data, method, kept, observer)
    found = solving.run(models, alone, Flavour.PARALLEL, {}) if alone else {}
    if in_order:
        before = {item.layer.name: found[item.layer.name] for item in repeated}
        assign_(models, {name: judged.solution for name, judged in before.items()})
        found = replace(solving, given=found).run(models, in_order, flavour, before)
    assign_(models, {name: judged.solution for name, judged in found.items()})
    observer(StageFinished("calibrate", time.perf_counter() - started))
    return {item.layer.name: found[item.layer.name] for item in models.layers}


@dataclass(frozen=True, eq=False)
class _Solving:
    """How the layers of a pass are solved; those that are `given` keep their codes."""

    data: CalibrationSet
    method: Method
    kept: Kept
    observer: Observer
    given: Mapping[str, Judged] = field(default_factory=dict)

    def run(self, models: Models, items: Sequence[CalibratedLayer], flavour: Flavour, before: Mapping[str, Judged]) -> dict[str, Judged]:
        """Lockstep over all batches; layers are solved as they are reached, those called several times when all forwards have ended.

        Returns what was found before and what is new.
        """
        by_name, sequential = {item.layer.name: item for item in items}, flavour is not Flavour.PARALLEL
        forwards = [Forward(models.original, batch, {item.layer.name: item.original for item in items}) for batch in self.data.batches]
        if sequential:
            quantized = {item.layer.name: item.quantized for item in items}
            forwards += [Forward(models.quantized, batch, quantized) for batch in self.data.batches]
        samples: dict[str, list[StopRows]] = defaultdict(list)
        found, repeated = dict(before), {item.layer.name for item in items if item.layer.calls > 1 and item.layer.operator.multiplies}
        grids = {item.layer.name: (item.weight_grid, item.activation_grid) for item in models.layers}
        with Lockstep(forwards, list(by_name)) as lockstep:
            for stop in lockstep:
                name, item = stop.layer, by_name[stop.layer]
                if name in found and (name in repeated or not item.layer.operator.multiplies):
                    continue
                if name in found:
                    raise LayerError(name, "is called more often on a later batch than on the first; put such a batch first, or exclude")
                prefix = (flavour, *((name, grids[name]) for name in found)) if sequential else ()
                known = self.kept.recall(item, prefix) if name not in samples else None
                if known is None:
                    samples[name] += self._sampled(item, stop, sequential=sequential)
                    known = None if name in repeated else self._solve(item, samples.pop(name), prefix, found)
                if known is not None:
                    found[name] = known
                    if sequential:
                        assign_(models, {name: known.solution})
        found |= {name: self._solve(by_name[name], samples[name], (), found) for name in list(samples)}
        for name in by_name:
            if name not in found:
                raise LayerError(name, "was reached by no calibration batch; exclude it or add samples that use it")
        return found

    def _sampled(self, item: CalibratedLayer, stop: Stop, *, sequential: bool) -> list[StopRows]:
        if not item.layer.operator.multiplies:
            return []
        return [sample_at(item, stop, self.data, self.method.sampling, sequential=sequential)]

    def _solve(self, item: CalibratedLayer, samples: Sequence[StopRows], prefix: object, found: Mapping[str, Judged]) -> Judged:
        started, name, generator = time.perf_counter(), item.layer.name, generator_for(self.data.seed, f"solve {item.layer.name}")
        with naming_layer(name, f"weight {item.layer.weight_shape}"):
            owner = owner_of(name, item.layer.shares, found) if item.layer.shares else None
            if not item.layer.operator.multiplies:
                judged = owner or solve_table(item, refine=self.method.solver != self.method.baseline)
            elif owner:
                judged = solve_shared(problem_of(item, samples), owner)
            elif name in self.given:
                problem = problem_of(item, samples)
                judged = refit(problem, self.given[name].solution, self.method.baseline.solve(problem, generator))
            else:
                judged = solve_guarded(problem_of(item, samples), self.method.solver, self.method.baseline, generator)
        self.kept.keep(item, judged, prefix)
        self.observer(LayerSolved("calibrate", name, judged.error, judged.baseline_error, time.perf_counter() - started))
        return judged
