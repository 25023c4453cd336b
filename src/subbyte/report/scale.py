"""Axes: from numbers to places on a drawing, and round numbers to write beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST, LARGEST = 1e-100, 1e100  # what lies beyond is drawn at the end of its axis


@dataclass(frozen=True)
class Tick:
    """A number beside an axis.

    Args:
        place: on the drawing.
        text: the number.
    """

    place: float
    text: str


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis.

    Args:
        low: number at `start`; above 0 where the axis is logarithmic.
        high: number at `end`, above `low`.
        start: place of `low`.
        end: place of `high`.
        logarithmic: whether equal ratios have equal lengths.

    Example:
        >>> Scale(1.0, 100.0, 0.0, 200.0, logarithmic=True).place(10.0)
        100.0
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a number is; numbers outside, and NaN, are put at the nearer end, NaN at that of `high`.

        Args:
            value: any number.
        """
        inside = self.high if math.isnan(value) else min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 7) -> tuple[float, ...]:
        """Round numbers between `low` and `high`.

        Args:
            most: at most so many, where there is a choice.
        """
        if not self.logarithmic:
            step = _round_step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return tuple(step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**k for k in range(first, last + 1) for factor in factors]
            found = [number for number in found if self.low * (1 - 1e-9) <= number <= self.high * (1 + 1e-9)]
            if len(found) <= most:
                return tuple(found)
        return tuple(found[:: -(-len(found) // most)])


def up_from_zero(most: float, start: float, end: float) -> Scale:
    """A linear axis from 0 to a round number.

    Args:
        most: largest number.
        start: place of 0.
        end: place of the round number.

    Example:
        >>> up_from_zero(73.0, 0.0, 1.0).high
        80.0
    """
    step = _round_step(max(most, 1e-300) / 4)
    return Scale(0.0, step * math.ceil(max(most, 1e-300) / step - 1e-9), start, end)


def over_decades(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic axis of whole decades around all positive numbers.

    Args:
        values: what has to be shown; numbers that are not positive and finite do not count.
        start: place of the smallest.
        end: place of the largest.

    Example:
        >>> scale = over_decades([0.0, 0.02, 3.0], 0.0, 1.0)
        >>> scale.low, scale.high
        (0.01, 10.0)
    """
    positive = _drawable(values)
    low, high = math.floor(math.log10(min(positive)) + 1e-9), math.ceil(math.log10(max(positive)) - 1e-9)
    return Scale(10.0**low, 10.0 ** max(high, low + 1), start, end, logarithmic=True)


def around(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic axis a little wider than all positive numbers.

    Args:
        values: what has to be shown; numbers that are not positive and finite do not count.
        start: place of the smallest.
        end: place of the largest.

    Example:
        >>> round(around([10.0, 20.0], 0.0, 1.0).high, 1)
        20.7
    """
    positive = _drawable(values)
    low, high = min(positive), max(positive)
    margin = max(1.01, (high / low) ** 0.05)
    return Scale(low / margin, high * margin, start, end, logarithmic=True)


def figure(value: float) -> str:
    """A number for an axis.

    Args:
        value: any number.

    Example:
        >>> figure(0.01), figure(10.0**-7)
        ('0.01', '1e-07')
    """
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes for an axis, in decimal units.

    Args:
        value: bytes.

    Example:
        >>> size(20_000.0), size(1.5e6), size(0.0)
        ('20 kB', '1.5 MB', '0')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.4g} B" if value else "0"


def _drawable(values: Iterable[float]) -> list[float]:
    """Numbers that a logarithmic axis can span, also the ratio of any two of them."""
    return [min(max(value, SMALLEST), LARGEST) for value in values if 0 < value < math.inf] or [1.0]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
