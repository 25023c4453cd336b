"""How long each layer takes at each of its options, measured on this machine in the target's runtime.

Every layer is run alone, in the form in which the exporter writes it (`layer_files`), with the number of samples and threads that are asked
for. All forms of one layer run in turns, so that what else the machine does falls on all of them, and with them a file that does nothing:
what it takes, the call into the runtime, is subtracted. Times are kept in the bank by geometry, option, target, threads, runtime and
processor: layers that are alike are measured once.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from subbyte.calibrate.models import group_of
from subbyte.choices import Choices
from subbyte.errors import LayerError, OptionError
from subbyte.export.packed import LIBRARY_VERSION
from subbyte.export.targets import OnnxRuntimeCPU, Target, runs_in_groups
from subbyte.model.batches import Batch, as_batches, sample_count, select_samples
from subbyte.model.layers import Layer, check_model, survey
from subbyte.quantizers.grid import WeightGrids
from subbyte.run.bank import Bank, Entry, digest
from subbyte.run.events import Observer, StageFinished, StageStarted, StepDone, ignore
from subbyte.widths import Option, for_tables

if TYPE_CHECKING:
    from subbyte.export.layer_files import Geometry, LayerFile

STAGE = "profile"
LEAST_RUNS, MOST_RUNS, ENOUGH_SECONDS = 12, 60, 1.5  # of each form; seconds for all forms of a layer together
FLOAT: Option = (32, None)  # stands for float32 in the bank
NOTHING: Option = (0, None)  # stands for the file that does nothing, while files are timed


@dataclass(frozen=True)
class Timing:
    """How layers are timed.

    Args:
        target: in whose runtime.
        threads: processor threads; None takes those of torch.
        batch_size: samples in one forward.
        weights: what grids of weights have beside their bits.

    Raises:
        OptionError: if a number is below 1, or the target's runtime cannot be run here.

    Example:
        >>> Timing(threads=2).batch_size
        1
    """

    target: Target = OnnxRuntimeCPU()
    threads: int | None = None
    batch_size: int = 1
    weights: WeightGrids = WeightGrids()

    def __post_init__(self) -> None:
        if (self.threads is not None and self.threads < 1) or self.batch_size < 1:
            raise OptionError(f"threads and batch_size are at least 1, not {self.threads} and {self.batch_size}")
        if not self.target.timed:
            raise OptionError(f"{self.target.name} cannot be run here, so that nothing can be timed in it; give a table of seconds")


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer's forward, over repeated runs.

    Args:
        least: the shortest.
        median: of all.
    """

    least: float
    median: float


NO_TIME = LayerTime(0.0, 0.0)  # of a table: looking a few rows up


@dataclass(frozen=True, eq=False)
class Profile:
    """Times of every layer of a model, all its calls in one forward together. Tables that rows are looked up in count nothing.

    Args:
        timing: how they were measured.
        threads: that ran.
        runtime: and its version.
        floats: by layer name, in float32.
        times: by layer name and option.

    Example:
        >>> times = {"fc": {(4, 8): LayerTime(1.0, 1.5), (8, 8): LayerTime(2.0, 2.0)}}
        >>> timed = Profile(Timing(), 1, "none", {"fc": LayerTime(4.0, 4.5)}, times)
        >>> timed.seconds, timed.total({"fc": (4, 8)})
        ({'fc': {(4, 8): 1.0, (8, 8): 2.0}}, 1.0)
    """

    timing: Timing
    threads: int
    runtime: str
    floats: Mapping[str, LayerTime]
    times: Mapping[str, Mapping[Option, LayerTime]]

    @property
    def seconds(self) -> dict[str, dict[Option, float]]:
        """The shortest times by layer name and option: what a budget takes."""
        return {name: {option: found.least for option, found in row.items()} for name, row in self.times.items()}

    def total(self, options: Mapping[str, Option]) -> float:
        """Seconds of all layers: the sum of their shortest times, as a budget counts them.

        Args:
            options: of the layers, by name.

        Raises:
            OptionError: if a layer was not measured at its option.
        """
        missing = [f"'{name}' at {option}" for name, option in options.items() if option not in self.times.get(name, {})]
        if missing:
            raise OptionError(f"not measured: {', '.join(missing)}")
        return sum(self.times[name][option].least for name, option in options.items())


def profile(
    model: nn.Module,
    data: Tensor | Iterable[Batch],
    timing: Timing = Timing(),  # noqa: B008 - a frozen value
    *,
    choices: Choices = Choices(),  # noqa: B008 - a frozen value
    bank: Bank | None = None,
    observer: Observer = ignore,
) -> Profile:
    """Measure each layer of a model at each option that the target runs.

    Args:
        model: float32 model in evaluation mode; is not changed.
        data: samples (samples, ...), or batches of them, see `quantize`; what the layers' inputs are shaped like.
        timing: how, and in which runtime.
        choices: options of every layer, of which those count that the target runs.
        bank: where times are kept; None keeps them in memory.
        observer: is told what happens.

    Raises:
        OptionError: if the runtime is not installed, or runs none of a layer's options.
        ModelError: if the model or one of its layers cannot be run.

    Example:
        >>> float_model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> timed = profile(float_model, torch.randn(4, 8), Timing(threads=1), choices=Choices((4, 8)))
        >>> {name: list(row) for name, row in timed.seconds.items()}
        {'0': [(4, 8), (8, 8)], '2': [(4, 8), (8, 8)]}
    """
    check_model(model)
    batches = as_batches(data)
    found = survey(model, batches, choices.include, choices.exclude)[0]
    names = [layer.name for layer in found.layers]
    tables = {layer.name for layer in found.layers if not layer.operator.multiplies} - found.shared  # these have their partner's options
    options = for_tables(choices.within(timing.target.options(), timing.target.name).of(names), tables)
    layers = layers_at(model, batches, timing.batch_size, names)
    return measure_layers(layers, options, timing, Bank() if bank is None else bank, observer)


def layers_at(model: nn.Module, batches: Sequence[Batch], batch_size: int, names: Sequence[str]) -> tuple[Layer, ...]:
    """Layers as they are found with so many samples: their inputs have the shapes that are to be timed.

    Args:
        model: float model in evaluation mode; is not changed.
        batches: see `model.batches.as_batches`.
        batch_size: samples in one forward.
        names: of the layers.

    Raises:
        ModelError: if the model cannot be run with so many samples.
        LayerError: if it does not call a layer then.
    """
    found, _ = survey(model, [_cut(batch, batch_size) for batch in batches])
    layers = {layer.name: layer for layer in found.layers}
    for name in names:
        if name not in layers:
            raise LayerError(name, f"is not called in a forward with {batch_size} samples, so it cannot be timed; exclude it")
    return tuple(layers[name] for name in names)


def measure_layers(
    layers: Sequence[Layer],
    options: Mapping[str, Sequence[Option]],
    timing: Timing,
    bank: Bank,
    observer: Observer = ignore,
) -> Profile:
    """Measure layers at their options, unless the bank knows.

    Args:
        layers: found with `timing.batch_size` samples.
        options: `(weight bits, activation bits or None)` of each layer, by name.
        timing: how, and in which runtime.
        bank: where times are kept.
        observer: is told what happens.

    Raises:
        OptionError: if the packages for ONNX, or the runtime, are not installed.
        ModelError: if a layer cannot be translated.
    """
    try:
        from subbyte.export.layer_files import Geometry
    except ImportError as error:
        raise OptionError(f"measuring layers needs packages that are not installed ({error}); pip install 'subbyte[onnx]'") from error
    bench = _Bench(timing, timing.threads or torch.get_num_threads(), timing.target.version(), bank)
    started = time.perf_counter()
    observer(StageStarted(STAGE, len(layers)))
    floats: dict[str, LayerTime] = {}
    times: dict[str, dict[Option, LayerTime]] = {}
    for layer in layers:
        observer(StepDone(STAGE))
        if not layer.operator.multiplies:
            floats[layer.name], times[layer.name] = NO_TIME, dict.fromkeys(options[layer.name], NO_TIME)
            continue
        grids = _grids(layer, timing.weights, options[layer.name])
        geometry = Geometry(layer.operator, layer.weight_shape, layer.input_shape, layer.outputs, grids)
        found = bench.times(geometry, tuple(options[layer.name]))
        calls = layer.macs / _macs_of_a_call(layer)
        scaled = {option: LayerTime(one.least * calls, one.median * calls) for option, one in found.items()}
        floats[layer.name] = scaled.pop(FLOAT)
        times[layer.name] = scaled
    observer(StageFinished(STAGE, time.perf_counter() - started))
    return Profile(timing, bench.threads, bench.runtime, floats, times)


@dataclass(frozen=True, eq=False)
class _Bench:
    """Runs files and remembers how long they took."""

    timing: Timing
    threads: int
    runtime: str
    bank: Bank

    def times(self, geometry: Geometry, options: tuple[Option, ...]) -> dict[Option, LayerTime]:
        """Of a layer at its options and in float32, all measured together if one is missing."""
        keys = {option: self._key(geometry, option) for option in (FLOAT, *options)}
        known = {option: _time_of(self.bank.get(key)) for option, key in keys.items()}
        if any(one is None for one in known.values()):
            from subbyte.export.layer_files import float_file, quantized_files

            files = {FLOAT: float_file(geometry)} | dict(quantized_files(geometry, options, self.timing.target))
            known = dict(self._measured(files))
            for option, one in known.items():
                assert one is not None
                self.bank.put(keys[option], Entry(facts={"least": one.least, "median": one.median}))
        return {option: one for option, one in known.items() if one is not None}

    def _measured(self, files: Mapping[Option, LayerFile]) -> dict[Option, LayerTime]:
        """Seconds beyond those of a file that does nothing, which has its turn among the others, so that a busy moment is in both."""
        from subbyte.export.layer_files import empty_file

        target, timed = self.timing.target, [*files.items(), (NOTHING, empty_file())]
        runs = {option: (target.open(file.content, optimized=True, threads=self.threads), [file.example]) for option, file in timed}
        seconds: dict[Option, list[float]] = {option: [] for option in runs}
        for run, given in runs.values():
            run(given)
            run(given)
        begin = time.perf_counter()
        for index in range(MOST_RUNS):
            if index >= LEAST_RUNS and time.perf_counter() - begin > ENOUGH_SECONDS:
                break
            for option, (run, given) in runs.items():
                started = time.perf_counter()
                run(given)
                seconds[option].append(time.perf_counter() - started)
        nothing, tick = min(seconds.pop(NOTHING)), time.get_clock_info("perf_counter").resolution
        return {
            option: LayerTime(max(tick, min(found) - nothing), max(tick, statistics.median(found) - nothing))
            for option, found in seconds.items()
        }

    def _key(self, what: object, option: Option) -> str:
        processor = (platform.machine(), platform.processor(), os.cpu_count())
        return digest("latency", LIBRARY_VERSION, what, option, self.timing.target, self.threads, self.runtime, processor)


def _grids(layer: Layer, weights: WeightGrids, options: Iterable[Option]) -> WeightGrids:
    """Of a layer's weights, if they can be run at all options."""
    group = group_of(layer, weights.group)
    failing = [option for option in options if group is not None and not runs_in_groups(*option)]
    if failing:
        raise OptionError(
            f"layer '{layer.name}' cannot be timed at {failing[0]}: ONNX Runtime fails on weights with a step for every {group} inputs "
            "where the input is quantized, unless they have 4 bits; measure without groups"
        )
    return replace(weights, group=group)


def _macs_of_a_call(layer: Layer) -> int:
    """Of the first one, whose shape is timed; other calls count by their multiply-accumulates."""
    x, weight = (torch.empty(shape, device="meta") for shape in (layer.input_shape, layer.weight_shape))
    return layer.operator.macs(x, weight)


def _time_of(entry: Entry | None) -> LayerTime | None:
    return None if entry is None else LayerTime(float(entry.facts["least"]), float(entry.facts["median"]))


def _cut(batch: Batch, count: int) -> Batch:
    """A batch with so many samples: its first ones, repeated where it has fewer."""
    return select_samples(batch, torch.arange(count) % sample_count(batch))
