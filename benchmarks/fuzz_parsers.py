"""Every parser of bytes that somebody else wrote: how it is called, and good inputs to spoil.

A parser may refuse what it is given, in its own words; anything else it raises is a crash. Seeds
are made by our own writers, so a format that changes takes its seeds along.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from pydantic import BaseModel, ValidationError

from coordinator.incoming import Partial
from coordinator.serving import parse_request
from fusion.codec import check_logits, write_logits
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta, write_delta
from fusion.pair_file import PreferenceError, PreferencePair
from fusion.pair_scores import PairScores, read_scores, write_scores
from participant.policy import load_policy
from protos.config import ConfigError
from protos.errors import CofuseError
from protos.messages import Assignment, FileRef, Report
from protos.public_sets import PublicSetError, read_evals, read_prompts
from protos.recurring import load_recurring, parse_recurring
from protos.spec import SpecError, load_spec, parse_spec
from protos.v1 import enroll_pb2, fleet_pb2, recurring_pb2, research_pb2, transfer_pb2
from tests.fusion.factories import SHA, build, vocabulary_of
from trust.ca import create_authority, new_identity, sign_request
from trust.chain import START, AuditError, Entry, make_line
from trust.checkpoints import make_checkpoint, read_checkpoint, verify_chain
from trust.dsse import EnvelopeError, seal, unseal
from trust.identity import Identity, IdentityError, leaf_of
from trust.keys import kid
from trust.model_config import CONFIG_FILE, ConfigRefusedError, check_small_json
from trust.pivot_manifest import (
    PAYLOAD_TYPE,
    Manifest,
    ManifestError,
    PivotFile,
    open_manifest,
    seal_manifest,
    utc,
)
from trust.safetensors_header import HeaderError, parse_header
from trust.tokens import new_token, parse_token

ROOT: Final = Path(__file__).resolve().parents[1]
KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(32))
PAIRS: Final = (PreferencePair("a", "b", "c"), PreferencePair("d", "e", "f"))
CUTS: Final = ([b"ab", b"c", b"\xc3\xa9"], [b"c"], [])
TEXTS: Final = (b"abc\xc3\xa9", b"c", b"")
SHAPES: Final = {"a.weight": (2, 3), "b.bias": (3,)}
_PROTOS: Final[Sequence[ModuleType]] = (
    enroll_pb2,
    fleet_pb2,
    recurring_pb2,
    research_pb2,
    transfer_pb2,
)

Parse = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """One way in."""

    parse: Parse
    seeds: Sequence[bytes]
    refusals: tuple[type[Exception], ...]
    """What it may raise."""


def parsers(folder: Path) -> Mapping[str, Parser]:
    """All of them. Args: folder: to write files in; on a memory disk it is fast."""
    return {**_wire(folder), **_trust(folder), **_specs(folder), **_files(folder)}


# -------------------------------------------------------------------------------------- the wire


def _wire(folder: Path) -> dict[str, Parser]:
    calls = _requests()
    return {
        "requests": Parser(
            parse=lambda raw: raw and parse_request(raw[1:], calls[raw[0] % len(calls)].FromString),
            seeds=[
                bytes([number]) + _filled(kind).SerializeToString()
                for number, kind in enumerate(calls)
            ],
            refusals=(CofuseError,),
        ),
        "chunks": Parser(
            parse=lambda raw: _receive(folder / "upload", raw),
            seeds=[_upload(b"first " * 9, b"second"), _upload(b"one")],
            refusals=(CofuseError,),
        ),
        "assignment": _json(
            Assignment,
            Assignment(
                round_id="rnd-1",
                attempt=1,
                submitted_by="ada",
                spec=parse_spec(_spec_json()),
                pivot=(FileRef(name="model.safetensors", sha256=SHA, size_bytes=5),),
                pivot_sha256=SHA,
                deadline_unix_ms=1,
            ),
        ),
        "report": _json(Report, Report(round_id="rnd-1", attempt=1, status="refused", detail="no")),
    }


def _requests() -> list[type[Message]]:
    """The message classes of every call, by name."""
    inputs = {
        method.input_type.full_name: method.input_type
        for module in _PROTOS
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    return [GetMessageClass(inputs[name]) for name in sorted(inputs)]


def _filled(kind: type[Message]) -> Message:
    """A message with something in every field."""
    made = kind()
    for field in made.DESCRIPTOR.fields:
        value: Any = 1
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            value = _filled(GetMessageClass(field.message_type))
            target = getattr(made, field.name)
            target.add().CopyFrom(value) if field.is_repeated else target.CopyFrom(value)
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            value = "rnd-1"
        elif field.type == FieldDescriptor.TYPE_BYTES:
            value = bytes(32)
        if field.is_repeated:
            getattr(made, field.name).append(value)
        else:
            setattr(made, field.name, value)
    return made


def _upload(*chunks: bytes) -> bytes:
    """A Put: its messages, each behind its length in two bytes."""
    digest, messages = hashlib.sha256(), []
    size = sum(map(len, chunks))
    messages.append(transfer_pb2.PutRequest(header={"sha256": SHA, "size_bytes": size}))
    for data in chunks:
        digest.update(data)
        chunk = transfer_pb2.Chunk(data=data, sha256=digest.digest())
        messages.append(transfer_pb2.PutRequest(chunk=chunk))
    raw = [message.SerializeToString() for message in messages]
    return b"".join(len(one).to_bytes(2, "big") + one for one in raw)


def _receive(path: Path, raw: bytes) -> None:
    def messages() -> Iterator[Any]:
        rest = raw
        while rest:
            length = int.from_bytes(rest[:2], "big")
            yield parse_request(rest[2 : 2 + length], transfer_pb2.PutRequest.FromString)
            rest = rest[2 + length :]

    stream = messages()
    header = next(stream, transfer_pb2.PutRequest()).header
    partial = Partial(path)
    try:
        for _ in partial.receive(
            ((one.chunk.data, one.chunk.sha256) for one in stream),
            offset_bytes=header.offset_bytes,
            size_bytes=header.size_bytes,
            prefix_sha256=header.prefix_sha256,
        ):
            pass
    finally:
        partial.drop()


def _json(model: type[BaseModel], good: BaseModel) -> Parser:
    return Parser(
        parse=model.model_validate_json,
        seeds=[good.model_dump_json().encode()],
        refusals=(ValidationError,),
    )


# ----------------------------------------------------------------------------------------- trust


def _trust(folder: Path) -> dict[str, Parser]:
    token = new_token(Identity("participant", "st-mary"), SHA)
    create_authority(folder / "ca", "fuzz")
    request = new_identity(folder / "identity", "participant", "st-mary")
    public = KEY.public_key()
    return {
        "token": Parser(
            parse=lambda raw: parse_token(raw.decode("utf-8", "replace")),
            seeds=[str(token).encode()],
            refusals=(IdentityError,),
        ),
        "certificate": Parser(
            parse=leaf_of,
            seeds=[sign_request(folder / "ca", request, role="participant", name="st-mary")],
            refusals=(IdentityError,),
        ),
        "certificate request": Parser(
            parse=lambda raw: sign_request(
                folder / "ca", raw, role="participant", name="st-mary", days=1
            ),
            seeds=[request],
            refusals=(IdentityError,),
        ),
        "dsse": Parser(
            parse=lambda raw: unseal(raw, PAYLOAD_TYPE, {kid(public): public}),
            seeds=[seal(PAYLOAD_TYPE, b'{"a":1}', KEY)],
            refusals=(EnvelopeError,),
        ),
        # Signed whatever it says: the key's owner is the one who would attack here.
        "manifest": Parser(
            parse=lambda raw: open_manifest(seal(PAYLOAD_TYPE, raw, KEY), public),
            seeds=[unseal(_manifest(), PAYLOAD_TYPE, {kid(public): public})],
            refusals=(ManifestError,),
        ),
        "model config": Parser(
            parse=lambda raw: check_small_json(CONFIG_FILE, raw),
            seeds=[_CONFIG],
            refusals=(ConfigRefusedError,),
        ),
        "safetensors": Parser(
            parse=lambda raw: parse_header(raw, 24),
            seeds=_HEADERS,
            refusals=(HeaderError,),
        ),
        "audit": Parser(parse=_verify, seeds=[_chain()], refusals=(AuditError,)),
    }


_CONFIG: Final = json.dumps(
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
).encode()
_HEADERS: Final = [
    b'{"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
    b'{"__metadata__":{"format":"pt"},"a":{"data_offsets":[0,24],"shape":[6],"dtype":"F32"}}',
    b'{"a":{"dtype":"F16","shape":[],"data_offsets":[0,2]},"b":{"dtype":"I16","shape":[11],'
    b'"data_offsets":[2,24]}}   ',
]


def _manifest() -> bytes:
    moment = utc(datetime(2026, 1, 1, tzinfo=UTC))
    made = Manifest(
        name="pivot-1",
        root="pivot-1",
        parent=None,
        files=(PivotFile(name="model.safetensors", sha256=SHA, size_bytes=5),),
        created=moment,
        round_id="",
        method="import",
        restores="",
        inputs=(),
        evals={"bpb": {"cardiology": "1.25"}},
        issued=moment,
        expires=moment,
        signer=kid(KEY.public_key()),
    )
    return seal_manifest(made, KEY)


def _chain() -> bytes:
    """Three records and a checkpoint, a line each."""
    head, lines = START, []
    for number in range(3):
        entry = Entry(actor="cofuse://operator/grace", act="a.b", obj="c", data={"n": number})
        line, head = make_line(entry, head, 1)
        lines.append(line)
    return b"\n".join([*lines, make_checkpoint(KEY, head, 1).line()])


def _verify(raw: bytes) -> None:
    *lines, last = raw.split(b"\n")
    verify_chain(lines, [read_checkpoint(last)], KEY.public_key(), whole=not raw.startswith(b" "))


# ----------------------------------------------------------------------------- specs and policies


def _specs(folder: Path) -> dict[str, Parser]:
    examples = ROOT / "examples"
    recurring = (examples / "recurring-weekly.yaml").read_bytes()
    rounds = [examples / f"{name}.yaml" for name in ("logits-unified", "weights-diloco")]
    return {
        "round spec": Parser(
            parse=_from_file(folder / "round.yaml", load_spec),
            seeds=[path.read_bytes() for path in rounds],
            refusals=(SpecError,),
        ),
        "round spec on the wire": Parser(
            parse=lambda raw: parse_spec(raw.decode("utf-8", "replace")),
            seeds=[_spec_json().encode()],
            refusals=(SpecError,),
        ),
        "recurring spec": Parser(
            parse=_from_file(folder / "recurring.yaml", load_recurring),
            seeds=[recurring],
            refusals=(SpecError,),
        ),
        "recurring spec on the wire": Parser(
            parse=lambda raw: parse_recurring(raw.decode("utf-8", "replace")),
            seeds=[_recurring_json(folder / "recurring.yaml", recurring)],
            refusals=(SpecError,),
        ),
        "policy": Parser(
            parse=_from_file(folder / "policy.toml", load_policy),
            seeds=[_POLICY, b"ship_logits = true\nmax_top_k = 4\n"],
            refusals=(ConfigError,),
        ),
    }


_POLICY: Final = b"""version = 2
[[allow]]
purpose = "radiology"
submitters = ["ada"]
kinds = ["logits"]
prompt_sets = ["*"]
not_after = 2027-01-01
approval = "auto"
[logits]
k_max = 8
"""


def _spec_json() -> str:
    return json.dumps(
        {
            "name": "first",
            "pivot": "pivot-0",
            "participants": ["st-mary"],
            "kind": "logits",
            "method": "unified",
            "prompts": f"sha256:{SHA}",
            "training": {"steps": 1, "lr": 0.001},
        }
    )


def _recurring_json(path: Path, text: bytes) -> bytes:
    path.write_bytes(text)
    values = json.loads(load_recurring(path).model_dump_json())
    pinned = {"participants": ["a", "b", "c"], "evals": f"sha256:{SHA}"}
    values["round"] |= json.loads(_spec_json()) | pinned
    return json.dumps(values).encode()


# ------------------------------------------------------------------------------------------ files


def _files(folder: Path) -> dict[str, Parser]:
    path = folder / "good"
    write_logits(path, build(CUTS, [*vocabulary_of(CUTS), b"zz", b"q"], top_k=3)[0])
    logits = path.read_bytes()
    delta = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    write_delta(path, delta, pivot_sha256=SHA, steps=1, tokens=5)
    weights = path.read_bytes()
    numbers, counts = np.asarray([-1.0, -2.0]), np.asarray([3, 4])
    write_scores(path, PairScores(numbers, counts, numbers, counts), PAIRS, model_sha256=SHA)
    question = {"prompt": "1+1=", "options": ["2", "3"], "answer": 0}
    evals = {"domains": {"sums": {"documents": ["held out"], "questions": [question]}}}
    return {
        "logits": Parser(
            parse=_from_file(
                folder / "logits",
                lambda at: check_logits(at, prompts=TEXTS, prompt_set_sha256=SHA, top_k=3),
            ),
            seeds=[logits],
            refusals=(ContributionError,),
        ),
        "weights": Parser(
            parse=_from_file(
                folder / "delta", lambda at: check_delta(at, pivot_sha256=SHA, shapes=SHAPES)
            ),
            seeds=[weights],
            refusals=(ContributionError,),
        ),
        "pair scores": Parser(
            parse=_from_file(folder / "scores", lambda at: read_scores(at, PAIRS)),
            seeds=[path.read_bytes()],
            refusals=(PreferenceError,),
        ),
        "prompts": Parser(
            parse=_from_file(folder / "prompts", read_prompts),
            seeds=[b'{"text": "Public."}\n{"text": "Written.", "written": true}\n'],
            refusals=(PublicSetError,),
        ),
        "evals": Parser(
            parse=_from_file(folder / "evals", read_evals),
            seeds=[json.dumps(evals).encode()],
            refusals=(PublicSetError,),
        ),
    }


def _from_file(path: Path, read: Callable[[Path], object]) -> Parse:
    def parse(raw: bytes) -> object:
        path.write_bytes(raw)
        return read(path)

    return parse
