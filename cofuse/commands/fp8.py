"""`cofuse fp8`: look at what FP8 does to a model, write it in FP8, and see what runs here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from cofuse.commands.connection import answer, fail, say, tell
from cofuse.output import App, is_quiet, wants_json

if TYPE_CHECKING:
    from rich.console import Console

    from fp8.diagnostics import Diagnosis
    from fp8.export import Export

app = App(no_args_is_help=True, help="Inspect and export models in FP8.")
Folder = Annotated[Path, typer.Argument(help="A Hugging Face model directory; FP8 ones too.")]

_WIDE: Final = 100
"""Columns of a terminal from which the whole table fits."""
_MORE: Final = ("scale", "range", "kurtosis")


@app.command()
def inspect(
    model_dir: Folder,
    recipe: Annotated[
        str, typer.Option(help="block, rowwise, current, delayed, mxfp8 or nvfp4.")
    ] = "block",
    text: Annotated[
        Path | None, typer.Option(help="Text to take inputs and gradients from; UTF-8.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .svg or .pdf.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Tensors to list, worst first; 0: all.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 2048,
) -> None:
    """Measure what a recipe would lose in each layer: weights, and with --text all three."""
    refuse = _Refusal()
    if plot is not None:
        _check_plot(plot, refuse)
    console = _console(to_stderr=wants_json())
    with _talking(), refuse.on_bad_input():
        from cofuse.model_folder import load_folder, token_batch
        from fp8.diagnostics import diagnose
        from fp8.recipe import recipe_named

        wanted = recipe_named(recipe)
        model = load_folder(model_dir)
        batch = None if text is None else token_batch(model_dir, text, model, tokens)
        found = diagnose(model, batch, recipe=wanted)
    _show(found, console, rows or None)
    if plot is not None:
        try:
            found.plot(plot)
        except (OSError, ValueError) as error:
            refuse(f"{plot} cannot be written: {error}", 2)
        console.print(f"plot: {plot}", markup=False, soft_wrap=True)
    drawn = None if plot is None else str(plot)
    answer({"model": str(model_dir), "plot": drawn} | found.to_json())


@app.command()
def export(
    model_dir: Folder,
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    bf16: Annotated[bool, typer.Option("--bf16", help="Write bf16 instead of FP8.")] = False,
) -> None:
    """Write a model in the block-FP8 layout of Hugging Face (or in bf16); print the directory."""
    refuse = _Refusal()
    if out.exists():
        refuse(f"{out} exists; give another name, or remove it first", 2)
    with _talking(), refuse.on_bad_input():
        from cofuse.model_folder import TokenizerFiles, load_folder
        from fp8.convert import convert_to_float8_training
        from fp8.export import export_bf16, save_pretrained_fp8

        model, tokenizer = load_folder(model_dir), TokenizerFiles(model_dir)
        if bf16:
            written = export_bf16(model, out, tokenizer)
        else:
            convert_to_float8_training(model)
            written = save_pretrained_fp8(model, out, tokenizer)
    _report(written, bf16=bf16)
    tell(out)
    answer(
        {"path": str(out), "size_bytes": written.size_bytes}
        | {"fp8": list(written.fp8), "kept": dict(written.kept)}
    )


@app.command()
def backends(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
    ] = None,
) -> None:
    """Say which backend would run each recipe on this machine, and why not another."""
    refuse = _Refusal()
    import torch
    from rich.table import Table
    from rich.text import Text

    from fp8.backends.select import available, select
    from fp8.recipe import RECIPES

    try:
        at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        refuse(f"--device {device!r} is no device; wanted cpu or cuda", 2)
    if at.type == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here; wanted cpu", 2)
    chosen = {name: select(make(), 1024, 1024, at)[0].name for name, make in RECIPES.items()}
    refused = {
        name: {backend: why for backend, why in available(make(), at) if why is not None}
        for name, make in RECIPES.items()
    }
    console = _console(to_stderr=wants_json())
    table = Table(title=f"FP8 on {at}, for a layer of 1024 x 1024", title_justify="left")
    for column in ("recipe", "runs on", "why not another"):
        table.add_column(column, overflow="fold")
    for name in RECIPES:
        reasons = "; ".join(f"{backend}: {why}" for backend, why in refused[name].items())
        table.add_row(name, chosen[name], Text(reasons))
    console.print(table)
    recipes = {name: {"backend": chosen[name], "refused": refused[name]} for name in RECIPES}
    answer({"device": str(at), "recipes": recipes})


class _Refusal:
    """Ends the command with a reason."""

    def __call__(self, error: object, status: int) -> NoReturn:
        fail(error, status)

    @contextmanager
    def on_bad_input(self) -> Iterator[None]:
        """Turn what models, texts and recipes are refused with into words and exit status 2."""
        try:
            yield
        except (ValueError, OSError) as error:  # ours are ValueErrors that say what to do
            self(error, 2)


def _check_plot(path: Path, refuse: _Refusal) -> None:
    """Refuse before the work what could not be written after it."""
    if not path.parent.is_dir():
        refuse(f"--plot {path}: there is no folder {path.parent}; make it first", 2)
    if path.is_dir():
        refuse(f"--plot {path} is a folder; give the name of a file", 2)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        refuse(f"--plot {path}: the name must end in .png, .svg or .pdf", 2)


@contextmanager
def _talking() -> Iterator[None]:
    """Show on a terminal that work goes on."""
    from rich.console import Console

    console = Console(stderr=True, quiet=is_quiet())
    if not console.is_terminal:
        yield
        return
    with console.status("loading and measuring"):
        yield


def _console(*, to_stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=to_stderr, highlight=False, width=120)


def _show(found: Diagnosis, console: Console, limit: int | None) -> None:
    """Print the worst tensors, a line for each role, and what to worry about."""
    from rich.table import Table
    from rich.text import Text

    prefix = _common_prefix([row.layer for row in found.rows])
    shown = found.table(limit)
    title = (
        f"{len(shown)} of {len(found.rows)} tensors, the worst first; {found.recipe.name} recipe"
    )
    if prefix:
        title += f"; layers of {prefix.rstrip('.')}"
    console.print(title, markup=False)
    table = Table(pad_edge=False, box=None, header_style="bold")
    wide = console.width >= _WIDE
    columns = [name for name in shown[0] if wide or name not in _MORE]
    for name in columns:
        left = name in ("layer", "role")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in shown:
        row["layer"] = row["layer"].removeprefix(prefix)
        table.add_row(*(Text(row[name]) for name in columns))
    console.print(table)
    console.print()
    for line in _summary(found):
        console.print(line, markup=False)
    for warning in found.warnings():
        console.print(f"warning: {warning}", markup=False)
    if not found.warnings():
        console.print("no warnings", markup=False)
    for remark in found.remarks:
        console.print(f"note: {remark}", markup=False)


def _summary(found: Diagnosis) -> Iterator[str]:
    for role in dict.fromkeys(row.role for row in found.rows):
        rows = [row for row in found.rows if row.role == role and not row.nonfinite]
        if rows:
            yield (
                f"{role}: {len(rows)} layers, SQNR {min(r.sqnr_db for r in rows):.1f} dB at worst, "
                f"{median(r.sqnr_db for r in rows):.1f} in the middle; at most "
                f"{max(r.underflow for r in rows):.2%} lost to zero, "
                f"{max(r.saturation for r in rows):.2%} clipped"
            )


def _common_prefix(names: list[str]) -> str:
    """Return what all names begin with, up to a dot."""
    shortest, longest = min(names), max(names)
    same = 0
    while same < min(len(shortest), len(longest)) and shortest[same] == longest[same]:
        same += 1
    return shortest[: shortest.rfind(".", 0, same) + 1]


def _report(written: Export, *, bf16: bool) -> None:
    say(f"{written.size_bytes / 1e6:,.1f} MB, {len(written.fp8)} layers in FP8")
    reasons: dict[str, list[str]] = {}
    for name, reason in written.kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in () if bf16 else reasons.items():
        others = f" and {len(names) - 1} more" if names[1:] else ""
        say(f"not FP8: {names[0]}{others}: {reason}")
