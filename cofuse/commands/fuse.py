"""`cofuse fuse`: a fusion from local directories, without any coordinator."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cofuse.commands.connection import answer, fail
from cofuse.commands.fuse_tables import open_console, show_evals, show_facts, skipped_lines
from cofuse.output import is_quiet, wants_debug, wants_json

if TYPE_CHECKING:
    from cofuse.demo.screen import Screen
    from cofuse.local_check import Checked

Spec = Annotated[Path, typer.Argument(help="Spec (YAML); see examples/fuse-*.yaml, docs/fuse.md.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The pivot directory to make.")]
Work = Annotated[
    Path | None, typer.Option(help="Where the work is kept, to go on or to reuse. [OUT.work]")
]


def fuse(
    spec: Spec,
    out: Out = None,
    work: Work = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what it costs; no work.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a pivot made before.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Training runs side by side.")] = 1,
) -> None:
    """Fuse local models into a pivot; the spec names pivot, sources and method."""
    from cofuse.local_spec import load_local_spec

    say = _Talk()
    with say.errors():
        found = load_local_spec(spec)
        if out is None and not dry_run:
            say.misuse("--out is missing; say where the pivot directory is to be made")
        inputs = [found.pivot, *found.sources.values(), found.prompts, found.evals]
        if out is not None:
            work = work or beside(out, ".work")
            _check_out(say, out, work, [path for path in inputs if path is not None], force=force)
        with say.waiting("reading tokenizers and headers"):
            from cofuse.local_check import check

            checked = check(found)
        console = open_console(to_stderr=wants_json())
        if dry_run or out is None or work is None:
            with say.waiting("merging without writing"):
                from cofuse.local_merge import try_merge

                report = try_merge(found, {source.name: source.kind for source in checked.sources})
            facts = checked.facts() | {"merge": report and report.described()}
            show_facts(facts, console)
            say.done({"dry_run": facts})
            return
        _run(say, checked, out, work, workers)


def _run(say: _Talk, checked: Checked, out: Path, work: Path, workers: int) -> None:
    from cofuse.demo.screen import screen
    from cofuse.local_fusion import fuse_locally, lay_down

    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with screen() as bars:
            bars.say(
                f"cofuse fuse: {checked.spec.round.method}, "
                f"{len(checked.sources)} sources into {checked.pivot.folder.name}; work in {work}"
            )
            for words in skipped_lines(checked.facts()["pairs"]):
                bars.say(words)
            job = fuse_locally(checked, work, workers=workers, on_event=_teller(bars))
        evals = lay_down(checked, job, out)
    except KeyboardInterrupt:
        say.end("stopped; what is finished is kept. Go on with the same command", 130, "stopped")
    except BlockingIOError:
        say.misuse(f"another fusion is at work in {work}; wait for it, or give another --work")
    seconds = round(time.monotonic() - start, 1)
    console = open_console(to_stderr=wants_json())
    show_evals(evals, console)
    console.print(f"{seconds:.0f} s; {work} keeps the work, remove it when done", markup=False)
    console.print(f"pivot: {out}", markup=False, soft_wrap=True)
    say.done({"pivot": str(out), "evals": evals, "seconds": seconds})


def beside(out: Path, ending: str) -> Path:
    """A name next to `out`, which may itself be "." or end in ".."."""
    whole = out if out.name not in ("", "..") else out.resolve()
    return whole.with_name(whole.name + ending)


def _teller(bars: Screen) -> Any:
    """What the children say, as bars."""

    def tell(kind: str, body: dict[str, Any]) -> None:
        phase = body.get("phase")
        if phase == "extract":
            bars.show(f"{body['source']}: log-probabilities", body["done"], body["total"])
        elif phase == "train":
            note = f"loss {body['loss']:.3f}"
            bars.show(f"fusing: {body['run']}", body["step"], body["steps"], note)
        elif phase == "merge":
            bars.show("merging", body["done"], body["total"], "tensors")
        elif phase == "score":
            bars.say(f"measuring {body['source']}")
        elif phase == "fisher":
            bars.say(f"{body['source']}: Fisher information")
        elif kind == "fused":
            bars.say("fused; measuring")

    return tell


def _check_out(say: _Talk, out: Path, work: Path, inputs: list[Path], *, force: bool) -> None:
    """Refuse before the work what could not be laid down after it, or would destroy something."""
    there, busy = out.resolve(), work.resolve()
    for path in (path.resolve() for path in inputs):
        if there == path or there in path.parents:
            say.misuse(f"--out {out} is or holds {path}, which the fusion reads; give another name")
    if there == busy or there in busy.parents:
        say.misuse(f"--work {work} lies in --out {out}; give it a place beside it")
    for name, path in (("--out", out), ("--work", work)):
        if path.exists() and not path.is_dir():
            say.misuse(f"{name} {path} is a file; give the name of a folder")
    if out.exists() and not force:
        say.misuse(f"{out} exists; give another name, or --force to replace it")
    if out.exists() and any(out.iterdir()) and not (out / "lineage.json").is_file():
        say.misuse(f"{out} is no pivot directory (it has no lineage.json); --force leaves it alone")


class _Talk:
    """Ends the command."""

    def end(self, words: object, status: int, code: str = "") -> NoReturn:
        """Say what ended it."""
        fail(words, status, code=code)

    def misuse(self, words: object) -> NoReturn:
        """Say what was asked wrongly."""
        self.end(words, 2)

    def done(self, values: Mapping[str, Any]) -> None:
        """Give the result."""
        answer(values)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Bad input ends with status 2, a failed child with 1; other errors are ours."""
        from cofuse.local_fusion import LocalFusionError

        try:
            yield
        except LocalFusionError as error:
            if wants_debug():
                raise
            self.end(error, 1)
        except (ValueError, OSError) as error:  # ours are ValueErrors that say what to do
            if wants_debug():
                raise
            self.misuse(error)

    @contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """Show on a terminal that work goes on."""
        from rich.console import Console

        console = Console(stderr=True, quiet=is_quiet())
        if not console.is_terminal:
            yield
            return
        with console.status(words):
            yield
