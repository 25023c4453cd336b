"""What a run tells its observer. The library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStarted:
    """A stage of the pipeline begins.

    Args:
        stage: its name.
        total: number of steps it will report, 0 if it reports none.
        unit: what a step is, in the plural.
    """

    stage: str
    total: int = 0
    unit: str = "layers"


@dataclass(frozen=True)
class LayerSolved:
    """A layer has its codes.

    Args:
        stage: the stage's name.
        layer: qualified name.
        error: relative error on held-out rows.
        baseline_error: that of plain rounding.
        seconds: time for this layer.
    """

    stage: str
    layer: str
    error: float
    baseline_error: float
    seconds: float


@dataclass(frozen=True)
class StepDone:
    """A stage has done one of its steps.

    Args:
        stage: the stage's name.
    """

    stage: str


@dataclass(frozen=True)
class StageFinished:
    """A stage of the pipeline has ended.

    Args:
        stage: its name.
        seconds: how long it took.
    """

    stage: str
    seconds: float


@dataclass(frozen=True)
class Warned:
    """Something that the user should know and that does not stop the run.

    Args:
        message: what, and what to do about it.
    """

    message: str


Event = StageStarted | LayerSolved | StepDone | StageFinished | Warned
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer that looks away; the default.

    Args:
        event: what happened.
    """
