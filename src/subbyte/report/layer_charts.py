"""Charts with the layers side by side, in running order: bits, bytes, errors, and the table of sensitivities. Geometry only.

All have the same columns, so that a layer stands at the same place in each of them. Units are those of the drawing, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from subbyte.report.layer import LayerReport
from subbyte.report.planned import Planned
from subbyte.report.scale import Scale, Tick, figure, over_decades, size, up_from_zero

WIDTH, LEFT, RIGHT, TOP = 1000.0, 84.0, 988.0, 14.0
PLOT_HEIGHT, SLIM_HEIGHT, CELL_HEIGHT = 190.0, 130.0, 24.0
LETTER = 6.3  # width of a letter of a label
MOST_LABELS, MOST_LETTERS = 30, 20
LEVELS = 7  # of the heat map
NUMBERS_FROM = 44.0  # width of a column in which a number has room


@dataclass(frozen=True)
class Column:
    """The place of a layer.

    Args:
        left: edge of its column.
        middle: of its column.
        width: of its column.
        label: its name, shortened; empty where there is no room for one.
    """

    left: float
    middle: float
    width: float
    label: str


@dataclass(frozen=True)
class Frame:
    """What surrounds the marks of a chart.

    Args:
        columns: one for each layer.
        bottom: where the columns stand.
        height: of the drawing.
        ticks: of the vertical axis.
        slanted: whether labels are written at a slant.
    """

    columns: tuple[Column, ...]
    bottom: float
    height: float
    ticks: tuple[Tick, ...]
    slanted: bool


@dataclass(frozen=True)
class Bar:
    """A bar over a layer, and what is marked on it.

    Args:
        column: of the layer.
        top: of the bar.
        mark: height of the second figure; None where there is none.
        text: in the bar, where there is room.
    """

    column: Column
    top: float
    mark: float | None
    text: str = ""


@dataclass(frozen=True)
class Pair:
    """An error beside that of plain rounding.

    Args:
        column: of the layer.
        error: its height.
        baseline: height of plain rounding's.
        rounded: whether plain rounding is kept.
    """

    column: Column
    error: float
    baseline: float
    rounded: bool


@dataclass(frozen=True)
class Chart:
    """Layers side by side.

    Args:
        frame: axes and labels.
        marks: one for each layer.
    """

    frame: Frame
    marks: tuple[Bar, ...] | tuple[Pair, ...]


@dataclass(frozen=True)
class HeatCell:
    """An option of a layer.

    Args:
        column: of the layer.
        top: upper edge.
        level: 0 for the least sensitivity, up to `LEVELS` - 1; -1 where the option breaks the model.
        chosen: whether the layer got it.
        text: its sensitivity, where there is room.
    """

    column: Column
    top: float
    level: int
    chosen: bool
    text: str


@dataclass(frozen=True)
class HeatMap:
    """Layers side by side, options one above the other.

    Args:
        frame: axes and labels.
        cells: of all layers.
        steps: upper end of each level but the last.
    """

    frame: Frame
    cells: tuple[HeatCell, ...]
    steps: tuple[float, ...]


def bits_chart(layers: Sequence[LayerReport]) -> Chart:
    """Bits of weights as bars, bits of inputs as marks on them.

    Args:
        layers: in running order.
    """
    scale = Scale(0.0, 8.0, TOP + PLOT_HEIGHT, TOP)
    frame = _frame([layer.name for layer in layers], scale.start, [Tick(scale.place(bits), str(bits)) for bits in range(0, 9, 2)])
    marks = []
    for layer, column in zip(layers, frame.columns, strict=True):
        mark = None if layer.activation_bits is None else scale.place(layer.activation_bits)
        marks.append(Bar(column, scale.place(layer.weight_bits), mark, str(layer.weight_bits) if column.width >= 16 else ""))
    return Chart(frame, tuple(marks))


def bytes_chart(layers: Sequence[LayerReport]) -> Chart:
    """Bytes in float32 as bars, bytes in the packed file as marks on them.

    Args:
        layers: in running order.
    """
    scale = up_from_zero(max(layer.float_bytes for layer in layers), TOP + SLIM_HEIGHT, TOP)
    frame = _frame([layer.name for layer in layers], scale.start, [Tick(scale.place(value), size(value)) for value in scale.ticks(5)])
    marks = [
        Bar(column, scale.place(layer.float_bytes), scale.place(layer.size_bytes))
        for layer, column in zip(layers, frame.columns, strict=True)
    ]
    return Chart(frame, tuple(marks))


def error_chart(layers: Sequence[LayerReport]) -> Chart:
    """Errors beside those of plain rounding, on a logarithmic axis.

    Args:
        layers: in running order.
    """
    values = [value for layer in layers for value in (layer.error, layer.baseline_error)]
    scale = over_decades(values, TOP + PLOT_HEIGHT, TOP)
    frame = _frame([layer.name for layer in layers], scale.start, [Tick(scale.place(value), figure(value)) for value in scale.ticks()])
    marks = [
        Pair(column, scale.place(layer.error), scale.place(layer.baseline_error), not layer.error < layer.baseline_error)
        for layer, column in zip(layers, frame.columns, strict=True)
    ]
    return Chart(frame, tuple(marks))


def heat_map(planned: Planned) -> HeatMap:
    """Sensitivity of every layer at every option.

    Args:
        planned: how a budget was met.
    """
    options = planned.options
    bottom = TOP + CELL_HEIGHT * len(options)
    tops = {option: TOP + CELL_HEIGHT * k for k, option in enumerate(options)}
    frame = _frame(list(planned.table), bottom, [Tick(tops[option] + CELL_HEIGHT / 2, option) for option in options])
    finite = [loss for row in planned.table.values() for loss in row.values() if 0 < loss < math.inf] or [1.0]
    least, most = min(finite), max(finite)
    steps = tuple(least * (most / least) ** ((k + 1) / LEVELS) for k in range(LEVELS - 1))
    cells = []
    for (name, row), column in zip(planned.table.items(), frame.columns, strict=True):
        for option, loss in row.items():
            level = -1 if loss == math.inf else sum(loss > step for step in steps)
            text = ("breaks" if loss == math.inf else f"{loss:.1g}") if column.width >= NUMBERS_FROM else ""
            cells.append(HeatCell(column, tops[option], level, option == planned.chosen[name], text))
    return HeatMap(frame, tuple(cells), steps)


def _frame(names: Sequence[str], bottom: float, ticks: Sequence[Tick]) -> Frame:
    """Columns and labels: every name where there is room, otherwise as many as there is room for."""
    width = (RIGHT - LEFT) / len(names)
    stride = -(-len(names) // MOST_LABELS)
    labels = [name if k % stride == 0 else "" for k, name in enumerate(_short(names))]
    longest = LETTER * max(map(len, labels))
    slanted = longest > width - 4
    columns = tuple(
        Column(round(LEFT + k * width, 1), round(LEFT + (k + 0.5) * width, 1), round(width, 2), label) for k, label in enumerate(labels)
    )
    room = 24 + (longest * math.sin(math.radians(50)) if slanted else 0)
    return Frame(columns, bottom, round(bottom + room, 1), tuple(ticks), slanted)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the modules that all layers are in, and of long ones the end, which tells layers apart better than the beginning."""
    if max(map(len, names)) > MOST_LETTERS and len(names) > 1:
        common = commonprefix(list(names)).rpartition(".")
        names = [name[len(common[0]) + len(common[1]) :] for name in names]
    return [name if len(name) <= MOST_LETTERS else "…" + name[1 - MOST_LETTERS :] for name in names]
