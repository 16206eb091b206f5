"""Bad inputs made from good ones, the same for the same seed; and those that everybody gets."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Final

MAX_BYTES: Final = 256 * 1024
"""Of one input; what is larger is the wire's to refuse (protos/tls.py, check_bounds)."""
TOKENS: Final[Sequence[bytes]] = (
    b"",
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\n",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"=",
    b"-",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-1",
    b"0",
    b"1.5",
    b"9" * 400,
    b"18446744073709551616",
    b"\\ud800",
    b"\\u0000",
    b"../../etc/passwd",
    b"2026-13-45",
    b"12:99:99",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!binary x",
    b"!!python/object:os.system",
    b"? ",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
)
"""What the grammars of the formats are made of, and what has broken others."""
_NUMBER: Final = re.compile(rb"[0-9]+")


def _bomb(opens: bytes, joins: bytes) -> bytes:
    """Nine references, nine deep: YAML's way to say a thousand million words in a few."""
    lines = [b"a0: &a0 [x" + b",x" * 8 + b"]"]
    for depth in range(1, 10):
        names = joins.join([b"*a%d" % (depth - 1)] * 9)
        lines.append(b"a%d: &a%d " % (depth, depth) + opens % names)
    return b"\n".join(lines)


HOSTILE: Final[Sequence[bytes]] = (
    b"",
    b"\n" * 1000,
    b"\x00" * 1000,
    b"\xff" * 1000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"a: " * 20_000,
    b"- " * 50_000,
    b"a = " + b"[" * 50_000,
    b"a" + b".a" * 20_000 + b" = 1",
    b"[" + b"a." * 20_000 + b"a]",
    b"a = " + b"{a=" * 20_000,
    b"9" * 200_000,
    b"a = " + b"9" * 100_000,
    b'{"seed": ' + b"9" * 100_000 + b"}",
    b'"' + b"\\" * 200_000,
    b'{"a":1,' + b'"a":1,' * 20_000 + b'"a":1}',
    b"".join(b"k%d = 1\n" % number for number in range(20_000)),
    _bomb(b"[%b]", b","),
    _bomb(b"{x: [%b]}", b","),
    _bomb(b"[%b]", b",") + b"\nname: *a9\npivot: *a9\ntraining: *a9\nround: *a9\n",
    b"&a [*a]",
    b"&a {x: *a}",
    b"name: 2026-13-45\n",
    b"name: 0x\nseed: 0b2\nlr: 1:99:99\n",
)


def inputs(seeds: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """The seeds, the hostile ones, and as many spoiled ones as make up `count`."""
    yield from islice((*seeds, *HOSTILE), count)
    random = Random(seed)
    for _ in range(count - len(seeds) - len(HOSTILE)):
        raw = random.choice(seeds)
        for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
            raw = spoiled(raw, seeds, random)
        yield raw[:MAX_BYTES]


def spoiled(raw: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    """One change at one place."""
    here = random.randrange(len(raw) + 1)
    there = min(len(raw), here + random.choice((0, 1, 1, 2, 4, 16, 64)))
    match random.randrange(7):
        case 0:
            return raw[:here] + random.choice(TOKENS) + raw[there:]
        case 1:
            return raw[:here] + raw[there:]
        case 2:
            return raw[:there] + raw[here:there] * random.choice((1, 1, 100)) + raw[there:]
        case 3:
            return raw[:here]
        case 4:
            return raw[:here] + random.choice(seeds)[here:]
        case 5 if numbers := list(_NUMBER.finditer(raw)):
            found = random.choice(numbers)
            return raw[: found.start()] + random.choice(TOKENS) + raw[found.end() :]
        case _ if here < len(raw):
            return raw[:here] + bytes([raw[here] ^ (1 << random.randrange(8))]) + raw[here + 1 :]
    return raw
