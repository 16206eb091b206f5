"""Every parser of foreign bytes under fire: `make fuzz`.

    python benchmarks/fuzz.py [--inputs N | --seconds S] [--parser NAME ...] [--json]

--inputs spoils good inputs by a seeded table of changes; --seconds lets atheris (libFuzzer) look
for ways into the code, so many seconds a parser, each in a process of its own. An input is a crash
when the parser raises anything but its refusals, takes more than MAX_MS of processor time, or makes
the process larger by more than MAX_MIB. Each is kept as a file under --keep.
"""

import argparse
import gc
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.fuzz_inputs import HOSTILE, MAX_BYTES, TOKENS, inputs  # noqa: E402

MAX_MS: Final = 100.0
"""Of processor time, for one input: a busy machine must not look like a slow parser."""
MAX_MIB: Final = 64.0
GIVE_UP_S: Final = 5.0
_WRITE_EVERY: Final = 500
_INSTRUMENTED: Final = (
    "trust",
    "protos",
    "participant",
    "fusion",
    "coordinator",
    "yaml",
    "tomllib",
)
_MEMORY_DISK: Final = Path("/dev/shm")


class _EndlessError(BaseException):
    """An input that a parser would go on with for ever; no parser may catch it."""


def _give_up(*_: object) -> None:
    raise _EndlessError


@dataclass(slots=True)
class Tally:
    """What a parser went through."""

    keep: Path
    inputs: int = 0
    max_ms: float = 0.0
    crashes: dict[str, str] = field(default_factory=dict)
    """By where and how: the last line of the trace, of the first input that did it."""
    _peak_mib: float = field(default_factory=lambda: _peak_mib(afresh=True))

    def run(self, parser: Any, raw: bytes) -> None:
        """Give a parser one input."""
        began, wrong = time.thread_time(), None
        signal.setitimer(signal.ITIMER_VIRTUAL, GIVE_UP_S)
        try:
            parser.parse(raw)
        except parser.refusals:
            pass
        except _EndlessError:
            pass  # its time tells
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            wrong = _where(error)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        spent_ms, peak_mib = (time.thread_time() - began) * 1e3, _peak_mib()
        if peak_mib - self._peak_mib > MAX_MIB:
            wrong = wrong or f"more than {MAX_MIB:.0f} MiB"
        if spent_ms > MAX_MS:
            wrong = wrong or f"more than {MAX_MS:.0f} ms"
        self.inputs += 1
        self.max_ms, self._peak_mib = max(self.max_ms, spent_ms), peak_mib
        if wrong is not None and wrong not in self.crashes:
            self.keep.mkdir(parents=True, exist_ok=True)
            path = self.keep / hashlib.sha256(raw).hexdigest()[:16]
            path.write_bytes(raw)
            self.crashes[wrong] = str(path)

    def figures(self) -> dict[str, Any]:
        """For the report."""
        return {
            "inputs": self.inputs,
            "crashes": len(self.crashes),
            "max_ms": round(self.max_ms, 1),
            **({"found": self.crashes} if self.crashes else {}),
        }


def _peak_mib(*, afresh: bool = False) -> float:
    """The most memory that this process has held; afresh: from now on."""
    if afresh:
        with suppress(OSError):  # only Linux has it; elsewhere a peak of before may hide one of now
            Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _where(error: Exception) -> str:
    """The kind of an error and the line of ours that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if str(ROOT) in f.filename and "benchmarks" not in f.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}"


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """A folder for the inputs of parsers that read files, in memory where that is possible."""
    return tempfile.TemporaryDirectory(dir=_MEMORY_DISK if _MEMORY_DISK.is_dir() else None)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What other modules left lying about is collected on no input's time, and none lasts."""
    before = signal.signal(signal.SIGVTALRM, _give_up)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        signal.signal(signal.SIGVTALRM, before)


def spoil(names: Sequence[str], count: int, keep: Path) -> Mapping[str, Tally]:
    """Give each parser `count` inputs of benchmarks/fuzz_inputs.py."""
    from benchmarks.fuzz_parsers import parsers

    found = {}
    with scratch() as folder, _undisturbed():
        known = parsers(Path(folder))
        for name in names or known:
            parser, tally = known[name], Tally(keep / name)
            for raw in parser.seeds:  # what is imported or compiled at the first call is no input's
                parser.parse(raw)
            for raw in inputs(parser.seeds, count):
                tally.run(parser, raw)
            found[name] = tally
    return found


def look(name: str, seconds: int, keep: Path) -> dict[str, Any]:
    """Let atheris look for inputs, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds)]
        done = subprocess.run(
            [*command, "--keep", str(keep), "--out", str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds * 2 + 120,
            check=False,
        )
        figures: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if done.returncode or not figures:
        last = done.stderr.strip()[-400:]
        figures = {"inputs": 0, "crashes": 0, "max_ms": 0.0} | figures
        return {**figures, "crashes": figures["crashes"] + 1, "ended": last}
    return figures


def _child(name: str, seconds: int, keep: Path, out: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        from benchmarks.fuzz_parsers import parsers
    folder = tempfile.mkdtemp(dir=_MEMORY_DISK if _MEMORY_DISK.is_dir() else None)
    parser, tally = parsers(Path(folder))[name], Tally(keep / name)
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    for number, raw in enumerate((*parser.seeds, *HOSTILE)):
        (corpus / str(number)).write_bytes(raw)
    words = corpus.with_name("words")
    words.write_text("".join(f'"{_escaped(token)}"\n' for token in TOKENS if token))

    def one(raw: bytes) -> None:
        tally.run(parser, raw)
        if tally.inputs % _WRITE_EVERY == 1 or time.monotonic() > ends:
            out.write_text(json.dumps(tally.figures()))

    ends = time.monotonic() + seconds - 1
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_BYTES}",
        f"-dict={words}",
        "-timeout=60",
    ]
    signal.signal(signal.SIGVTALRM, _give_up)
    gc.freeze()
    atheris.Setup([sys.argv[0], str(corpus), "-verbosity=0", *options], one)
    atheris.Fuzz()


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz; exit 1 when something crashed."""
    parser = argparse.ArgumentParser(description="Every parser of foreign bytes under fire.")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each parser")
    parser.add_argument("--seconds", type=int, help="for each parser, with atheris instead")
    parser.add_argument("--parser", nargs="+", default=[])
    parser.add_argument("--keep", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        _child(arguments.child, arguments.seconds, arguments.keep, arguments.out)
    found = {}
    if arguments.seconds is None:
        for name, tally in spoil(arguments.parser, arguments.inputs, arguments.keep).items():
            found[name] = tally.figures()
    else:
        for name in arguments.parser or names():
            found[name] = look(name, arguments.seconds, arguments.keep)
            sys.stderr.write(f"{name}: {found[name]}\n")
    crashes = sum(figures["crashes"] for figures in found.values())
    for name, figures in found.items():
        sys.stderr.write(f"{name:<28} {figures}\n")
    if arguments.json:
        print(json.dumps({"fuzz": found}))
    return int(crashes > 0)


def names() -> list[str]:
    """Of all parsers."""
    from benchmarks.fuzz_parsers import parsers

    with scratch() as folder:
        return list(parsers(Path(folder)))


if __name__ == "__main__":
    raise SystemExit(main())
