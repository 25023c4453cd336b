"""The frontier: the least predicted loss for every size, and where the returned model stands. Geometry only."""

from __future__ import annotations

from dataclasses import dataclass

from subbyte.report.layer_charts import LEFT, RIGHT, TOP, WIDTH
from subbyte.report.planned import Planned
from subbyte.report.scale import Scale, Tick, around, figure, over_decades, size

HEIGHT, BOTTOM = 330.0, 280.0
SAME_UNIT = {"kl": "KLDivergence", "relative_error": "RelativeSquaredError"}  # limits that may be in the unit of the vertical axis


@dataclass(frozen=True)
class Spot:
    """A point of the chart.

    Args:
        x: to the right.
        y: downwards.
        title: in words.
        label: short, beside it.
    """

    x: float
    y: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A limit.

    Args:
        place: x of a vertical line, y of a horizontal one.
        vertical: which of the two.
        text: in words.
    """

    place: float
    vertical: bool
    text: str


@dataclass(frozen=True)
class FrontierChart:
    """Bytes to the right, loss upwards, both logarithmic.

    Args:
        curve: by increasing size.
        predicted: of the chosen allocation.
        measured: of the returned model.
        rounds: that were assembled and measured, where there were several.
        limits: that can be drawn.
        horizontal: ticks.
        vertical: ticks.
    """

    curve: tuple[Spot, ...]
    predicted: Spot
    measured: Spot
    rounds: tuple[Spot, ...]
    limits: tuple[Line, ...]
    horizontal: tuple[Tick, ...]
    vertical: tuple[Tick, ...]


def frontier_chart(planned: Planned) -> FrontierChart:
    """Where the returned model stands on the frontier.

    Args:
        planned: how a budget was met.
    """
    drawn = [limit for limit in planned.limits if limit.name == "bytes" or SAME_UNIT.get(limit.name) == planned.loss_name]
    first, last = planned.frontier[0].size_bytes, planned.frontier[-1].size_bytes
    wide = [limit.limit for limit in drawn if limit.name == "bytes" and 0.8 * first <= limit.limit <= 1.2 * last]
    high = [limit.limit for limit in drawn if limit.name != "bytes"]
    x = around([planned.size_bytes, first, last, *(one.size_bytes for one in planned.rounds), *wide], LEFT, RIGHT)
    losses = [planned.predicted, planned.measured, *high]
    losses += [one.predicted for one in planned.frontier] + [one.predicted for one in planned.rounds]
    y = over_decades(losses, BOTTOM, TOP)
    lines = [Line(x.place(value), vertical=True, text=f"limit: {value:,.0f} bytes") for value in wide]
    lines += [Line(y.place(value), vertical=False, text=f"limit: {value:.4g}") for value in high]
    here = x.place(planned.size_bytes)
    return FrontierChart(
        curve=tuple(_spot(x, y, one.size_bytes, one.predicted, one.average_bits) for one in planned.frontier),
        predicted=Spot(here, y.place(planned.predicted), f"chosen: {planned.size_bytes:,} bytes, predicted {planned.predicted:.4g}"),
        measured=Spot(here, y.place(planned.measured), f"returned: {planned.size_bytes:,} bytes, measured {planned.measured:.4g}"),
        rounds=tuple(
            _spot(x, y, one.size_bytes, one.predicted, one.average_bits, f"{number}") for number, one in enumerate(planned.rounds, 1)
        )
        if len(planned.rounds) > 1
        else (),
        limits=tuple(lines),
        horizontal=tuple(Tick(x.place(value), size(value)) for value in x.ticks(9)),
        vertical=tuple(Tick(y.place(value), figure(value)) for value in y.ticks()),
    )


def _spot(x: Scale, y: Scale, size_bytes: int, predicted: float, average_bits: float, label: str = "") -> Spot:
    what = f"round {label}: " if label else ""
    title = f"{what}{size_bytes:,} bytes, {average_bits:.2f} bits a weight, predicted {predicted:.4g}"
    return Spot(x.place(size_bytes), y.place(predicted), title, label)


__all__ = ["HEIGHT", "WIDTH", "FrontierChart", "Line", "Spot", "frontier_chart"]
