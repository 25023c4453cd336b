"""Axes and geometry: numbers stand where they should, and odd ones stay on the drawing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import subbyte
from subbyte.report.frontier_chart import BOTTOM, frontier_chart
from subbyte.report.layer_charts import LEFT, LEVELS, RIGHT, TOP, bits_chart, bytes_chart, error_chart, heat_map
from subbyte.report.planned import Limit, Point, Verified
from subbyte.report.scale import Scale, around, over_decades, up_from_zero
from subbyte.report.summary import Summary

positive = st.floats(1e-30, 1e30)


@given(st.lists(st.floats(allow_nan=True), max_size=5), st.floats(allow_nan=True))
def test_every_number_has_a_place_on_every_axis(values: list[float], value: float) -> None:
    finite = max((abs(number) for number in values if math.isfinite(number) and abs(number) < 1e300), default=0.0)
    for scale in (over_decades(values, 200.0, 10.0), around(values, 200.0, 10.0), up_from_zero(finite, 200.0, 10.0)):
        assert 10.0 <= scale.place(value) <= 200.0


@given(positive, positive)
def test_larger_numbers_are_farther(one: float, other: float) -> None:
    low, high = sorted((one, other))
    for scale in (over_decades([low, high], 0.0, 1000.0), around([low, high], 0.0, 1000.0)):
        assert scale.low <= low <= high <= scale.high * (1 + 1e-9) and scale.place(low) <= scale.place(high)


@given(positive, st.floats(1.001, 1e12))
def test_axes_have_a_few_round_numbers(low: float, ratio: float) -> None:
    for scale in (Scale(low, low * ratio, 0.0, 1.0, logarithmic=True), up_from_zero(low * ratio, 0.0, 1.0)):
        ticks = scale.ticks()
        assert len(ticks) <= 7 and list(ticks) == sorted(ticks)
        assert all(scale.low * (1 - 1e-6) <= tick <= scale.high * (1 + 1e-6) for tick in ticks)


def test_decades_are_whole() -> None:
    scale = over_decades([0.0, math.nan, math.inf, 2e-5, 0.03], 100.0, 0.0)
    assert (scale.low, scale.high) == pytest.approx((1e-5, 0.1)) and scale.ticks() == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    assert over_decades([0.1], 0.0, 1.0).high == 1.0 and over_decades([], 0.0, 1.0).low == 1.0


def test_layers_stand_side_by_side(fixed: subbyte.Result) -> None:
    layers = fixed.layers
    for chart in (bits_chart(layers), bytes_chart(layers), error_chart(layers)):
        middles = [mark.column.middle for mark in chart.marks]
        assert middles == [column.middle for column in chart.frame.columns] == sorted(middles)
        assert LEFT < middles[0] and middles[-1] < RIGHT
    bits = bits_chart(layers).marks
    assert [bar.text for bar in bits] == ["8", "4", "4"] and [bar.mark is None for bar in bits] == [False, True, True]
    assert bits[0].top == bits[0].mark == TOP and bits[1].top == pytest.approx((TOP + bits_chart(layers).frame.bottom) / 2)
    for bar, layer in zip(bytes_chart(layers).marks, layers, strict=True):
        assert bar.mark is not None and bar.top <= bar.mark, layer


def test_errors_stand_below_those_that_they_beat(troubled: Summary) -> None:
    marks = error_chart(troubled.layers).marks
    assert [pair.rounded for pair in marks] == [True, False, True]
    assert marks[1].error > marks[1].baseline, "smaller errors are further down"
    odd = tuple(replace(layer, error=error) for layer, error in zip(troubled.layers, (math.nan, math.inf, 0.0), strict=True))
    assert all(TOP <= pair.error <= 300 for pair in error_chart(odd).marks)


def test_the_heat_map_has_every_option_and_marks_the_chosen(budgeted: subbyte.Result) -> None:
    planned = budgeted.summary().planned
    assert planned is not None
    name, row = next(iter(planned.table.items()))
    broken = replace(planned, table={**planned.table, name: {**row, "W2A8": math.inf, "W4A8": -1e-9}})
    drawn = heat_map(broken)
    assert len(drawn.cells) == sum(map(len, planned.table.values())) and sum(cell.chosen for cell in drawn.cells) == len(planned.table)
    assert [tick.text for tick in drawn.frame.ticks] == ["W8A8", "W4A8", "W2A8"]
    first = {cell.top: cell for cell in drawn.cells if cell.column == drawn.frame.columns[0]}
    levels = [first[top].level for top in sorted(first)]
    assert levels[1:] == [0, -1] and first[max(first)].text == "breaks"
    assert max(cell.level for cell in heat_map(planned).cells) == LEVELS - 1 and min(cell.level for cell in heat_map(planned).cells) == 0
    assert list(drawn.steps) == sorted(drawn.steps) and len(drawn.steps) == LEVELS - 1


def test_the_frontier_falls_and_shows_limits_that_have_a_place(budgeted: subbyte.Result) -> None:
    planned = budgeted.summary().planned
    assert planned is not None
    curve = frontier_chart(planned).curve
    assert [spot.x for spot in curve] == sorted(spot.x for spot in curve) and [spot.y for spot in curve] == sorted(spot.y for spot in curve)
    limits = (Limit("bytes", planned.size_bytes + 1.0, 1.0), Limit("latency", 1.0, 1.0), Limit("bytes", 1e12, 1.0))
    rounds = tuple(Verified(planned.size_bytes, 4.0, planned.predicted, {}, met=True, kept=kept) for kept in (False, True))
    told = replace(planned, limits=limits, rounds=rounds, loss_name="KLDivergence")
    assert [line.vertical for line in frontier_chart(told).limits] == [True]
    assert [spot.label for spot in frontier_chart(told).rounds] == ["1", "2"] and not frontier_chart(replace(planned, rounds=())).rounds
    same = replace(planned, limits=(Limit("kl", planned.predicted, 0.0),), loss_name="KLDivergence")
    line = frontier_chart(same).limits[0]
    assert not line.vertical and line.place == frontier_chart(same).predicted.y
    flat = replace(planned, frontier=(Point(planned.size_bytes, 4.0, 0.0),), predicted=0.0, measured=math.nan, limits=())
    assert frontier_chart(flat).predicted.y == BOTTOM and frontier_chart(flat).measured.y == TOP


def test_words_are_expressions_that_make_the_value() -> None:
    from subbyte.report.words import in_words

    budget = subbyte.Budget(agreement=99, choices=subbyte.Choices((2, 4), ties=[("a", "b")]), minimize="size")
    names = {"Budget": subbyte.Budget, "Choices": subbyte.Choices}
    assert eval(in_words(budget), names) == budget
    assert in_words(subbyte.Recipe(flavour=subbyte.Flavour.PARALLEL)) == "Recipe(flavour='parallel')"
    assert in_words(lambda: 0) == "<function test_words_are_expressions_that_make_the_value.<locals>.<lambda>>"
