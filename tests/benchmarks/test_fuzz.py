"""The short form of `make fuzz`: ten thousand bad inputs, and a fuzzer that would see a crash."""

import mmap
import time
from pathlib import Path

import pytest

from benchmarks import fuzz_parsers
from benchmarks.fuzz import MAX_MS, Tally, look, spoil
from benchmarks.fuzz_inputs import HOSTILE, inputs
from benchmarks.fuzz_parsers import Parser

EACH = 460
"""Times the parsers of the table: ten thousand."""


def test_no_parser_of_foreign_bytes_crashes_or_dawdles(tmp_path: Path) -> None:
    found = spoil([], EACH, tmp_path)
    assert sum(tally.inputs for tally in found.values()) > 10_000
    assert {name: tally.crashes for name, tally in found.items() if tally.crashes} == {}
    assert max(tally.max_ms for tally in found.values()) <= MAX_MS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nor_do_ten_thousand_of_them_each(tmp_path: Path) -> None:
    found = spoil([], 10_000, tmp_path)
    assert {name: tally.crashes for name, tally in found.items() if tally.crashes} == {}


def test_every_module_with_services_is_in_the_table() -> None:
    protos = {path.stem for path in Path("protos/v1").glob("*_pb2.py")}
    assert {module.__name__.rpartition(".")[2] for module in fuzz_parsers._PROTOS} == protos


def test_the_same_seed_gives_the_same_inputs_and_another_one_others() -> None:
    first, again, other = (list(inputs([b"abc"], 200, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[: 1 + len(HOSTILE)] == [b"abc", *HOSTILE]


@pytest.mark.parametrize(
    ("does", "seen"),
    [
        ("raise KeyError(raw)", "KeyError"),
        ("raise RecursionError", "RecursionError"),
        ("burn()", f"more than {MAX_MS:.0f} ms"),
        ("hold()", "more than 64 MiB"),
        ("raise ValueError", ""),
    ],
)
def test_a_crash_is_seen_and_its_input_is_kept(tmp_path: Path, does: str, seen: str) -> None:
    def burn() -> None:
        until = time.thread_time() + MAX_MS / 1000 * 1.5
        while time.thread_time() < until:
            pass

    def hold() -> None:
        with mmap.mmap(-1, 96 << 20) as fresh:  # malloc may have as much at hand already
            for at in range(0, len(fresh), mmap.PAGESIZE):
                fresh[at] = 1

    def parse(raw: bytes) -> None:
        exec(does, {"raw": raw, "burn": burn, "hold": hold})

    tally = Tally(tmp_path / "kept")
    for _ in range(3):
        tally.run(Parser(parse=parse, seeds=[], refusals=(ValueError,)), b"bad")
    assert tally.inputs == 3
    assert len(tally.crashes) == bool(seen)
    for what, path in tally.crashes.items():
        assert what.startswith(seen)
        assert Path(path).read_bytes() == b"bad"


@pytest.mark.slow
def test_atheris_looks_for_as_long_as_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    figures = look("token", 5, tmp_path)
    assert figures["crashes"] == 0
    assert figures["inputs"] > 1000
