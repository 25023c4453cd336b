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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from subbyte.calibrate.guard import Judged, solve_guarded
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver
from subbyte.calibrate.rows import RowSampling, draw_rows, gather_rows, generator_for, split_rows
from subbyte.errors import LayerError, naming_layer
from subbyte.model.batches import Batch, describe
from subbyte.model.layers import Layer
from subbyte.model.lockstep import Forward, Lockstep, Stop
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.replace import copy_of, replace_module_
from subbyte.quantizers.grid import Grid
from subbyte.run.events import LayerSolved, Observer, StageFinished, StageStarted


class Flavour(Enum):
    """What a layer's input is during calibration.

    Example:
        >>> Flavour("parallel")
        <Flavour.PARALLEL: 'parallel'>
    """

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


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


@dataclass(frozen=True, eq=False)
class CalibratedLayer:
    """A layer, the modules that stand for it, and its grids.

    Args:
        layer: what it is.
        original: the float module, batch norm folded.
        quantized: the module that takes the codes, in the quantized model.
        weight_grid: grid of its weights.
        activation_grid: grid of its input, or None.
    """

    layer: Layer
    original: nn.Module
    quantized: QuantizedLayer
    weight_grid: Grid
    activation_grid: Grid | None


@dataclass(frozen=True, eq=False)
class Models:
    """The float model, and its copy in which every layer is a `QuantizedLayer`.

    Args:
        original: with batch norms folded.
        quantized: the copy, whose layers get their codes.
        layers: in running order.
    """

    original: nn.Module
    quantized: nn.Module
    layers: tuple[CalibratedLayer, ...]


def prepare(original: nn.Module, layers: Sequence[Layer], options: Mapping[str, tuple[int, int | None]], *, symmetric: bool) -> Models:
    """A float model beside a copy of it in which every layer is a `QuantizedLayer`, still without codes.

    Args:
        original: float model, batch norms folded; is not changed.
        layers: what will be quantized, in running order.
        options: `(weight bits, activation bits or None)` by layer name.
        symmetric: whether weight grids are symmetric.
    """
    quantized = copy_of(original)
    items = []
    for layer in layers:
        old = quantized.get_submodule(layer.name)
        new = QuantizedLayer(old, layer.operator)
        replace_module_(quantized, old, new)
        weight_bits, activation_bits = options[layer.name]
        activation_grid = None if activation_bits is None else Grid(activation_bits)
        weight_grid = Grid(weight_bits, symmetric=symmetric)
        items.append(CalibratedLayer(layer, original.get_submodule(layer.name), new, weight_grid, activation_grid))
    return Models(original, quantized, tuple(items))


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


def assign_(models: Models, solutions: Mapping[str, LayerSolution]) -> None:
    """Give layers of the quantized model their codes.

    Args:
        models: `models.quantized` is changed in place.
        solutions: by layer name; layers that are not named keep what they have.
    """
    for item in models.layers:
        if item.layer.name in solutions:
            item.quantized.assign_(state_of(item, solutions[item.layer.name]))


def state_of(item: CalibratedLayer, solution: LayerSolution) -> QuantizedState:
    """A solution in the shapes of the layer.

    Args:
        item: the layer.
        solution: of its problem; tensors as its docstring says.
    """
    activation = None
    if item.activation_grid is not None and solution.activation is not None:
        activation = (*solution.activation, item.activation_grid)
    return QuantizedState(
        codes=item.layer.operator.from_matrix(solution.codes),
        scale=solution.scale.flatten(),
        zero_point=solution.zero_point.flatten(),
        bias=solution.bias.flatten(),
        weight_grid=item.weight_grid,
        activation=activation,
    )


@dataclass(frozen=True, eq=False)
class _Sample:
    """Rows of one stop: inputs (G, R, n), targets (G, R, O), held-out mask (R,), how many rows there would have been, and whether the float
    model feeds the same in all of them."""

    inputs: Tensor
    targets: Tensor
    held_out: Tensor
    equations: int
    constant: bool


def _pass(
    models: Models, items: Sequence[CalibratedLayer], data: CalibrationSet, method: Method, flavour: Flavour, observer: Observer
) -> dict[str, Judged]:
    """Lockstep over all batches; layers are solved as soon as all their calls have been seen."""
    by_name = {item.layer.name: item for item in items}
    forwards = [Forward(models.original, batch, {item.layer.name: item.original for item in items}) for batch in data.batches]
    if flavour is Flavour.SEQUENTIAL:
        forwards += [Forward(models.quantized, batch, {item.layer.name: item.quantized for item in items}) for batch in data.batches]
    samples: dict[str, list[_Sample]] = defaultdict(list)
    found: dict[str, Judged] = {}

    def solve(name: str) -> None:
        started = time.perf_counter()
        problem = _problem(by_name[name], samples.pop(name))
        with naming_layer(name, f"weight {by_name[name].layer.weight_shape}"):
            found[name] = solve_guarded(problem, method.solver, method.baseline, generator_for(data.seed, f"solve {name}"))
        assign_(models, {name: found[name].solution} if flavour is Flavour.SEQUENTIAL else {})
        observer(LayerSolved("calibrate", name, found[name].error, found[name].baseline_error, time.perf_counter() - started))

    with Lockstep(forwards, list(by_name)) as lockstep:
        for stop in lockstep:
            if stop.layer in found:
                raise LayerError(stop.layer, "is called more often on later batches than on the first; use Flavour.PARALLEL")
            samples[stop.layer].append(_sample(by_name[stop.layer], stop, data, method.sampling, flavour))
            if len(samples[stop.layer]) == by_name[stop.layer].layer.calls:
                solve(stop.layer)
    for name in list(samples):
        solve(name)
    for name in by_name:
        if name not in found:
            raise LayerError(name, "was reached by no calibration batch; exclude it or add samples that use it")
    return found


def _sample(item: CalibratedLayer, stop: Stop, data: CalibrationSet, sampling: RowSampling, flavour: Flavour) -> _Sample:
    """Gather rows from every forward that waits at the layer."""
    layer, operator, count = item.layer, item.layer.operator, len(data.batches)
    here = [index for index in range(count) if index in stop.runs]
    if flavour is Flavour.SEQUENTIAL:
        unpaired = [index for index in here if index + count not in stop.runs]
        if unpaired or 2 * len(here) != len(stop.runs):
            raise LayerError(layer.name, "is reached by other samples in the quantized model than in the float one; use Flavour.PARALLEL")
    weight = operator.to_matrix(_float_weight(item))
    bias = _float_bias(item, weight)
    counts = [operator.count(stop.input(index)) for index in here]
    wanted = -(-sampling.wanted(weight.shape[0], weight.shape[2]) // layer.calls)
    rows = draw_rows(counts, [data.held_out[index] for index in here], wanted, generator_for(data.seed, f"rows {layer.name}"))
    gathered = [gather_rows(operator, stop.input(index), row) for index, row in zip(here, rows, strict=True)]
    for index, part in zip(here, gathered, strict=True):
        if (part.shape[0], part.shape[2]) != (weight.shape[0], weight.shape[2]):
            batch, x = describe(data.batches[index]), describe(stop.input(index))
            raise LayerError(layer.name, f"receives {x} from batch {batch}, which does not fit its weight {layer.weight_shape}")
    inputs = torch.cat(gathered, dim=1)
    constant = inputs.shape[1] > 1 and bool((inputs == inputs[:, :1]).all())
    targets = torch.baddbmm(bias[:, None, :], inputs, weight.mT)
    if flavour is Flavour.SEQUENTIAL:
        for index in here:
            if stop.input(index).shape != stop.input(index + count).shape:
                shapes = f"{describe(stop.input(index))} in the float model, {describe(stop.input(index + count))} in the quantized one"
                raise LayerError(layer.name, f"receives {shapes}; use Flavour.PARALLEL")
        inputs = torch.cat([gather_rows(operator, stop.input(index + count), row) for index, row in zip(here, rows, strict=True)], dim=1)
    held_out = torch.cat([row.held_out for row in rows])
    return _Sample(inputs, targets, held_out, sum(samples * positions for samples, positions in counts), constant)


def _problem(item: CalibratedLayer, samples: Sequence[_Sample]) -> LayerProblem:
    if all(sample.constant for sample in samples):
        raise LayerError(
            item.layer.name,
            f"receives the same input in all {samples[0].inputs.shape[1]} sampled rows, so nothing can be calibrated; check the "
            "calibration data and its preprocessing, or exclude the layer",
        )
    inputs, targets = torch.cat([s.inputs for s in samples], dim=1), torch.cat([s.targets for s in samples], dim=1)
    fit, held_out = split_rows(inputs, targets, torch.cat([s.held_out for s in samples]))
    weight = item.layer.operator.to_matrix(_float_weight(item))
    return LayerProblem(
        name=item.layer.name,
        weight=weight,
        bias=_float_bias(item, weight),
        fit=fit,
        held_out=held_out,
        weight_grid=item.weight_grid,
        activation_grid=item.activation_grid,
        equations=sum(s.equations for s in samples),
    )


def _float_weight(item: CalibratedLayer) -> Tensor:
    weight = item.original.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _float_bias(item: CalibratedLayer, weight: Tensor) -> Tensor:
    """The layer's bias as (G, O); zeros where it has none."""
    bias = item.original.bias
    return bias.detach().view(weight.shape[:2]) if isinstance(bias, Tensor) else weight.new_zeros(weight.shape[:2])
