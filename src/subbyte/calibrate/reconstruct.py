"""Every layer at every option, in one parallel-flavour pass: rows are sampled once for a layer and serve all of its options."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from subbyte.calibrate.gather import CalibrationSet, StopRows, problem_of, sample_at
from subbyte.calibrate.guard import Judged, solve_guarded
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.models import CalibratedLayer, Models, at_option
from subbyte.calibrate.passes import Method
from subbyte.calibrate.problem import LayerProblem
from subbyte.calibrate.rows import generator_for
from subbyte.calibrate.shared import owner_of, solve_shared
from subbyte.calibrate.table import solve_table
from subbyte.errors import LayerError, naming_layer
from subbyte.model.lockstep import Forward, Lockstep
from subbyte.run.events import LayerSolved, Observer, StageFinished, StageStarted
from subbyte.widths import Option

STAGE = "reconstruct"
Solved = dict[str, dict[Option, Judged]]
"""What was found, by layer name and option."""


def reconstruct(
    models: Models, options: Mapping[str, Sequence[Option]], data: CalibrationSet, method: Method, kept: Kept, observer: Observer
) -> Solved:
    """Solve every layer at each of its options on the float model's inputs. Memory holds the rows of one layer, and codes of all.

    Args:
        models: the float model and its layers; is not changed.
        options: `(weight bits, activation bits or None)` of each layer, by name.
        data: calibration set.
        method: how to solve.
        kept: what is in it is not solved again; the rest is put into it, layer by layer.
        observer: is told of every layer.

    Raises:
        LayerError: if a layer cannot be solved, or was reached by no batch.
    """
    started = time.perf_counter()
    found: Solved = {}
    missing = []
    for item in models.layers:
        known = {option: kept.recall(at_option(item, option)) for option in options[item.layer.name]}
        found[item.layer.name] = {option: judged for option, judged in known.items() if judged is not None}
        if len(found[item.layer.name]) < len(known):
            missing.append(item)
    observer(StageStarted(STAGE, len(missing)))
    for item, samples in _reached(models, missing, data, method) if missing else ():
        began, name = time.perf_counter(), item.layer.name
        wanted = [option for option in options[name] if option not in found[name]]
        with naming_layer(name, f"weight {item.layer.weight_shape}"):
            owner = owner_of(name, item.layer.shares, found) if item.layer.shares else {}
            found[name] |= _Solving(method, kept, data.seed, owner).all(item, wanted, samples)
        worst = max(found[name].values(), key=lambda judged: judged.error)
        observer(LayerSolved(STAGE, name, worst.error, worst.baseline_error, time.perf_counter() - began))
    observer(StageFinished(STAGE, time.perf_counter() - started))
    return {name: {option: solved[option] for option in options[name]} for name, solved in found.items()}


def _reached(models: Models, items: Sequence[CalibratedLayer], data: CalibrationSet, method: Method):  # type: ignore[no-untyped-def]
    """Layers with the rows of all their calls, in running order; those called several times when all forwards have ended."""
    by_name = {item.layer.name: item for item in items}
    forwards = [Forward(models.original, batch, {name: item.original for name, item in by_name.items()}) for batch in data.batches]
    samples: dict[str, list[StopRows]] = defaultdict(list)
    done = set()
    with Lockstep(forwards, list(by_name)) as lockstep:
        for stop in lockstep:
            item = by_name[stop.layer]
            if stop.layer in done and not item.layer.operator.multiplies:
                continue
            if stop.layer in done:
                raise LayerError(stop.layer, "is called more often on a later batch than on the first; put such a batch first, or exclude")
            if item.layer.operator.multiplies:
                samples[stop.layer].append(sample_at(item, stop, data, method.sampling, sequential=False))
            if item.layer.calls == 1 or not item.layer.operator.multiplies:
                done.add(stop.layer)
                yield item, samples.pop(stop.layer, [])
    for name in list(samples):
        done.add(name)
        yield by_name[name], samples.pop(name)
    for name in by_name:
        if name not in done:
            raise LayerError(name, "was reached by no calibration batch; exclude it or add samples that use it")


@dataclass(frozen=True, eq=False)
class _Solving:
    """How a layer is solved at its options; `owner`: what was found at each option for the layer that gives it its codes."""

    method: Method
    kept: Kept
    seed: int
    owner: Mapping[Option, Judged]

    def all(self, item: CalibratedLayer, wanted: Sequence[Option], samples: list[StopRows]) -> dict[Option, Judged]:
        """The solutions at some options."""
        problem = problem_of(item, samples) if item.layer.operator.multiplies else None
        samples.clear()
        found = {}
        for option in sorted(wanted, key=lambda option: option[1] or 0):  # one grid of the input after the other: what they share is kept
            here = at_option(item, option)
            found[option] = self._one(here, problem, self.owner.get(option))
            self.kept.keep(here, found[option])
        return found

    def _one(self, item: CalibratedLayer, problem: LayerProblem | None, owner: Judged | None) -> Judged:
        if problem is None:
            return owner or solve_table(item, refine=self.method.solver != self.method.baseline)
        posed = replace(problem, weight_grid=item.weight_grid, activation_grid=item.activation_grid)
        if owner is not None:
            return solve_shared(posed, owner)
        return solve_guarded(posed, self.method.solver, self.method.baseline, generator_for(self.seed, f"solve {item.layer.name}"))
