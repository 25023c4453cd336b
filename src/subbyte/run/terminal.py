"""What a terminal shows of a run: observers that write to stderr, so that stdout is free for the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from subbyte.run.events import Event, LayerSolved, Observer, StageFinished, StageStarted, StepDone, Warned

__all__ = ["PlainLines", "ProgressBars", "progress"]

STEP_LINES = 10  # of a stage whose steps are no layers, at most


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Observer]:
    """An observer for people: bars with the time left on a terminal, otherwise one line an event.

    Args:
        stream: where to write; None means stderr.

    Returns:
        A context manager that gives the observer; leaving it takes the bars off the terminal's care, also after Ctrl-C.

    Example:
        >>> with progress(sys.stdout) as observer:
        ...     observer(Warned("few samples"))
        warning: few samples
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield PlainLines(stream)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}", markup=False),
    )
    one_day = 24 * 3600.0  # the time left is judged by all layers so far, however long each took
    with Progress(*columns, console=Console(file=stream), speed_estimate_period=one_day) as bars:
        yield ProgressBars(bars)


class PlainLines:
    """One line for each event, of steps that are no layers for every tenth: for logs, and for terminals that are none.

    Args:
        stream: where to write.

    Example:
        >>> observer = PlainLines(sys.stdout)
        >>> observer(StageStarted("calibrate", 2))
        calibrate: 2 layers
        >>> observer(LayerSolved("calibrate", "conv1", 0.001, 0.002, 0.5))
        calibrate 1/2 conv1: error 0.001, rounding 0.002, 0.5 s, ... s left
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = 0.0
        self._total = 0
        self._done = 0

    def __call__(self, event: Event) -> None:
        """Write a line.

        Args:
            event: what happened.
        """
        match event:
            case StageStarted(stage, total, unit):
                self._started, self._total, self._done = time.perf_counter(), total, 0
                self._write(f"{stage}: {total} {unit}" if total else f"{stage} ...")
            case LayerSolved(stage, layer, error, baseline_error, seconds):
                left = self._seconds_left()
                numbers = f"error {error:.2g}, rounding {baseline_error:.2g}, {seconds:.1f} s"
                self._write(f"{stage} {self._done}/{self._total} {layer}: {numbers}, {left:.0f} s left")
            case StepDone(stage):
                left = self._seconds_left()
                if self._total and self._done * STEP_LINES // self._total > (self._done - 1) * STEP_LINES // self._total:
                    self._write(f"{stage} {self._done}/{self._total}, {left:.0f} s left")
            case StageFinished(stage, seconds):
                self._write(f"{stage}: done in {seconds:.1f} s")
            case Warned(message):
                self._write(f"warning: {message}")

    def _seconds_left(self) -> float:
        """Counts a step."""
        self._done += 1
        return (time.perf_counter() - self._started) / self._done * max(0, self._total - self._done)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class ProgressBars:
    """One bar for each stage, with the layers done, the time left and the layer that was solved last; warnings stand above the bars.

    Args:
        bars: started by the caller; its columns may use the field ``layer``.

    Example:
        >>> bars = Progress(disable=True)
        >>> ProgressBars(bars)(StageStarted("calibrate", 2))
        >>> bars.tasks[0].description, bars.tasks[0].total
        ('calibrate', 2)
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Bring the bars up to date.

        Args:
            event: what happened.
        """
        match event:
            case StageStarted(stage, total):
                self._tasks[stage] = self._bars.add_task(stage, total=total or None, layer="")
            case LayerSolved(stage, layer, error, baseline_error):
                self._bars.update(self._tasks[stage], advance=1, layer=f"{layer}: error {error:.2g}, rounding {baseline_error:.2g}")
            case StepDone(stage):
                self._bars.update(self._tasks[stage], advance=1)
            case StageFinished(stage):
                task = self._tasks[stage]
                steps = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
                self._bars.update(task, total=steps, completed=steps, layer="")
            case Warned(message):
                self._bars.console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
