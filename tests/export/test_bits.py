"""Dense packing: every width, every size, every border."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subbyte.errors import OptionError
from subbyte.export import bits
from subbyte.export.bits import Bytes, pack, packed_size, unpack

widths = st.integers(1, 8)


@st.composite
def coded(draw: st.DrawFn) -> tuple[Bytes, int]:
    """Codes, and the width that holds them."""
    width = draw(widths)
    return np.array(draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), dtype=np.uint8), width


def by_the_letter(codes: Bytes, width: int) -> list[int]:
    """The docstring's definition, bit by bit."""
    stream = [int(code) >> bit & 1 for code in codes for bit in range(width)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << place for place, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)]


@given(coded())
def test_packing_is_its_definition(case: tuple[Bytes, int]) -> None:
    codes, width = case
    packed = pack(codes, width)
    assert packed.dtype == np.uint8
    assert packed.tolist() == by_the_letter(codes, width)
    assert packed.size == packed_size(codes.size, width) == -(-codes.size * width // 8)


@given(coded(), st.sampled_from((8, 16, 64)))
def test_unpacking_is_the_inverse_across_chunks(case: tuple[Bytes, int], chunk: int) -> None:
    codes, width = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK_CODES", chunk)
        packed = pack(codes, width)
        assert packed.tolist() == by_the_letter(codes, width)
        assert unpack(packed, width, codes.size).tolist() == codes.tolist()


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("around", [-9, -1, 0, 1, 7, 8, 9])
def test_round_trip_at_the_real_chunks_border(width: int, around: int) -> None:
    count = bits.CHUNK_CODES + around
    codes = np.random.default_rng(count + width).integers(0, 2**width, count, dtype=np.uint8)
    packed = pack(codes, width)
    assert packed.size == packed_size(count, width)
    assert np.array_equal(unpack(packed, width, count), codes)


def test_chunks_end_on_a_bytes_border() -> None:
    assert bits.CHUNK_CODES % 8 == 0


@given(st.integers(0, 10**12), widths)
def test_sizes_are_exact_for_large_counts(count: int, width: int) -> None:
    assert packed_size(count, width) == (count * width + 7) // 8


@pytest.mark.parametrize("width", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(width: int) -> None:
    with pytest.raises(OptionError, match=f"code {2**width} does not fit into {width} bits"):
        pack(np.array([0, 2**width], dtype=np.uint8), width)


@pytest.mark.parametrize("width", [0, 9, -1])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(OptionError, match="1 to 8 bits"):
        pack(np.zeros(8, dtype=np.uint8), width)
    with pytest.raises(OptionError, match="1 to 8 bits"):
        unpack(np.zeros(8, dtype=np.uint8), width, 8)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_wrong_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(OptionError, match=f"5 codes of 4 bits take 3 bytes, not {size}"):
        unpack(np.zeros(size, dtype=np.uint8), 4, 5)
