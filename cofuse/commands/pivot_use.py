"""`cofuse pivot card | chat | serve | export | upload`: what one does with a pivot's folder."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands.connection import answer, fail, say, tell
from cofuse.output import wants_json

if TYPE_CHECKING:
    from cofuse.pivot_chat import Talk

Folder = Annotated[
    Path,
    typer.Argument(metavar="PIVOT", help="Folder of a pivot, as `cofuse pivot pull` makes it."),
]


def card(folder: Folder) -> None:
    """Print a pivot's card: numbers, lineage, credit, privacy, limits."""
    path = folder / "README.md"
    if not path.is_file():
        fail(f"{folder}: found no README.md, wanted a pivot's folder", 2)
    text = path.read_text(encoding="utf-8")
    tell(text.rstrip("\n"))
    answer({"card": text})


def chat(
    folder: Folder,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Say this, print the answer, and end; several: each begins anew."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk with a pivot, a line at a time; without a chat template it writes on from each line."""
    if wants_json() and not ask:
        fail("--json answers one question: give it with --ask", 2)
    if not folder.is_dir():
        fail(f"{folder}: no such folder; `cofuse pivot pull` makes one", 2)
    from cofuse.model_folder import FolderError
    from cofuse.pivot_chat import Talk, Voice

    voice = Voice(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    try:
        talk = Talk(folder, voice)
        if not ask:
            return _converse(talk)
        said = []
        for words in ask:
            said.append({"asked": words, "answer": talk.answer(words, streamed=not wants_json())})
            talk.begin_anew()
    except FolderError as error:
        fail(error, 2)
    answer({"answer": said[0]["answer"], "answers": said, "chat_template": talk.chats})
    return None


def _converse(talk: "Talk") -> None:
    how = "it remembers what was said" if talk.chats else "no chat template: it writes on from it"
    say(f"A line, then Enter; {how}. Ctrl-D ends.")
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            if line.strip():
                talk.answer(line.rstrip("\n"), streamed=True)


def serve(
    folder: Folder,
    host: Annotated[
        str, typer.Option(help="Who else may ask: it knows no passwords.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    show: Annotated[
        bool, typer.Option("--print", help="Print the commands, and run none.")
    ] = False,
) -> None:
    """Serve a pivot by the OpenAI API with `transformers serve`; print the vLLM line as well."""
    from cofuse.pivot_serving import missing, transformers_server, vllm_line

    if not (folder / "config.json").is_file():
        fail(f"{folder}: found no config.json, wanted a pivot's folder", 2)
    if _tokenizer(folder) != "AutoTokenizer":
        fail(
            f"{folder}: servers open its tokenizer by the rules of the architecture's maker and "
            "split texts otherwise; use `cofuse pivot chat`, or export it with --gguf"
        )
    with tempfile.TemporaryDirectory() as cache:
        server = transformers_server(folder, host, port, Path(cache))
        typer.echo(shlex.join(server.command), err=not show)
        typer.echo(vllm_line(folder), err=not show)
        if show:
            return
        if lacks := missing():
            fail(f"{', '.join(lacks)} not installed: pip install 'transformers[serving]'")
        if not (folder / "chat_template.jinja").exists():
            say("no chat template: ask /v1/completions, not /v1/chat/completions")
        with suppress(KeyboardInterrupt):
            code = subprocess.run(server.program, env=server.environment, check=False).returncode
            raise typer.Exit(1 if code else 0)


def _tokenizer(folder: Path) -> str:
    """The class that reads its tokenizer as it is; of what no lineage tells, the usual one."""
    path = folder / "lineage.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(told.get("model", {}).get("tokenizer", "AutoTokenizer"))


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="The file to make.")],
    gguf: Annotated[bool, typer.Option("--gguf", help="One file for llama.cpp, Ollama.")] = False,
    int4: Annotated[
        bool, typer.Option("--int4", help="GGUF with four bits a weight, for small devices.")
    ] = False,
) -> None:
    """Write a pivot in another format; refused where it would answer otherwise there."""
    if not (gguf or int4):
        fail("give a format: --gguf, or --int4 (GGUF with four bits a weight)", 2)
    if out.exists() or not out.absolute().parent.is_dir():
        fail(f"{out} exists, or has no folder to lie in: give another --out", 2)
    from cofuse.demo.screen import screen
    from cofuse.gguf_export import export_gguf
    from cofuse.gguf_tokenizer import GgufError
    from fp8.block_layout import ExportError
    from fusion.merge_settings import MergeError

    try:
        with screen() as bars:
            export_gguf(
                folder,
                out,
                int4=int4,
                on_progress=lambda done, total: bars.show("writing", done, total, "tensors"),
            )
    except (GgufError, MergeError, ExportError, OSError) as error:
        out.with_name(out.name + ".partial").unlink(missing_ok=True)
        fail(error)
    tell(out)
    answer({"file": str(out), "bytes": out.stat().st_size, "int4": int4})


def upload(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see.")] = False,
) -> None:
    """Put a pivot on the Hugging Face Hub: private unless told otherwise, and never by itself.

    Needs a token (HF_TOKEN, or `hf auth login`). Ask the participants first: it cannot be undone
    for whoever has copied it.
    """
    if not (folder / "SHA256SUMS").is_file():
        fail(f"{folder}: found no SHA256SUMS, wanted a pivot's folder as it was pulled", 2)
    from cofuse.pivot_upload import UploadError, upload_pivot

    try:
        address = upload_pivot(folder, repository, token=os.environ.get("HF_TOKEN"), public=public)
    except UploadError as error:
        fail(error)
    tell(address)
    answer({"address": address, "public": public})
