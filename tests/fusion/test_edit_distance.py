from hypothesis import given
from hypothesis import strategies as st

from fusion.edit_distance import LONGEST, NearestStrings

WORDS = st.binary(min_size=1, max_size=9) | st.text("ab", min_size=1, max_size=9).map(str.encode)


def distance(a: bytes, b: bytes) -> int:
    """The textbook's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@given(st.lists(WORDS, min_size=1, max_size=20), WORDS)
def test_no_other_string_is_nearer(strings: list[bytes], string: bytes) -> None:
    found = strings[NearestStrings(strings).nearest(string)]
    assert distance(found, string) == min(distance(s, string) for s in strings)


def test_strings_as_long_as_a_word_of_the_machine_are_told_apart() -> None:
    strings = [b"a" * LONGEST, b"a" * (LONGEST - 1) + b"b", b"b" * LONGEST]
    for index, string in enumerate(strings):
        assert NearestStrings(strings).nearest(string) == index
    assert NearestStrings(strings).nearest(b"b" * (LONGEST + 9)) == 2
    assert NearestStrings([b"zzz"]).nearest(b"a" * 99) == 0
