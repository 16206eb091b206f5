"""What may go wrong at the command line: an id, an exit status and a remedy for each.

Errors of the wire are in protos/errors.py; those below never travel. docs/errors.md lists both.
Nothing heavy is imported before something has gone wrong.
"""

from dataclasses import dataclass
from typing import Final

DONE, ENDED_BADLY, MISUSE, TIMED_OUT, UNREACHABLE, REFUSED, STOPPED = 0, 1, 2, 3, 4, 5, 130
EXITS: Final = {
    DONE: "done",
    ENDED_BADLY: "it ended badly, or something does not hold",
    MISUSE: "wrong usage, or a file or name that cannot be used",
    TIMED_OUT: "waited as long as was asked",
    UNREACHABLE: "not reachable, or not allowed",
    REFUSED: "refused by a participant's policy",
    STOPPED: "stopped by Ctrl-C",
}
EXIT_OF_STATUS: Final = {
    "INVALID_ARGUMENT": MISUSE,
    "NOT_FOUND": MISUSE,
    "PERMISSION_DENIED": UNREACHABLE,
    "UNAUTHENTICATED": UNREACHABLE,
    "UNAVAILABLE": UNREACHABLE,
    "DEADLINE_EXCEEDED": UNREACHABLE,
}
"""By the gRPC status of an error of the wire; others: ENDED_BADLY."""


@dataclass(frozen=True, slots=True)
class Known:
    """One error of the command line."""

    exit: int
    do: str


LOCAL: Final[dict[str, Known]] = {
    "usage": Known(MISUSE, "the same command with --help says what it takes"),
    "bad_input": Known(MISUSE, "correct what the message names, and say it again"),
    "bad_config": Known(MISUSE, "correct the key; `cofuse schema` describes every one"),
    "bad_file": Known(MISUSE, "check the path, and that you may read and write there"),
    "already_there": Known(MISUSE, "keep what is there, or choose another folder"),
    "bad_public_set": Known(MISUSE, "correct the line; examples/README.md shows both files"),
    "bad_text": Known(MISUSE, "correct the file of texts; docs/participant.md shows its form"),
    "bad_identity": Known(MISUSE, "correct the role or the name, or choose another folder"),
    "bad_key": Known(MISUSE, "put the key file back as it was made, from your safe copy"),
    "bad_manifest": Known(MISUSE, "take the pivot from the coordinator again: cofuse pivot pull"),
    "bad_lock": Known(MISUSE, "make it again with: cofuse round lock"),
    "no_connection": Known(MISUSE, "say once: cofuse login HOST:PORT FOLDER; or give both options"),
    "no_folder": Known(MISUSE, "name the folder, or run the command inside it"),
    "not_decided": Known(ENDED_BADLY, "cofuse approve FOLDER lists what waits, and how it stands"),
    "store_unusable": Known(MISUSE, "see docs/operator.md, Check and back up"),
    "not_running": Known(ENDED_BADLY, "start it with: cofuse up FOLDER"),
    "running": Known(ENDED_BADLY, "stop it first, then say this again"),
    "not_published": Known(ENDED_BADLY, "cofuse why ROUND says what ended it, and what helps"),
    "not_as_promised": Known(ENDED_BADLY, "do what the findings say, the first one first"),
    "demo_failed": Known(ENDED_BADLY, "look into the folder of --out, and say it again"),
    "wall_broken": Known(ENDED_BADLY, "stop the daemon; docs/participant.md says what walls need"),
    "audit_broken": Known(ENDED_BADLY, "keep a copy as evidence, and compare it with the anchors"),
    "bad_folder": Known(MISUSE, "give a model's folder; `cofuse pivot pull` makes a pivot's"),
    "not_exportable": Known(ENDED_BADLY, "use the folder as it is, with transformers or vLLM"),
    "not_uploaded": Known(ENDED_BADLY, "do what the message says; nothing has been sent"),
    "not_withdrawn": Known(ENDED_BADLY, "say it again with --pivot, as the message shows"),
    "fusion_failed": Known(ENDED_BADLY, "the message names the run; --debug shows where"),
    "wait_timed_out": Known(TIMED_OUT, "the round goes on; watch it again, or give it longer"),
    "policy_refused": Known(REFUSED, "change what the round asks, or ask who owns the policy"),
    "stopped": Known(STOPPED, "say the same again; what was finished is kept"),
    "failed": Known(ENDED_BADLY, "the lines above say why"),
    "fault": Known(ENDED_BADLY, "run it again with --debug, and report what it prints"),
}
OF_CLASS: Final = {
    "SpecError": "bad_spec",
    "NoConfigError": "no_folder",
    "ConfigError": "bad_config",
    "PublicSetError": "bad_public_set",
    "CorpusError": "bad_text",
    "IdentityError": "bad_identity",
    "KeyFileError": "bad_key",
    "ManifestError": "bad_manifest",
    "LockError": "bad_lock",
    "ApprovalError": "not_decided",
    "StoreError": "store_unusable",
    "AuditError": "audit_broken",
    "PolicyRefusalError": "policy_refused",
    "LocalFusionError": "fusion_failed",
    "FolderError": "bad_folder",
    "GgufError": "not_exportable",
    "ExportError": "not_exportable",
    "UploadError": "not_uploaded",
    "DemoError": "demo_failed",
    "FederationError": "demo_failed",
    "MissingSourceError": "demo_failed",
    "RoundFailedError": "not_published",
    "WaitTimedOutError": "wait_timed_out",
    "FileExistsError": "already_there",
    "OSError": "bad_file",
}
"""Errors that carry no id of their own, by the name of their class or one that it derives from."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a program is told."""

    code: str
    message: str
    hint: str
    exit: int

    def as_json(self) -> dict[str, str]:
        """The `error` of the envelope."""
        docs = f"docs/errors.md#{self.code}"
        return {"code": self.code, "message": self.message, "hint": self.hint, "docs": docs}


def failure_of(error: object, *, code: str = "", status: int | None = None) -> Failure:
    """Find the row of an error, or of its words.

    Args: code: its id, where the caller knows it. status: the exit status that is meant; default:
        the row's own.
    """
    found = code or getattr(error, "error_id", "") or _by_class(error)
    if not found:
        only_words, faulty = ("usage", "bad_input") if status == MISUSE else ("failed", "fault")
        found = only_words if isinstance(error, str) else faulty
    known = LOCAL.get(found) or _of_the_wire(found)
    words = str(error) or type(error).__name__
    if found == "fault":
        words = f"{type(error).__name__}: {words}"
    return Failure(found, words, known.do, known.exit if status is None else status)


def _by_class(error: object) -> str:
    return next((OF_CLASS[c.__name__] for c in type(error).__mro__ if c.__name__ in OF_CLASS), "")


def _of_the_wire(code: str) -> Known:
    from protos.errors import CATALOGUE

    entry = CATALOGUE.get(code)
    if entry is None:  # a newer coordinator knows errors that we do not
        return Known(ENDED_BADLY, "update cofuse, or ask the operator")
    return Known(EXIT_OF_STATUS.get(entry.status.name, ENDED_BADLY), entry.do)
