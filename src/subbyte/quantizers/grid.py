"""Grids as values: how many bits, whether zero sits in the middle or where an integer zero-point says, and which weights share a step.

A grid of `b` bits has `2^b` codes. A code `q` stands for the number

    x^ = s (q - z)

with scale `s > 0` and integer zero-point `z`, so that zero is always represented exactly: cutting patches with zero padding out of a
quantized input equals quantizing the patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subbyte.errors import OptionError

MIN_BITS = 2
MAX_BITS = 8
MOST_AFFINE_BITS = 6  # of weights


@dataclass(frozen=True)
class Grid:
    """The set of codes one number may take.

    Args:
        bits: width of a code, 2 to 8.
        symmetric: True: signed codes `-2^(b-1) .. 2^(b-1)-1` and zero-point 0. False: unsigned codes `0 .. 2^b-1` and a zero-point
            among them.
        group: of weights: how many consecutive ones of an output channel share a step and zero-point, see `granularity`; None: all.

    Raises:
        OptionError: if `bits` is not an integer from 2 to 8, or `group` no positive one.

    Example:
        >>> Grid(4, symmetric=True).lowest, Grid(4, symmetric=True).highest
        (-8, 7)
        >>> Grid(9)
        Traceback (most recent call last):
        subbyte.errors.OptionError: a grid has 2 to 8 bits, not 9
    """

    bits: int
    symmetric: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise OptionError(f"a grid has {MIN_BITS} to {MAX_BITS} bits, not {self.bits!r}")
        if self.group is not None and (isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1):
            raise OptionError(f"a group is a positive number of weights, or None for all of an output channel, not {self.group!r}")

    @property
    def lowest(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + (1 << self.bits) - 1

    def ends(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest code with the zero-point subtracted.

        Args:
            zero_point: `z`, integer-valued, any dtype and shape.

        Returns:
            Two float32 in the shape of `zero_point`.
        """
        return (self.lowest - zero_point).float(), (self.highest - zero_point).float()


@dataclass(frozen=True)
class WeightGrids:
    """What the grids of weights have in common at all widths.

    Weights of 7 and 8 bits have no zero-points in any case. Below, codes less their zero-points lie between -63 and 63: they fit into INT8,
    in which runtimes multiply, and two of their products into the 16 bits in which processors without VNNI add them, so that a zero-point
    costs as many bits of the file as a weight and no time. With 7 and 8 bits they would not, and a zero-point is worth least there.

    Args:
        symmetric: True: zero-points are 0. False: one for each step, of weights with up to 6 bits.
        group: see `Grid`.

    Raises:
        OptionError: if `group` is no positive integer.

    Example:
        >>> WeightGrids().at(4), WeightGrids().at(8)
        (Grid(bits=4, symmetric=False, group=None), Grid(bits=8, symmetric=True, group=None))
    """

    symmetric: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        self.at(MAX_BITS)  # refuses an impossible group

    def at(self, bits: int) -> Grid:
        """The grid of a width.

        Args:
            bits: 2 to 8.

        Raises:
            OptionError: if the width is not that.
        """
        return Grid(bits, self.symmetric or bits > MOST_AFFINE_BITS, self.group)
