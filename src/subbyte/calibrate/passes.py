"""One pass over the calibration set that gives every layer its solution, by lockstep forwards.

* **Parallel** flavour: the float model runs; a layer's input is the float input, layers do not see each other.
* **Sequential** flavour: the float model and the quantized one run side by side; a layer is fitted to the float model's output from what
  arrives through the layers that are already quantized, and so corrects their errors.

A layer that is called several times in one forward has one set of codes for all calls. It is fitted on the rows of all of them, which the
sequential flavour cannot offer (the later inputs depend on the codes): it is solved in a parallel pass of its own first.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from subbyte.calibrate.gather import CalibrationSet, StopRows, problem_of, sample_at
from subbyte.calibrate.guard import Judged, solve_guarded
from subbyte.calibrate.models import CalibratedLayer, Models, assign_
from subbyte.calibrate.problem import Solver
from subbyte.calibrate.rows import RowSampling, generator_for
from subbyte.errors import LayerError, naming_layer
from subbyte.model.lockstep import Forward, Lockstep
from subbyte.run.events import LayerSolved, Observer, StageFinished, StageStarted


class Flavour(Enum):
    """What a layer's input is during calibration.

    Example:
        >>> Flavour("parallel")
        <Flavour.PARALLEL: 'parallel'>
    """

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


@dataclass(frozen=True)
class Method:
    """How layers are solved.

    Args:
        solver: gives each layer its codes.
        baseline: what it has to beat.
        sampling: how many rows it sees.
    """

    solver: Solver
    baseline: Solver
    sampling: RowSampling


def calibrate_(models: Models, data: CalibrationSet, method: Method, flavour: Flavour, observer: Observer) -> dict[str, Judged]:
    """Solve every layer and give the quantized model its codes.

    Args:
        models: `models.quantized` is changed in place.
        data: calibration set.
        method: how to solve.
        flavour: what a layer's input is.
        observer: is told of every layer.

    Returns:
        By layer name, in running order, what was found.

    Raises:
        LayerError: if a layer cannot be solved, or was reached by no batch.
    """
    started = time.perf_counter()
    observer(StageStarted("calibrate", len(models.layers)))
    repeated = tuple(item for item in models.layers if item.layer.calls > 1)
    if flavour is Flavour.PARALLEL:
        found = _pass(models, models.layers, data, method, flavour, observer)
    else:
        found = _pass(models, repeated, data, method, Flavour.PARALLEL, observer) if repeated else {}
        assign_(models, {name: judged.solution for name, judged in found.items()})
        single = tuple(item for item in models.layers if item.layer.calls == 1)
        found |= _pass(models, single, data, method, flavour, observer) if single else {}
    assign_(models, {name: judged.solution for name, judged in found.items()})
    observer(StageFinished("calibrate", time.perf_counter() - started))
    return {item.layer.name: found[item.layer.name] for item in models.layers}


def _pass(
    models: Models, items: Sequence[CalibratedLayer], data: CalibrationSet, method: Method, flavour: Flavour, observer: Observer
) -> dict[str, Judged]:
    """Lockstep over all batches; layers are solved as soon as they are reached, those called several times when all forwards have ended."""
    by_name = {item.layer.name: item for item in items}
    forwards = [Forward(models.original, batch, {item.layer.name: item.original for item in items}) for batch in data.batches]
    sequential = flavour is Flavour.SEQUENTIAL
    if sequential:
        forwards += [Forward(models.quantized, batch, {item.layer.name: item.quantized for item in items}) for batch in data.batches]
    samples: dict[str, list[StopRows]] = defaultdict(list)
    found: dict[str, Judged] = {}

    def solve(name: str) -> None:
        started = time.perf_counter()
        problem = problem_of(by_name[name], samples.pop(name))
        with naming_layer(name, f"weight {by_name[name].layer.weight_shape}"):
            found[name] = solve_guarded(problem, method.solver, method.baseline, generator_for(data.seed, f"solve {name}"))
        if sequential:
            assign_(models, {name: found[name].solution})
        observer(LayerSolved("calibrate", name, found[name].error, found[name].baseline_error, time.perf_counter() - started))

    with Lockstep(forwards, list(by_name)) as lockstep:
        for stop in lockstep:
            if stop.layer in found:
                raise LayerError(stop.layer, "is called more often on a later batch than on the first; put such a batch first, or exclude")
            samples[stop.layer].append(sample_at(by_name[stop.layer], stop, data, method.sampling, sequential=sequential))
            if by_name[stop.layer].layer.calls == 1:
                solve(stop.layer)
    for name in list(samples):
        solve(name)
    for name in by_name:
        if name not in found:
            raise LayerError(name, "was reached by no calibration batch; exclude it or add samples that use it")
    return found
