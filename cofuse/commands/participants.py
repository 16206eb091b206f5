"""`cofuse participant`: what an institution does."""

from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.audit import egress
from cofuse.commands.connection import answer, fail, tell
from cofuse.commands.pages import page
from cofuse.output import App

app = App(no_args_is_help=True, help="Run an institution's participant.")
app.command()(egress)
app.command()(page)
Home = Annotated[Path, typer.Argument(help="The participant's folder.")]

_POLICY = """\
# What may leave this institution. What no rule below allows, is refused.
# The file is read anew for each round; one that cannot be read allows nothing.
version = 2

# One [[allow]] for each purpose you agree to. A round must fit exactly one of them.
[[allow]]
purpose = "general"      # as the round says it; "*": any
submitters = ["*"]       # researchers by name; "*": all whom the coordinator lets in
kinds = []               # what may leave; nothing until you name some of
                         #   "logits"   top-K log-probabilities of the expert on public prompts
                         #   "scores"   the expert's own scores, a few numbers
                         #   "grown"    as logits, of a received pivot that read our text first
                         #   "weights"  of a pivot trained here; they tell more than logits
prompt_sets = ["*"]      # public texts that may be asked about: "sha256:..."; "*": any
approval = "manual"      # each release waits for `cofuse approve`; "auto": none does
# not_after = 2027-12-31 # the last day on which this rule holds, UTC

[logits]
k_max = 16                   # log-probabilities per position
positions_per_round = 200000 # a position is one token of public text
positions_per_30d = 2000000  # over all rounds of thirty days
releases_per_prompt = 4      # rounds that may ever ask about one prompt set

[weights]
enabled = false          # weights need this as well as a rule

[prompts]                # "block", "warn" or "off", when a prompt set
overlap = "block"        #   shares thirteen words in a row with our text
phi = "block"            #   holds what looks like a person's data

[gates]                  # "block", "warn" or "off", when a release tells
canaries = "block"       #   of the invented records planted in our text
"""


@app.command()
def init(
    home: Home,
    name: Annotated[str, typer.Option(help="As the operator knows you.")],
    coordinator: Annotated[str, typer.Option(help="host:port")],
    corpus: Annotated[Path, typer.Option(help='JSON lines of {"text": ...}; stays here.')],
) -> None:
    """Make the key (it never leaves), a signing request, participant.toml and policy.toml."""
    from participant.config import ParticipantConfig
    from participant.corpus import CorpusError, read_corpus
    from protos.config import ConfigError, checked, toml_text
    from trust.ca import IdentityError, new_identity
    from trust.identity import checked_name

    settings = {
        "name": name,
        "coordinator": coordinator,
        "corpus": str(corpus.resolve()),
        "data_dir": "data",
        "policy": "policy.toml",
        "canaries": True,
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
    joined = (home / "certificate.pem").exists() and not (home / "participant.toml").exists()
    try:  # before the key is made: a folder half made would have to be removed by hand
        checked_name(name)
        checked(home / "participant.toml", settings, ParticipantConfig)
        documents = read_corpus(corpus)
        if joined:  # with a token, before this: the key is there and certified
            _must_be(home, name)
        else:
            new_identity(home, "participant", name)
    except (ConfigError, CorpusError, IdentityError, FileExistsError) as error:
        fail(error, 2)
    (home / "participant.toml").write_text(toml_text(settings), encoding="utf-8")
    (home / "policy.toml").write_text(_POLICY, encoding="utf-8")
    typer.echo(f"{len(documents)} documents found; none of them leaves", err=True)
    if not joined:
        typer.echo(
            f"join with the operator's token: cofuse join HOST:PORT TOKEN {home}; or send\n"
            f"{home / 'request.csr'} to the operator, and put what comes back here as\n"
            "certificate.pem, ca.pem, pivot-signer.pem and fusion-worker.pem",
            err=True,
        )
    typer.echo("read policy.toml: nothing leaves until you allow it", err=True)
    typer.echo(f"then start with: cofuse participant up {home}", err=True)
    answer({"folder": str(home), "documents": len(documents), "joined": joined})


def _must_be(home: Path, name: str) -> None:
    """Raise IdentityError unless the certificate in `home` is the participant's."""
    from trust.identity import Identity, IdentityError, leaf_of

    wanted = Identity("participant", name)
    if (found := leaf_of((home / "certificate.pem").read_bytes()).identity) != wanted:
        raise IdentityError(
            f"{home / 'certificate.pem'}: found {found.uri}, wanted {wanted.uri}: say the name "
            "that the token was for, or choose another folder"
        )


@app.command()
def up(home: Home) -> None:
    """Train and serve rounds until Ctrl-C. Started again, it goes on where it was."""
    from participant.daemon import main

    raise typer.Exit(main([str(home / "participant.toml")]))


@app.command()
def pause(home: Home) -> None:
    """Let no work be begun, and what runs stop at its next step, until `resume`."""
    from participant.durable import write_durably
    from participant.status import PAUSED

    data = _data_dir(home)
    data.mkdir(parents=True, exist_ok=True)
    write_durably(data / PAUSED, "")
    typer.echo(f"paused; go on with: cofuse participant resume {home}", err=True)
    answer({"paused": True})


@app.command()
def resume(home: Home) -> None:
    """Let work go on where `pause` stopped it."""
    from participant.status import PAUSED

    (_data_dir(home) / PAUSED).unlink(missing_ok=True)
    typer.echo("resumed", err=True)
    answer({"paused": False})


@app.command()
def status(home: Home) -> None:
    """Tell what the daemon is doing, what it waits for, and how the expert is."""
    from participant.status import PAUSED, read_status

    data = _data_dir(home)
    found = read_status(data)
    if found is None:
        paused = "; it is paused" if (data / PAUSED).exists() else ""
        words = f"no daemon runs on {home}{paused}; start it with: cofuse participant up {home}"
        fail(words, code="not_running", data={"paused": bool(paused)})
    for key, value in found.items():
        if value not in ("", None, []):
            tell(f"{key:<16} {value}")
    answer(found)


def _data_dir(home: Path) -> Path:
    from participant.config import load_config
    from protos.config import ConfigError

    try:
        return load_config(home / "participant.toml").data_dir
    except ConfigError as error:
        fail(error, 2)
