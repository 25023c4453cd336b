"""An exported file is run before it is called done: against the simulation on held-out samples, and against the float model for speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from subbyte.export.targets import Arrays, Run, Target
from subbyte.model.batches import Batch, call, sample_count, select_samples, tensors
from subbyte.model.padding import read_outputs

STEPS = 255  # an output step is this part of what an output spans
REPEATS = 30  # timed runs of each file, in turns
CONSTANT = "constant"
TURN = 10  # runs of one file before the other has its turn


@dataclass(frozen=True)
class Clock:
    """How files are timed.

    Args:
        threads: processor threads.
        batch_size: samples in one run.

    Example:
        >>> Clock(2).batch_size
        1
    """

    threads: int
    batch_size: int = 1


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
        kernels: int8 kernel of each layer, None where it runs in floating point; `CONSTANT` where the runtime computes it once, on loading.
        size_bytes: of the file.
        float_bytes: of the float model's file, exported the same way.
        milliseconds: median of a run with `batch_size` samples; NaN where the target's runtime is not here.
        float_milliseconds: that of the float model's file, timed in turns with it.
        clock: how they were timed.
        least_milliseconds: the shortest of these runs.
        least_float_milliseconds: likewise.
    """

    target: str
    samples: int
    checks: tuple[RuntimeCheck, ...]
    kernels: Mapping[str, str | None]
    size_bytes: int
    float_bytes: int
    milliseconds: float
    float_milliseconds: float
    clock: Clock
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
        lines.append(f"{self.timing} ({self.speed:.2f} times as fast, {self.clock.threads} threads)")
        return "\n".join(lines)

    @property
    def timing(self) -> str:
        """Both times in words."""
        what = "a sample" if self.clock.batch_size == 1 else f"for {self.clock.batch_size} samples"
        return f"{self.milliseconds:.3f} ms {what}, float {self.float_milliseconds:.3f} ms"


def verify(
    contents: tuple[bytes, bytes],
    kernels: Mapping[str, str | None],
    simulation: nn.Module,
    batches: Sequence[Batch],
    target: Target,
    clock: Clock,
) -> Verification:
    """Run a file, and the float model's file, in the target's runtime.

    Args:
        contents: of the file, and of the float model's.
        kernels: by layer name.
        simulation: the PyTorch model with the same quantisers.
        batches: samples that nothing was fitted on.
        target: where to run.
        clock: how files are timed.

    Raises:
        OptionError: if the runtime is not installed.
        FileError: if the runtime refuses a file.
    """
    from subbyte.export.runtimes import input_names  # needs packages that `import subbyte` does not

    expected, names = expected_outputs(simulation, batches), input_names(contents[0])
    checks = []
    for optimized in (False, True) if target.timed else (False,):
        run = target.open(contents[0], optimized=optimized, threads=clock.threads)
        checks.append(compared(optimized, batches, expected, [run(as_arrays(batch, names)) for batch in batches]))
    some = select_samples(batches[0], torch.arange(clock.batch_size) % sample_count(batches[0]))
    times = [[math.nan], [math.nan]]
    if target.timed:
        runs = [target.open(content, optimized=True, threads=clock.threads) for content in contents]
        times = in_turns(runs, as_arrays(some, names), REPEATS)
    medians = [1000.0 * statistics.median(seconds) for seconds in times]
    least = [1000.0 * min(seconds) for seconds in times]
    samples = sum(sample_count(batch) for batch in batches)
    sizes = len(contents[0]), len(contents[1])
    return Verification(target.name, samples, tuple(checks), kernels, *sizes, medians[0], medians[1], clock, least[0], least[1])


def expected_outputs(simulation: nn.Module, batches: Sequence[Batch]) -> list[Arrays]:
    """What the simulation returns for each batch.

    Args:
        simulation: a PyTorch model.
        batches: what to call it with.
    """
    with torch.no_grad():
        return [[tensor.cpu().numpy() for tensor in tensors(call(simulation, batch))] for batch in batches]


def as_arrays(batch: Batch, names: Sequence[str] = ()) -> Arrays:
    """A batch as the inputs of a file.

    Args:
        batch: what the model takes; a mapping whose keys are the file's inputs is put into their order, anything else is in order.
        names: of the file's inputs.

    Example:
        >>> [int(array[0]) for array in as_arrays({"b": torch.tensor([1]), "a": torch.tensor([2])}, ("a", "b"))]
        [2, 1]
    """
    if isinstance(batch, Mapping) and set(names) <= set(batch):
        batch = [batch[name] for name in names] or batch
    return [tensor.cpu().numpy() for tensor in tensors(batch)]


def compared(
    optimized: bool,  # noqa: FBT001 - is part of the result
    batches: Sequence[Batch],
    expected: Sequence[Arrays],
    given: Sequence[Arrays],
) -> RuntimeCheck:
    """Put two models' outputs side by side, without padding.

    Args:
        optimized: whether the runtime had rewritten the graph.
        batches: that both were called with.
        expected: the simulation's outputs, for each batch.
        given: the runtime's.
    """
    same = total = 0
    largest = 0.0
    for index in range(len(expected[0])):
        references = [part for outputs, batch in zip(expected, batches, strict=True) for part in _real(outputs[index], batch)]
        found = [part for outputs, batch in zip(given, batches, strict=True) for part in _real(outputs[index], batch)]
        pairs = [pair for pair in zip(references, found, strict=True) if pair[0].numel()]
        if not pairs:
            continue
        span = float(max(part.max() for part, _ in pairs) - min(part.min() for part, _ in pairs)) or 1.0
        differences = [float((other.double() - part.double()).abs().max()) for part, other in pairs]
        largest = max(largest, max(differences) / span * STEPS) if math.isfinite(sum(differences)) else math.inf
        for part, other in pairs:
            if part.dim() > 1 and part.shape[-1] > 1:
                equal = part.argmax(-1) == other.argmax(-1)
                same, total = same + int(equal.sum()), total + equal.numel()
    return RuntimeCheck(optimized, 100.0 * same / total if total else None, largest)


def _real(output: npt.NDArray[Any], batch: Batch) -> list[Tensor]:
    return read_outputs(torch.from_numpy(output), batch)


def in_turns(runs: Sequence[Run], inputs: Arrays, repeats: int) -> list[list[float]]:
    """Seconds of every run of several functions, run in turns so that what else the machine does falls on all of them.

    A turn is several runs: the threads of the runtime that ran before wait busily for a while, and take a processor from the first of them.

    Args:
        runs: to be timed.
        inputs: what each is called with.
        repeats: how often.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(inputs)
    for at in range(0, repeats, TURN):
        for run, seconds in zip(runs, times, strict=True):
            for _ in range(min(TURN, repeats - at)):
                started = time.perf_counter()
                run(inputs)
                seconds.append(time.perf_counter() - started)
    return times
