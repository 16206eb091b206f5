"""`cofuse participant`: what an institution does."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import Json, fail

app = typer.Typer(no_args_is_help=True, help="Run an institution's participant.")
Home = Annotated[Path, typer.Argument(help="The participant's folder.")]

_POLICY = """\
# What may leave this institution. Everything is off until you say otherwise.
ship_logits = false     # top-K log-probabilities of the expert on public prompts
grow_experts = false    # ... of a copy of a received pivot that was trained on our text
ship_scores = false     # the expert's own scores, a few numbers
ship_weights = false    # weights of a copy of the pivot trained here; they tell more than logits
max_top_k = 16
max_positions_per_round = 200000
submitters = []         # researchers whose rounds we join; empty: all
"""


@app.command()
def init(
    home: Home,
    name: Annotated[str, typer.Option(help="As the operator knows you.")],
    coordinator: Annotated[str, typer.Option(help="host:port")],
    corpus: Annotated[Path, typer.Option(help='JSON lines of {"text": ...}; stays here.')],
) -> None:
    """Make the key (it never leaves), a signing request, participant.toml and policy.toml."""
    from participant.corpus import CorpusError, read_corpus
    from protos.config import toml_text
    from trust.ca import IdentityError, new_identity

    try:
        documents = read_corpus(corpus)
        new_identity(home, "participant", name)
    except (CorpusError, IdentityError, FileExistsError) as error:
        fail(error, 2)
    settings = {
        "name": name,
        "coordinator": coordinator,
        "corpus": str(corpus.resolve()),
        "data_dir": "data",
        "policy": "policy.toml",
        "model": {
            "architecture": "llama",
            "hidden_size": 256,
            "layers": 6,
            "heads": 8,
            "vocab_size": 8192,
        },
        "training": {"steps": 1000, "decay_steps": 300},
        "tls": {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"},
    }
    (home / "participant.toml").write_text(toml_text(settings), encoding="utf-8")
    (home / "policy.toml").write_text(_POLICY, encoding="utf-8")
    typer.echo(f"{len(documents)} documents found; none of them leaves", err=True)
    typer.echo(
        f"send {home / 'request.csr'} to the operator; put what comes back here as", err=True
    )
    typer.echo(
        "certificate.pem and ca.pem; read policy.toml: nothing leaves until you allow it", err=True
    )
    typer.echo(f"then start with: cofuse participant up {home}", err=True)


@app.command()
def up(home: Home) -> None:
    """Train and serve rounds until Ctrl-C. Started again, it goes on where it was."""
    from participant.daemon import main

    raise typer.Exit(main([str(home / "participant.toml")]))


@app.command()
def egress(home: Home, as_json: Json = False) -> None:
    """List everything that ever left."""
    from participant.config import load_config
    from participant.egress import EgressLog
    from protos.config import ConfigError

    try:
        log = EgressLog(load_config(home / "participant.toml").data_dir / "egress.jsonl")
    except ConfigError as error:
        fail(error, 2)
    for line in log.lines():
        typer.echo(
            f"{line['time_unix_ms']}  {line['round']:<8} {line['what']:<8} "
            f"{line['size_bytes']:>12,} bytes  {line['sha256'][:16]}",
            err=as_json,
        )
    typer.echo(f"{log.total_bytes():,} bytes in all", err=True)
    if as_json:
        typer.echo(json.dumps({"total_bytes": log.total_bytes(), "releases": log.lines()}))
