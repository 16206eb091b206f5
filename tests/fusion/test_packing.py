import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion.packing import (
    LAST_CODE,
    MAX_ERROR,
    bits_for,
    decode_logprobs,
    encode_logprobs,
    pack,
    row_bytes,
    spare_bits,
    unpack,
)


@given(data=st.data(), bits=st.integers(1, 24), columns=st.integers(1, 40), rows=st.integers(0, 9))
def test_whatever_is_packed_comes_out_again_and_takes_no_byte_more(
    data: st.DataObject, bits: int, columns: int, rows: int
) -> None:
    ids = data.draw(
        hnp.arrays(np.int32, (rows, columns), elements=st.integers(0, 2**bits - 1)), label="ids"
    )
    packed = pack(ids, bits)
    assert packed.shape == (rows, math.ceil(columns * bits / 8)) == (rows, row_bytes(columns, bits))
    assert packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, columns, bits), ids)
    assert not spare_bits(packed, columns, bits)


@given(bits=st.integers(1, 24), columns=st.integers(1, 40), data=st.data())
def test_a_bit_behind_the_last_id_is_seen(bits: int, columns: int, data: st.DataObject) -> None:
    spare = row_bytes(columns, bits) * 8 - columns * bits
    if spare:
        packed = pack(np.zeros((2, columns), np.int32), bits)
        packed[1, -1] |= 0x80 >> data.draw(st.integers(0, spare - 1))
        assert spare_bits(packed, columns, bits)


@pytest.mark.parametrize("bits", [1, 7, 24])
def test_an_id_that_does_not_fit_is_refused(bits: int) -> None:
    for wrong in (2**bits, -1):
        with pytest.raises(ValueError, match="do not fit"):
            pack(np.asarray([[0, wrong]]), bits)


@given(st.integers(2, 1 << 24))
def test_the_bits_of_a_vocabulary_hold_its_last_id_and_one_less_would_not(size: int) -> None:
    assert size - 1 < 2 ** bits_for(size)
    assert size > 2 ** (bits_for(size) - 1)


def test_every_code_is_the_code_of_what_it_says() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(encode_logprobs(decode_logprobs(codes)), codes)


@given(hnp.arrays(np.float32, 8, elements=st.floats(-80, 0, width=32)))
def test_a_logprob_is_off_by_at_most_a_thirty_second_and_never_made_less_likely_at_the_floor(
    logprobs: np.ndarray,
) -> None:
    again = decode_logprobs(encode_logprobs(logprobs))
    floor = -LAST_CODE / 16
    wanted = np.maximum(logprobs, floor)
    assert np.abs(again - wanted).max() <= MAX_ERROR + 1e-6
    assert again.min() >= floor
