"""Run a program and learn every change it makes below one folder, in order, with the bytes.

recorder.c, compiled at first use, is loaded before the program's C library and writes them down.
The program may add marks of its own ("this receipt was given"), which keep their place in the
order, and any change can be made to fail. Linux only.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

SOURCE: Final = Path(__file__).with_name("recorder.c")
_HEAD: Final = struct.Struct("=cxHHxxIIQQ")

Kind: TypeAlias = Literal["c", "d", "w", "t", "r", "l", "u", "f", "e", "s", "m", "!", "?"]
"""c: file made. d: folder made. w: bytes written. t: cut or extended to `offset` bytes. r: `path`
renamed to `other`. l: `other` made a second name of `path`. u: name removed. f: synced. e: a sync
that failed. s: everything synced. m: mark. !: a change that was made to fail; its kind is the data.
?: a change that cannot be replayed."""


class RecorderError(Exception):
    """Raised where no program can be recorded; says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One record."""

    kind: Kind
    number: int = -1
    """Of the change, from 0; marks and failures have that of the change before them."""
    file: int = 0
    """Inode."""
    offset: int = 0
    path: str = ""
    other: str = ""
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a program did."""

    changes: tuple[Change, ...]
    """The first one is the folder itself."""
    exit_code: int
    output: str
    """Both streams, for a person who looks for a fault."""


def build_recorder() -> Path:
    """Compile recorder.c, once a version.

    Raises: RecorderError without Linux or a C compiler.
    """
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        raise RecorderError(f"found {sys.platform} and compiler {compiler}; wanted Linux and `cc`")
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cofuse"
    library = folder / f"recorder-{version}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two builds may meet here
            built = Path(scratch) / library.name
            flags = ("-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-pthread")
            made = subprocess.run(
                [compiler, *flags, "-o", str(built), str(SOURCE)], capture_output=True, text=True
            )
            if made.returncode:
                raise RecorderError(f"cc cannot build {SOURCE.name}: {made.stderr}")
            built.rename(library)
    return library


def record(
    command: Sequence[str],
    folder: Path,
    *,
    fail: tuple[int, int] | None = None,
    timeout_s: float = 120,
) -> Recording:
    """Run `command` to its end and return what it changed below `folder`, which must be empty.

    Args: fail: the number of the change that fails, and the errno. ENOSPC goes on until heal().
    Raises: RecorderError; subprocess.TimeoutExpired.
    """
    _refuse_files_in(folder)
    with tempfile.TemporaryDirectory() as outside:
        log = Path(outside) / "log"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(build_recorder()),
            "COFUSE_RECORDER_ROOT": str(folder),
            "COFUSE_RECORDER_LOG": str(log),
        }
        if fail is not None:
            environment["COFUSE_RECORDER_FAIL"] = f"{fail[0]} {fail[1]}"
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
        return _recording(log, done.returncode, done.stdout)


def load_recorder() -> None:
    """Start this program anew with the recorder loaded, so that record_call() can be used.

    Raises: RecorderError.
    """
    if not hasattr(ctypes.CDLL(None), "cofuse_recorder_start"):
        environment = {**os.environ, "LD_PRELOAD": str(build_recorder())}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def record_call(
    call: Callable[[], int],
    folder: Path,
    *,
    fail: tuple[int, int] | None = None,
    timeout_s: int = 120,
    resumed: bool = False,
) -> Recording:
    """As record(), for a function that returns an exit code: it runs in a fork of this process.

    A fork starts in a hundredth of the time that a program takes with its imports. It ends like
    a killed one: nothing is closed or written after the call.
    Args: resumed: the folder holds files already, which Disk.reopened() knows.
    """
    if not resumed:
        _refuse_files_in(folder)
    at, error = fail or (0, 0)
    with tempfile.TemporaryDirectory() as outside:
        log, said = Path(outside) / "log", Path(outside) / "said"
        child = os.fork()
        if child == 0:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            signal.alarm(timeout_s)
            start = ctypes.CDLL(None).cofuse_recorder_start
            start(os.fsencode(folder), os.fsencode(log), ctypes.c_long(at), error)
            code = 1
            try:
                code = call()
            except BaseException:  # noqa: BLE001 - the parent shows it
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return _recording(log, code, said.read_bytes())


def _refuse_files_in(folder: Path) -> None:
    if any(folder.iterdir()):
        raise RecorderError(f"found files in {folder}, wanted an empty folder to start from")


def _recording(log: Path, exit_code: int, output: bytes) -> Recording:
    if not log.exists():
        raise RecorderError("nothing was recorded: is the program statically linked?")
    changes = tuple(_read(log.read_bytes()))
    return Recording(changes, exit_code, output.decode("utf-8", "replace"))


def _read(log: bytes) -> Iterator[Change]:
    at = 0
    while at < len(log):
        kind, path, other, data, number, file, offset = _HEAD.unpack_from(log, at)
        ends = [at := at + _HEAD.size, at := at + path, at := at + other, at := at + data]
        yield Change(
            kind=cast(Kind, kind.decode()),
            number=-1 if number == 0xFFFFFFFF else number,
            file=file,
            offset=offset,
            path=os.fsdecode(log[ends[0] : ends[1]]),
            other=os.fsdecode(log[ends[1] : ends[2]]),
            data=log[ends[2] : ends[3]],
        )


def mark(text: str) -> None:
    """In a recorded program: note `text` at this place in the order. Elsewhere nothing happens."""
    if (call := getattr(ctypes.CDLL(None), "cofuse_recorder_mark", None)) is not None:
        call(text.encode())


def heal() -> None:
    """In a recorded program: there is room on the disk again."""
    if (call := getattr(ctypes.CDLL(None), "cofuse_recorder_heal", None)) is not None:
        call()
