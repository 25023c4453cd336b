"""What a terminal shows: bars where it is one, lines where it is none."""

from __future__ import annotations

import io
import threading

from rich.console import Console
from rich.progress import Progress, TextColumn

from subbyte.run.events import Event, LayerSolved, StageFinished, StageStarted, StepDone, Warned
from subbyte.run.terminal import PlainLines, ProgressBars, progress

EVENTS: list[Event] = [
    StageStarted("calibrate", 2),
    LayerSolved("calibrate", "conv[1]", 0.00123, 0.0045, 0.26),
    Warned("too few samples for conv[1]"),
    LayerSolved("calibrate", "fc", 0.5, 0.75, 1.0),
    StageFinished("calibrate", 1.26),
    StageStarted("verify"),
    StageFinished("verify", 0.04),
]


class Terminal(io.StringIO):
    """Text that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_say_each_event_once() -> None:
    stream = io.StringIO()
    with progress(stream) as observer:
        assert isinstance(observer, PlainLines)
        for event in EVENTS:
            observer(event)
    assert stream.getvalue().splitlines() == [
        "calibrate: 2 layers",
        "calibrate 1/2 conv[1]: error 0.0012, rounding 0.0045, 0.3 s, 0 s left",
        "warning: too few samples for conv[1]",
        "calibrate 2/2 fc: error 0.5, rounding 0.75, 1.0 s, 0 s left",
        "calibrate: done in 1.3 s",
        "verify ...",
        "verify: done in 0.0 s",
    ]


def test_a_terminal_gets_bars_and_leaves_no_thread() -> None:
    before, stream = set(threading.enumerate()), Terminal()
    with progress(stream) as observer:
        assert isinstance(observer, ProgressBars)
        for event in EVENTS:
            observer(event)
    shown = stream.getvalue()
    assert "warning: too few samples for conv[1]" in shown
    assert "calibrate" in shown and "verify" in shown and "2/2" in shown
    for thread in set(threading.enumerate()) - before:  # rich tells its thread to stop, and does not wait for it
        thread.join(timeout=5)
    assert set(threading.enumerate()) == before


def test_bars_count_layers_and_name_the_last_one() -> None:
    bars = Progress(TextColumn("{task.description}"), console=Console(file=io.StringIO()), auto_refresh=False)
    observer = ProgressBars(bars)
    for event in EVENTS[:2]:
        observer(event)
    assert (bars.tasks[0].completed, bars.tasks[0].total, bars.tasks[0].finished) == (1, 2, False)
    assert bars.tasks[0].fields["layer"].startswith("conv[1]: error 0.0012")
    for event in EVENTS[2:]:
        observer(event)
    assert [(task.description, task.finished) for task in bars.tasks] == [("calibrate", True), ("verify", True)]


def test_steps_that_are_no_layers_count_too() -> None:
    events = [StageStarted("tuning", 40, "steps"), *[StepDone("tuning")] * 40, StageFinished("tuning", 2.0)]
    stream = io.StringIO()
    bars = Progress(TextColumn("{task.description}"), console=Console(file=io.StringIO()), auto_refresh=False)
    lines, shown = PlainLines(stream), ProgressBars(bars)
    for event in events[:21]:
        shown(event)
    assert (bars.tasks[0].completed, bars.tasks[0].total) == (20, 40)
    for event in events:
        lines(event)
    first, *written, last = stream.getvalue().splitlines()
    assert (first, last) == ("tuning: 40 steps", "tuning: done in 2.0 s")
    assert [line.split(",")[0] for line in written] == [f"tuning {count}/40" for count in range(4, 41, 4)]


def test_steps_of_a_stage_that_did_not_say_how_many_are_no_error() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    for event in (StageStarted("mine"), StepDone("mine"), StageFinished("mine", 0.5)):
        lines(event)
    assert stream.getvalue().splitlines() == ["mine ...", "mine: done in 0.5 s"]
