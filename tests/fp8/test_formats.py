"""Laws of the four formats, held against tables made from their definitions."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.formats import E2M1, E4M3, E5M2, E8M0, FloatFormat, decode, encode
from tests.fp8.oracles import as_bytes, magnitudes, nearest

EIGHT_BITS = [E4M3, E5M2, E8M0]
SIGNED = [E4M3, E5M2, E2M1]
ALL = [*SIGNED, E8M0]


def each(formats: list[FloatFormat]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fmt", formats, ids=lambda fmt: fmt.name)


@each(EIGHT_BITS)
def test_all_256_codes_come_back(fmt: FloatFormat) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes.view(fmt.dtype), fmt)
    assert values.dtype == torch.float32
    back, number = as_bytes(encode(values, fmt)), ~values.isnan()
    assert torch.equal(back[number], codes[number])
    assert bool(decode(back.view(fmt.dtype), fmt)[~number].isnan().all())


def test_all_pairs_of_four_bit_codes_come_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E2M1.dtype)
    values = decode(codes, E2M1)
    assert values.shape == (512,)
    assert torch.equal(as_bytes(encode(values, E2M1)), as_bytes(codes))


@each(ALL)
def test_the_codes_count_through_the_defined_values(fmt: FloatFormat) -> None:
    table = magnitudes(fmt)
    codes = torch.arange(len(table), dtype=torch.uint8)
    if fmt is E2M1:
        codes = codes[0::2] | codes[1::2] << 4
    assert torch.equal(decode(codes.view(fmt.dtype), fmt).double(), table)
    assert float(table[-1]) == fmt.max
    assert float(table[table > 0][0]) == fmt.smallest_subnormal


@pytest.mark.parametrize(
    ("fmt", "finite", "infinite", "nan"),
    [(E4M3, 254, 0, 2), (E5M2, 248, 2, 6), (E8M0, 255, 0, 1)],
    ids=["E4M3", "E5M2", "E8M0"],
)
def test_codes_are_numbers_infinities_and_nan_as_specified(
    fmt: FloatFormat, finite: int, infinite: int, nan: int
) -> None:
    values = decode(torch.arange(256, dtype=torch.uint8).view(fmt.dtype), fmt)
    counts = [int(what.sum()) for what in (values.isfinite(), values.isinf(), values.isnan())]
    assert counts == [finite, infinite, nan]


@each(SIGNED)
def test_the_middle_of_two_codes_goes_to_the_even_one(fmt: FloatFormat) -> None:
    table = magnitudes(fmt)
    middle = (table[1:] + table[:-1]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, table[:-1], table[1:])
    for sign in (1, -1):
        found = decode(encode((middle * sign).float(), fmt), fmt)[: len(middle)].double()
        assert torch.equal(found, even * sign)


@each(SIGNED)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_every_value_goes_to_the_nearest_code(fmt: FloatFormat, parts: list[float]) -> None:
    x = torch.tensor([parts, [p**9 for p in parts]]) * fmt.max
    found = decode(encode(x, fmt), fmt)[:, : len(parts)]
    assert torch.equal(found.double(), nearest(x, fmt))


@each(SIGNED)
def test_a_zero_keeps_its_sign(fmt: FloatFormat) -> None:
    zeros = decode(encode(torch.tensor([0.0, -0.0]), fmt), fmt)
    assert torch.signbit(zeros).tolist() == [False, True]
    assert zeros.tolist() == [0.0, 0.0]


def test_a_row_of_odd_length_is_packed_with_a_zero() -> None:
    x = torch.tensor([[1.0, -6.0, 0.5], [3.0, 2.0, -4.0]])
    codes = encode(x, E2M1)
    assert as_bytes(codes).tolist() == [[0xF2, 0x01], [0x45, 0x0E]]  # the first is the low half
    assert torch.equal(decode(codes, E2M1)[:, :3], x)
    assert encode(torch.empty(0), E2M1).shape == (0,)
    assert encode(torch.empty(4, 0), E2M1).shape == (4, 0)


def test_powers_of_two_pass_through_e8m0_unchanged() -> None:
    powers = 2.0 ** torch.arange(-126.0, 128.0)
    codes = encode(powers, E8M0)
    assert torch.equal(as_bytes(codes), torch.arange(1, 255, dtype=torch.uint8))  # biased by 127
    assert torch.equal(decode(codes, E8M0), powers)
    assert bool(decode(encode(torch.tensor([torch.nan, torch.inf]), E8M0), E8M0).isnan().all())


@each(ALL)
def test_copies_are_the_format_itself(fmt: FloatFormat) -> None:
    assert copy.deepcopy(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) is fmt
