"""An exported file is run before it is called done: against the simulation on held-out samples, and against the float model for speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from subbyte.export.targets import Arrays, Run, Target
from subbyte.model.batches import Batch, call, map_tensors, sample_count, tensors

STEPS = 255  # an output step is this part of what an output spans
REPEATS = 30  # timed runs of each file, in turns


@dataclass(frozen=True)
class RuntimeCheck:
    """The runtime's outputs beside the simulation's.

    Args:
        optimized: whether the runtime had rewritten the graph.
        agreement: percent of positions whose largest output is the same one; None where no output has classes along its last dimension.
        largest_steps: largest difference, in 255ths of what the output spans over the samples.
    """

    optimized: bool
    agreement: float | None
    largest_steps: float


@dataclass(frozen=True)
class Verification:
    """What was found about a file.

    Args:
        target: name of the target.
        samples: that were compared.
        checks: without and with the runtime's optimizations; of a reference, without.
        kernels: int8 kernel of each layer, None where it runs in floating point.
        size_bytes: of the file.
        float_bytes: of the float model's file, exported the same way.
        milliseconds: median for one sample; NaN where the target's runtime is not here.
        float_milliseconds: that of the float model's file, timed in turns with it.
        threads: processor threads of the timing.
        least_milliseconds: the shortest, for one sample.
        least_float_milliseconds: that of the float model's file.
    """

    target: str
    samples: int
    checks: tuple[RuntimeCheck, ...]
    kernels: Mapping[str, str | None]
    size_bytes: int
    float_bytes: int
    milliseconds: float
    float_milliseconds: float
    threads: int
    least_milliseconds: float
    least_float_milliseconds: float

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers that run in floating point."""
        return tuple(layer for layer, kernel in self.kernels.items() if kernel is None)

    @property
    def speed(self) -> float:
        """How many times faster than the float model."""
        return self.float_milliseconds / self.milliseconds

    def __str__(self) -> str:
        """The figures in lines."""
        lines = [f"{self.target}: {self.size_bytes:,} bytes, float {self.float_bytes:,} ({self.float_bytes / self.size_bytes:.2f} times)"]
        lines.append(f"int8 kernels: {len(self.kernels) - len(self.float_layers)} of {len(self.kernels)} layers")
        if self.float_layers:
            lines.append(f"in floating point: {', '.join(self.float_layers)}")
        for check in self.checks:
            agreement = "" if check.agreement is None else f"agreement with the simulation {check.agreement:.2f} %, "
            how = "optimized" if check.optimized else "not optimized"
            lines.append(f"{how}: {agreement}largest difference {check.largest_steps:.2f} output steps ({self.samples} samples)")
        if math.isnan(self.milliseconds):
            return "\n".join([*lines, f"not timed, and run in a reference only: there is no {self.target} here"])
        timing = f"{self.milliseconds:.3f} ms a sample, float {self.float_milliseconds:.3f} ms"
        lines.append(f"{timing} ({self.speed:.2f} times faster, {self.threads} threads)")
        return "\n".join(lines)


def verify(
    contents: tuple[bytes, bytes],
    kernels: Mapping[str, str | None],
    simulation: nn.Module,
    batches: Sequence[Batch],
    target: Target,
    threads: int,
) -> Verification:
    """Run a file, and the float model's file, in the target's runtime.

    Args:
        contents: of the file, and of the float model's.
        kernels: by layer name.
        simulation: the PyTorch model with the same quantisers.
        batches: samples that nothing was fitted on.
        target: where to run.
        threads: of the runs that are timed.

    Raises:
        OptionError: if the runtime is not installed.
        FileError: if the runtime refuses a file.
    """
    expected = expected_outputs(simulation, batches)
    checks = []
    for optimized in (False, True) if target.timed else (False,):
        run = target.open(contents[0], optimized=optimized, threads=threads)
        checks.append(compared(optimized, expected, [run(as_arrays(batch)) for batch in batches]))
    one = as_arrays(map_tensors(batches[0], lambda x: x[:1] if x.dim() and x.shape[0] == sample_count(batches[0]) else x))
    times = [[math.nan], [math.nan]]
    if target.timed:
        times = in_turns([target.open(content, optimized=True, threads=threads) for content in contents], one, REPEATS)
    medians = [1000.0 * statistics.median(seconds) for seconds in times]
    least = [1000.0 * min(seconds) for seconds in times]
    samples = sum(sample_count(batch) for batch in batches)
    sizes = len(contents[0]), len(contents[1])
    return Verification(target.name, samples, tuple(checks), kernels, *sizes, medians[0], medians[1], threads, least[0], least[1])


def expected_outputs(simulation: nn.Module, batches: Sequence[Batch]) -> list[Arrays]:
    """What the simulation returns for each batch.

    Args:
        simulation: a PyTorch model.
        batches: what to call it with.
    """
    with torch.no_grad():
        return [[tensor.cpu().numpy() for tensor in tensors(call(simulation, batch))] for batch in batches]


def as_arrays(batch: Batch) -> Arrays:
    """A batch as the inputs of a file.

    Args:
        batch: what the model takes.
    """
    return [tensor.cpu().numpy() for tensor in tensors(batch)]


def compared(optimized: bool, expected: Sequence[Arrays], given: Sequence[Arrays]) -> RuntimeCheck:  # noqa: FBT001 - is part of the result
    """Put two models' outputs side by side.

    Args:
        optimized: whether the runtime had rewritten the graph.
        expected: the simulation's, for each batch.
        given: the runtime's.
    """
    same = total = 0
    largest = 0.0
    for index in range(len(expected[0])):
        reference = np.concatenate([outputs[index] for outputs in expected])
        found = np.concatenate([outputs[index] for outputs in given])
        if reference.dtype != np.float32:
            continue
        span = float(reference.max() - reference.min()) or 1.0
        difference = np.abs(found.astype(np.float64) - reference)
        largest = max(largest, float(difference.max()) / span * STEPS) if np.isfinite(difference).all() else float("inf")
        if reference.ndim > 1 and reference.shape[-1] > 1:
            same += int((reference.argmax(-1) == found.argmax(-1)).sum())
            total += reference[..., 0].size
    return RuntimeCheck(optimized, 100.0 * same / total if total else None, largest)


def interleaved(runs: Sequence[Run], inputs: Arrays, repeats: int) -> list[float]:
    """Median milliseconds of several functions, run in turns.

    Args:
        runs: to be timed.
        inputs: what each is called with.
        repeats: how often.
    """
    return [1000.0 * statistics.median(seconds) for seconds in in_turns(runs, inputs, repeats)]


def in_turns(runs: Sequence[Run], inputs: Arrays, repeats: int) -> list[list[float]]:
    """Seconds of every run of several functions, run in turns so that what else the machine does falls on all of them.

    Args:
        runs: to be timed.
        inputs: what each is called with.
        repeats: how often.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(inputs)
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(inputs)
            seconds.append(time.perf_counter() - started)
    return times
