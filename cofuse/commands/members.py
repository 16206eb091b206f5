"""`cofuse coordinator invite | revoke` and `cofuse join`: who is here, and who no more."""

import contextlib
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cofuse.commands.connection import At, Home, Identity, answer, fail, say, tell

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.database import Database
    from trust.tokens import Token

_TTL: Final = re.compile(r"([1-9][0-9]{0,4})(m|h|d)")
_LONGEST_S: Final = 30 * 86_400
_UNIT_S: Final = {"m": 60, "h": 3600, "d": 86_400}
_COORDINATOR_PORT: Final = 7443
"""Where a coordinator listens unless its coordinator.toml says otherwise."""
_SERIAL: Final = re.compile(r"[0-9]{1,49}|0x[0-9A-Fa-f]{1,40}")


def invite(
    home: Home,
    role: Annotated[str, typer.Option(help="participant, researcher or operator.")],
    name: Annotated[str, typer.Option(help="The name you mean to admit.")],
    ttl: Annotated[str, typer.Option(help="How long it is good: 30m, 1h, 2d.")] = "1h",
) -> None:
    """Print a token that becomes one certificate, once, with `cofuse join`.

    Hand it over as you would a password. The coordinator may serve meanwhile.
    """
    from coordinator.invitations import Invitations, join_words
    from trust.identity import IdentityError, checked_identity, fingerprint

    match = _TTL.fullmatch(ttl)
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_S:
        fail(f"--ttl: found {ttl!r}, wanted a number and m, h or d, such as 1h; at most 30d", 2)
    if role == "coordinator":
        fail("--role: found 'coordinator', wanted participant, researcher or operator", 2)
    with opened(home) as (config, database):
        if config.enroll_listen is None:
            fail(
                f"{home / 'coordinator.toml'}: found no enroll_listen, wanted host:port where "
                "tokens are redeemed: set it, and authority, and start the coordinator again",
                2,
            )
        try:
            identity = checked_identity(role, name)
            authority = fingerprint(config.tls.ca.read_bytes())
        except IdentityError as error:
            fail(error, 2)
        enroll = config.reached_at(config.enroll_listen)
        words = join_words(config, role, "TOKEN")
        token = Invitations(database).invite(identity, authority, seconds)
    say(f"good for {ttl}, once: {words}")
    tell(str(token))
    answer({"token": str(token), "enroll": enroll, "ttl_s": seconds})


def join(
    address: Annotated[str, typer.Argument(help="host:port of the coordinator's enrolment.")],
    token: Annotated[
        str, typer.Argument(help="What the operator gave you; - reads it from stdin.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where the key is, or is made; it stays there.")],
    corpus: Annotated[
        Path | None,
        typer.Option(
            help='A participant\'s JSON lines of {"text": ...}, which stay here: FOLDER becomes '
            "one that `cofuse up FOLDER` starts."
        ),
    ] = None,
    coordinator: Annotated[
        str, typer.Option(help="With --corpus: host:port.  [port 7443 of ADDRESS's host]")
    ] = "",
) -> None:
    """Turn a token into an identity: key.pem, certificate.pem and ca.pem in FOLDER.

    FOLDER may be what `cofuse participant init` or `cofuse identity` made. Repeating it is safe.
    """
    from cofuse.joining import join as redeem
    from cofuse.participant_home import first_settings, lay_out
    from participant.corpus import CorpusError
    from protos.config import ConfigError, checked_address
    from trust.identity import IdentityError
    from trust.tokens import parse_token

    try:
        checked_address(address)
    except ValueError as error:
        fail(str(error), 2)
    try:
        parsed = parse_token(sys.stdin.readline() if token == "-" else token)  # noqa: S105
        hub = coordinator or f"{address.rpartition(':')[0]}:{_COORDINATOR_PORT}"
        if corpus is not None:  # all that may be wrong comes before the token is spent
            documents = _corpus_of(parsed, corpus, folder)
            settings = first_settings(folder, parsed.identity.name, hub, corpus)
        redeem(address, parsed, folder)
    except (ConfigError, CorpusError, IdentityError, FileExistsError, FileNotFoundError) as error:
        fail(error, 2)
    say(f"{parsed.identity.uri}: certificate in {folder}")
    if corpus is not None:
        lay_out(folder, settings)
        say(f"{documents} documents found; none of them leaves")
        say(f"read {folder / 'policy.toml'}: nothing leaves until you allow it")
        say(f"then start with: cofuse up {folder}")
    answer({"identity": parsed.identity.uri, "folder": str(folder)})


def _corpus_of(token: "Token", corpus: Path, folder: Path) -> int:
    """How many documents a participant's text has.

    Raises: IdentityError, CorpusError; FileExistsError when the folder is laid out already.
    """
    from participant.corpus import read_corpus
    from trust.identity import IdentityError

    if token.identity.role != "participant":
        raise IdentityError(
            f"found --corpus with a token for {token.identity.uri}, wanted a participant's: leave "
            "--corpus out"
        )
    if (folder / "participant.toml").exists():
        raise FileExistsError(f"{folder / 'participant.toml'} is there: leave --corpus out")
    return len(read_corpus(corpus))


def renew(at: At, identity: Identity) -> None:
    """Replace certificate.pem by one that lasts longer, for the same key.

    A participant's daemon does it by itself, at half of the certificate's life.
    """
    import grpc

    from participant.renewal import renew as ask
    from protos.errors import CofuseError
    from protos.tls import TlsFiles, reason
    from trust.identity import IdentityError

    ca, certificate, key = (identity / f"{name}.pem" for name in ("ca", "certificate", "key"))
    try:
        renewed = ask(at, TlsFiles(ca=ca, certificate=certificate, key=key))
    except (IdentityError, OSError) as error:
        fail(error, 2)
    except grpc.RpcError as error:
        fail(CofuseError("unreachable", f"{at} not reached: {reason(error.details())}"))
    ends = datetime.fromtimestamp(renewed.ends_unix_s, UTC)
    say(f"{renewed.identity.uri}: good to {ends:%Y-%m-%d %H:%M} UTC")
    answer({"identity": renewed.identity.uri, "ends_unix_s": renewed.ends_unix_s})


def revoke(
    home: Home,
    name: Annotated[
        str, typer.Option(help="ROLE/NAME: every certificate made for it up to now.")
    ] = "",
    serial: Annotated[
        str, typer.Option(help="One certificate: decimal, or 0x and hexadecimal.")
    ] = "",
    why: Annotated[str, typer.Option(help="Kept with it.")] = "",
) -> None:
    """Let certificates count no more, for ever. Open connections end within ten seconds.

    The coordinator may serve meanwhile. To admit the same name again, invite it anew.
    """
    from coordinator.revocations import Revocations
    from trust.identity import IdentityError, checked_identity

    if bool(name) == bool(serial):
        fail("found none or both of --name and --serial, wanted one of them", 2)
    if serial and not _SERIAL.fullmatch(serial):
        fail(f"--serial: found {serial!r}, wanted decimal digits, or 0x and hexadecimal ones", 2)
    with opened(home) as (_, database):
        revocations = Revocations(database)
        if name:
            role, _, rest = name.partition("/")
            try:
                revocations.revoke_all_of(checked_identity(role, rest), why)
            except IdentityError as error:
                fail(f"--name: {error}; give it as participant/NAME", 2)
        else:
            revocations.revoke_one(int(serial, 16 if serial.startswith("0x") else 10), why)
    say(f"revoked {name or serial}; a coordinator that runs ends its calls")
    answer({"revoked": name or serial})


@contextlib.contextmanager
def opened(home: Path) -> Iterator[tuple["CoordinatorConfig", "Database"]]:
    """A coordinator's configuration and database; their errors become words."""
    from coordinator.config import load_config
    from coordinator.store import Store
    from coordinator.store_errors import StoreError
    from protos.config import ConfigError
    from protos.errors import CofuseError

    try:
        config = load_config(home / "coordinator.toml")
        config.data_dir.mkdir(parents=True, exist_ok=True)
        store = Store(config.store_url(), backups=config.data_dir)
        try:
            yield config, store.database
        finally:
            store.close()
    except (ConfigError, StoreError, CofuseError, OSError) as error:
        fail(error, 2)
