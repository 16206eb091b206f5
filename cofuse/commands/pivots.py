"""`cofuse pivot`: the shared model, version by version, and what it writes by itself."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands import pivot_use
from cofuse.commands.connection import At, Identity, answer, connected, fail, say, tell
from cofuse.output import App

if TYPE_CHECKING:
    from cofuse.sdk import Pivot
    from trust.pivot_manifest import Manifest

app = App(
    no_args_is_help=True, help="List, pull, push and undo pivots; read, ask, serve and export one."
)
PivotName = Annotated[str, typer.Argument(help='"pivot-0", "pivot-1", ...')]


@app.command(name="ls")
def list_pivots(at: At, identity: Identity) -> None:
    """List all pivots, oldest first."""
    with connected(at, identity) as coordinator:
        pivots = coordinator.pivots()
    for pivot in pivots:
        more = f", waits for {pivot.waits_for} more to promote it" if pivot.waits_for else ""
        tell(f"{pivot.name:<10} {origin(pivot)}{more}")
    rows = [
        {"name": p.name, "parent": p.parent, "round": p.round_id, "waits_for": p.waits_for}
        for p in pivots
    ]
    answer({"pivots": rows})


def origin(pivot: "Pivot") -> str:
    """Where a pivot is from, in words."""
    if not pivot.parent:
        return "imported"
    if not pivot.round_id:
        return f"rolled back to, instead of {pivot.parent}"
    return f"from {pivot.parent} in {pivot.round_id}"


@app.command()
def pull(
    name: PivotName,
    at: At,
    identity: Identity,
    out: Annotated[Path | None, typer.Option(help="Folder; default: the pivot's name.")] = None,
    older: Annotated[
        bool, typer.Option("--older", help="I mean this version, though I have had a later one.")
    ] = False,
) -> None:
    """Download a pivot, if all of it is what the coordinator signed; print the folder.

    Signature, version, expiry and every file's digest are checked before anything reads a file; a
    pivot that was in the folder stays when the new one is refused.
    """
    with connected(at, identity) as coordinator:
        folder = coordinator.download_pivot(name, out or Path(name), older=older)
    tell(folder)
    answer({"pivot": name, "folder": str(folder)})


@app.command()
def lineage(name: PivotName, at: At, identity: Identity) -> None:
    """Show what a pivot was made from, back to the first one, each signature checked."""
    with connected(at, identity) as coordinator:
        line = coordinator.lineage(name)
    for depth, manifest in enumerate(reversed(line)):
        lead = "   " * (depth - 1) + "`- " if depth else ""
        for text in _told(manifest):
            tell(lead + text)
            lead = "   " * depth
    rows = [{**m.model_dump(mode="json"), "content": m.content_sha256} for m in line]
    answer({"lineage": rows})


@app.command()
def rollback(name: PivotName, at: At, identity: Identity) -> None:
    """Publish what a pivot was made from once more, as the newest (operators); print its name."""
    with connected(at, identity) as coordinator:
        made = coordinator.roll_back_pivot(name)
    tell(made.name)
    answer({"pivot": made.name, "instead_of": name})


@app.command()
def promote(
    name: PivotName,
    at: At,
    identity: Identity,
    content: Annotated[
        str, typer.Option(help="Begin of the content's sha256 that you looked at.  [as it is]")
    ] = "",
) -> None:
    """Say yes to a pivot that waits for it (operators); where two are needed, each of them does.

    The yes is signed with your certificate's key and counts for exactly this content: signature and
    digests are checked first. Until then no round starts from it and only operators can pull it.
    """
    with connected(at, identity) as coordinator:
        manifest = coordinator.manifest(name)
        for line in _told(manifest):
            say(line)
        if not manifest.content_sha256.startswith(content):
            words = f"{name} has content {manifest.content_sha256}, wanted {content}: not promoted"
            fail(words, code="other_content")
        made = coordinator.promote_pivot(name, manifest.content_sha256)
    left = f"waits for {made.waits_for} more" if made.waits_for else "may be used"
    tell(f"{name} {left}")
    answer({"pivot": name, "promoted_by": list(made.promoted_by), "waits_for": made.waits_for})


def _told(manifest: "Manifest") -> list[str]:
    """The lines of one pivot in a lineage: itself, its scores, and what went into it."""
    origin = f" in {manifest.round_id}" if manifest.round_id else ""
    again = f", the files of {manifest.restores} again" if manifest.restores else ""
    head = f"{manifest.name}  {manifest.created}  {manifest.method}{origin}{again}"
    inputs = [
        f"  + {part.participant}  {part.size_bytes:,} bytes  sha256 {part.sha256[:16]}"
        for part in manifest.inputs
    ]
    return [head, f"  content {manifest.content_sha256[:16]}, until {manifest.expires}", *inputs]


@app.command()
def evals(name: PivotName, at: At, identity: Identity) -> None:
    """Print a pivot's evaluations as JSON."""
    with connected(at, identity) as coordinator:
        found = coordinator.pivot(name).evals
    tell(json.dumps(found))
    answer({"pivot": name, "evals": found})


@app.command()
def push(
    name: PivotName,
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model directory.")],
    at: At,
    identity: Identity,
) -> None:
    """Import a model directory as the first pivot of a lineage (operators)."""
    if not (folder / "model.safetensors").exists():
        fail(f"{folder}: found no model.safetensors, wanted a Hugging Face model directory", 2)
    with connected(at, identity) as coordinator:
        made = coordinator.import_pivot(name, folder).name
    tell(made)
    answer({"pivot": made})


@app.command()
def complete(  # noqa: PLR0913 - one option each
    folder: Annotated[Path, typer.Argument(help="The pivot: a local Hugging Face directory.")],
    prompts: Annotated[Path, typer.Argument(help="Public prompt set (JSON lines) to open from.")],
    out: Annotated[Path, typer.Option(help="The prompt set to make.")],
    count: Annotated[int, typer.Option(min=1, help="Texts to write.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same texts.")] = 0,
    opening: Annotated[
        tuple[float, float],
        typer.Option(help="Share of a document that is kept: least and most, in [0, 1]."),
    ] = (0.1, 0.5),
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from tokens holding this much.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to add at most.  [the context's rest]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 64,
    with_public: Annotated[
        bool, typer.Option(help="Put the public documents themselves first.")
    ] = False,
) -> None:
    """Let a pivot complete public documents: the prompt set of an on-policy round. Print it.

    The experts then judge what the pivot itself writes. Start a round with the file as its
    prompts.
    """
    if out.exists():
        fail(f"{out} exists; give another name with --out", 2)
    if not out.absolute().parent.is_dir():
        fail(f"{out.absolute().parent} is no folder; make it first", 2)
    try:
        from protos.public_sets import Prompt, read_prompts, write_prompts

        documents = read_prompts(prompts)
        if not (folder / "tokenizer.json").is_file():
            fail(f"{folder}: found no tokenizer.json, wanted a local pivot with its tokenizer", 2)
        from transformers import PreTrainedTokenizerFast

        from cofuse.demo.screen import screen
        from cofuse.model_folder import load_folder
        from fusion.generate import on_policy_prompts

        with screen() as bars:
            bars.say(f"loading {folder}")
            pivot = load_folder(folder).float()
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            texts = on_policy_prompts(
                pivot,
                tokenizer,
                documents,
                share_of_document=opening,
                count=count,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                batch_size=batch_size,
                on_progress=lambda done, total: bars.show("writing", done, total, "tokens"),
            )
        own = [Prompt(text=text, written=True) for text in texts]
        write_prompts(out, [*(documents if with_public else []), *own])
    except (ValueError, OSError) as error:  # ours are ValueErrors that say what to do
        fail(error, 2)
    tell(out)
    size = sum(len(text.encode()) for text in texts)
    answer({"prompts": str(out), "documents": len(texts), "bytes": size})


for _command in (
    *(pivot_use.card, pivot_use.chat, pivot_use.serve, pivot_use.export, pivot_use.upload),
):
    app.command()(_command)
