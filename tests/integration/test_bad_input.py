"""Bad input in every field of every call: an error of the catalogue with its remedy, one log line.

Calls and fields are read from the descriptors, so that a new one is covered by itself. A call with
a good request in GOOD is held to more: its bad fields are refused for themselves.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import logging
import pkgutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from pydantic import ValidationError
from safetensors.numpy import save_file

import protos.v1
from cofuse.ordering import Orderer
from coordinator.access import ANYBODY, ROLES
from coordinator.config import CoordinatorConfig
from coordinator.invitations import Invitations
from coordinator.limits import Rates
from coordinator.rounds import Event
from coordinator.store import Store
from coordinator.wiring import Running, serving
from protos.chunks import sha256_of
from protos.config import TlsConfig
from protos.errors import CATALOGUE, ERROR_KEY
from protos.logs import configure
from protos.printable import MAX_TEXT
from protos.public_sets import write_prompts
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec, TrainingSpec
from protos.tls import TlsFiles, dial
from protos.v1 import (
    enroll_pb2,
    fleet_pb2,
    recurring_pb2,
    research_pb2,
    transfer_pb2,
    transfer_pb2_grpc,
)
from tests.uploads import put_requests
from trust.ca import create_authority, new_identity, sign_request
from trust.identity import Identity

MODULES = [
    health_pb2,
    *(
        importlib.import_module(f"protos.v1.{info.name}")
        for info in pkgutil.iter_modules(protos.v1.__path__)
        if info.name.endswith("_pb2")
    ),
]
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

HOSTILE_TEXTS = ("x" * 100_000, "a\x00b", "\x1b[2Jgone", "a\r\nb", "a\u202eb", "\x9b")
"""Refused in every text, whatever it means; line ends go in JSON only."""
WRONG_TEXTS = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "rnd-999999999",
    "rnd-01",
    "rnd--1",
    "RND-1",
    "pivot-01",
    "pivot-999999998",
    "0" * 64,
    "'; DROP TABLE rounds; --",
    "\u00e9\u4e2d",
)
HOSTILE_INTEGERS = (2**64 - 1, 2**63)
WRONG_INTEGERS = (2**63 - 1, 2**40)

FREE: dict[str, tuple[object, ...]] = {
    # Words of the caller's own: whatever can be printed.
    "cofuse.v1.JoinRequest.software_version": WRONG_TEXTS,
    "cofuse.v1.SubmitRoundRequest.request_id": WRONG_TEXTS,
    # These name what may well come to be.
    "cofuse.v1.PutHeader.sha256": ("0" * 64,),
    "cofuse.v1.StatRequest.sha256": ("0" * 64,),
    "cofuse.v1.WatchRoundRequest.after_seq": WRONG_INTEGERS,
}
"""Fields whose wrong values (these) are a call's own business."""


@dataclasses.dataclass(frozen=True)
class Good:
    """A request that is right, and the error it still meets, if any."""

    request: Message
    error_id: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one call ended."""

    error_id: str
    """Empty: it was answered."""
    details: str
    code: grpc.StatusCode
    log: list[dict[str, Any]]


class Place:
    """A coordinator with a round in each of three states, and callers of every role."""

    def __init__(self, running: Running, identities: dict[str, TlsFiles], log: io.StringIO) -> None:
        self.channels = {role: dial(running.address, files) for role, files in identities.items()}
        authority = grpc.ssl_channel_credentials(identities["operator"].ca.read_bytes())
        self.channels[ANYBODY] = grpc.secure_channel(running.enroll_address, authority)
        self.identities = identities
        self._log = log
        self.good: dict[str, Good] = {}

    def call(self, method: str, raw: bytes, role: str = "") -> Outcome:
        """Send one message; read at most one answer."""
        shape = METHODS[method]
        role = role or next(
            r for r in ("operator", "researcher", "participant", ANYBODY) if r in ROLES[method]
        )
        kind = (
            "stream" if shape.client_streaming else "unary",
            "stream" if shape.server_streaming else "unary",
        )
        begun = self._log.tell()
        try:
            call = getattr(self.channels[role], "_".join(kind))(method)
            answer = call(iter([raw]) if shape.client_streaming else raw, timeout=20)
            if shape.server_streaming and shape.client_streaming:
                list(answer)  # we have closed our side: it ends
            elif shape.server_streaming:
                next(answer, None)
                answer.cancel()
        except grpc.RpcError as error:
            keys = dict(error.trailing_metadata() or ())
            ended = str(keys.get(ERROR_KEY, "none")), str(error.details()), error.code()
        else:
            ended = "", "", grpc.StatusCode.OK
        self._log.seek(begun)
        return Outcome(*ended, [json.loads(line) for line in self._log])

    def send(self, method: str, request: Message, role: str = "") -> Outcome:
        return self.call(method, request.SerializeToString(), role)

    def close(self) -> None:
        for channel in self.channels.values():
            channel.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("bad-input")
    create_authority(root / "ca", "test")
    names = {
        "operator": "grace",
        "researcher": "ada",
        "participant": "st-mary",
        "coordinator": "coordinator",
    }
    files = {role: _identity(root, role, name) for role, name in names.items()}
    own = files.pop("coordinator")
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        enroll_listen="127.0.0.1:0",
        authority=root / "ca",
        data_dir=root / "data",
        max_upload_bytes=1_000_000,
        tls=TlsConfig(ca=own.ca, certificate=own.certificate, key=own.key),
    )
    handlers, log = logging.getLogger().handlers[:], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, serving(config) as running:
        patch.setattr(Rates, "take", lambda *_: True)  # these calls come faster than anybody's
        configure("coordinator", stream=log)
        made = Place(running, files, log)
        made.good = _good(made, root, Store.at(root / "data" / "coordinator.sqlite"))
        yield made
        made.close()
    logging.getLogger().handlers[:] = handlers


def _identity(root: Path, role: Any, name: str) -> TlsFiles:
    home = root / role
    certificate = sign_request(root / "ca", new_identity(home, role, name), role=role, name=name)
    (home / "certificate.pem").write_bytes(certificate)
    return TlsFiles(
        ca=root / "ca" / "ca.pem", certificate=home / "certificate.pem", key=home / "key.pem"
    )


def _good(place: Place, root: Path, store: Store) -> dict[str, Good]:
    """Set the scene, and return a request for every call that goes with it."""
    write_prompts(root / "prompts.jsonl", ["Aortic valve stenosis is a narrowing."])
    save_file({"weight": np.zeros(1)}, root / "weights")
    size = (root / "weights").stat().st_size
    (root / "answer").write_bytes(b"not logits")
    puts = {"prompts.jsonl": "PROMPTS", "weights": "PIVOT", "answer": "CONTRIBUTION"}
    shas = {}
    for name, kind in puts.items():
        shas[name] = sha256_of(root / name)
        _put(place, root / name, kind)
    file = research_pb2.PivotFile(name="model.safetensors", sha256=shas["weights"], size_bytes=size)
    pivot = research_pb2.Pivot(name="pivot-0", files=[file])
    assert place.send("/cofuse.v1.Research/ImportPivot", pivot).error_id == ""
    assert (
        place.send("/cofuse.v1.Fleet/Join", fleet_pb2.JoinRequest(software_version="1")).error_id
        == ""
    )
    spec = _spec(shas["prompts.jsonl"])
    spec_json = spec.model_dump_json()
    for number, events in enumerate(((), (Event.CANCEL,), (Event.APPROVE, Event.ISSUE)), 1):
        submit = _ordered(place, spec_json, f"request-{number}", "researcher")
        assert place.send("/cofuse.v1.Research/SubmitRound", submit, "researcher").error_id == ""
        for event in events:
            store.advance(f"rnd-{number}", event)
    submit = _ordered(place, spec_json, "request-4")  # by the operator, who may approve no own one
    waiting, ended, collecting = (research_pb2.RoundRequest(round_id=f"rnd-{n}") for n in (1, 2, 3))
    header = transfer_pb2.PutHeader(
        sha256=hashlib.sha256(b"never sent").hexdigest(), size_bytes=10, kind=transfer_pb2.PROMPTS
    )
    token = Invitations(store.database).invite(Identity("researcher", "eve"), "0" * 64, 3600.0)
    redeem = enroll_pb2.RedeemRequest(invitation=token.invitation, secret=token.secret)
    commit = fleet_pb2.CommitRequest(round_id="rnd-3", sha256=shas["answer"], size_bytes=10)
    start = _calendar(place, spec)
    assert place.send("/cofuse.v1.Recurring/StartRecurring", start).error_id == ""
    recurring = {
        "StartRecurring": Good(start),
        "ListRecurring": Good(recurring_pb2.ListRecurringRequest()),
        "StopRecurring": Good(recurring_pb2.StopRecurringRequest(recurring_id="rec-1")),
    }
    research = {
        "SubmitRound": Good(submit),
        "ApproveRound": Good(collecting, "wrong_state"),
        "CancelRound": Good(ended, "wrong_state"),
        "GetRound": Good(waiting),
        "ListRounds": Good(research_pb2.ListRoundsRequest()),
        "WatchRound": Good(research_pb2.WatchRoundRequest(round_id="rnd-2")),
        "ListParticipants": Good(research_pb2.ListParticipantsRequest()),
        "Why": Good(research_pb2.WhyRequest(name="rnd-1")),
        "ImportPivot": Good(pivot),
        "RollbackPivot": Good(research_pb2.RollbackPivotRequest(name="pivot-0"), "wrong_state"),
        "GetPivot": Good(research_pb2.GetPivotRequest(name="pivot-0")),
        "ListPivots": Good(research_pb2.ListPivotsRequest()),
    }
    return {
        **{f"/cofuse.v1.Research/{name}": good for name, good in research.items()},
        **{f"/cofuse.v1.Recurring/{name}": good for name, good in recurring.items()},
        "/cofuse.v1.Transfer/Stat": Good(transfer_pb2.StatRequest(sha256=shas["weights"])),
        "/cofuse.v1.Transfer/Put": Good(transfer_pb2.PutRequest(header=header), "truncated_upload"),
        "/cofuse.v1.Transfer/Get": Good(transfer_pb2.GetRequest(sha256=shas["weights"])),
        "/cofuse.v1.Fleet/Join": Good(fleet_pb2.JoinRequest(software_version="1")),
        "/cofuse.v1.Fleet/CommitContribution": Good(commit, "bad_contribution"),
        "/cofuse.v1.Enroll/Authority": Good(enroll_pb2.AuthorityRequest()),
        "/cofuse.v1.Enroll/Redeem": Good(redeem, "bad_request"),
        "/cofuse.v1.Enroll/Renew": Good(enroll_pb2.RenewRequest()),
        "/grpc.health.v1.Health/Check": Good(health_pb2.HealthCheckRequest()),
        "/grpc.health.v1.Health/Watch": Good(health_pb2.HealthCheckRequest()),
    }


def _put(place: Place, path: Path, kind: str) -> None:
    role = {"PROMPTS": "researcher", "PIVOT": "operator", "CONTRIBUTION": "participant"}[kind]
    requests = put_requests(path, sha256_of(path), transfer_pb2.ArtifactKind.Value(kind), 0)
    *_, last = transfer_pb2_grpc.TransferStub(place.channels[role]).Put(requests)
    assert last.complete


def _ordered(
    place: Place, spec_json: str, nonce: str, role: str = "operator"
) -> research_pb2.SubmitRoundRequest:
    """A submission by whoever has signed it, unless it is too long for that."""
    order = ""
    with contextlib.suppress(ValidationError):
        order = _order(place.identities[role], spec_json, nonce)
    return research_pb2.SubmitRoundRequest(spec_json=spec_json, request_id=nonce, order_json=order)


def _order(tls: TlsFiles, spec_json: str, nonce: str, *, recurring: bool = False) -> str:
    orderer = Orderer(tls.key, tls.certificate)
    return orderer.order(spec_json, nonce, timedelta(hours=1), recurring=recurring)


def _calendar(place: Place, round_spec: RoundSpec) -> recurring_pb2.StartRecurringRequest:
    """A recurring spec that the operator has signed."""
    weekly = RecurringSpec(name="weekly", every="0 2 * * sun", round=round_spec)
    spec_json = weekly.model_dump_json()
    order = _order(place.identities["operator"], spec_json, "weekly", recurring=True)
    return recurring_pb2.StartRecurringRequest(
        spec_json=spec_json, request_id="weekly", order_json=order
    )


def _spec(prompts: str) -> RoundSpec:
    values = {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ("st-mary",),
        "kind": "logits",
        "method": "unified",
        "prompts": f"sha256:{prompts}",
        "training": {"steps": 1, "lr": 0.001},
    }
    return RoundSpec.model_validate(values)


# ---------------------------------------------------------------------- every field of every call

Spoiled = tuple[str, Any, object, Message, bool]
"""Place, field, value, the whole message, whether the value is wrong whatever the field means."""


def _spoiled(message: Message, place: str = "") -> Iterator[Spoiled]:
    """Every field of `message` and of those inside it, set to each bad value in turn."""
    for field in message.DESCRIPTOR.fields:
        name = f"{place}{field.name}"
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            yield from _spoiled_inside(message, field, name)
            continue
        for value, always in _bad_values(field):
            copy = _copy(message)
            if field.is_repeated:
                getattr(copy, field.name).append(value)
            else:
                setattr(copy, field.name, value)
            yield name, field, value, copy, always


def _spoiled_inside(message: Message, field: Any, name: str) -> Iterator[Spoiled]:
    inner = getattr(message, field.name)
    if field.is_repeated:
        inner = inner[0] if len(inner) else GetMessageClass(field.message_type)()
        many = _copy(message)
        getattr(many, field.name).extend([inner] * 2000)
        yield name, field, "2000 items", many, True
    for place, leaf, value, spoiled, always in _spoiled(inner, f"{name}."):
        copy = _copy(message)
        if field.is_repeated:
            copy.ClearField(field.name)
            getattr(copy, field.name).append(spoiled)
        else:
            getattr(copy, field.name).CopyFrom(spoiled)
        yield place, leaf, value, copy, always


def _bad_values(field: Any) -> list[tuple[Any, bool]]:
    if field.enum_type is not None:
        return [(99, True), (0, False)]
    if field.type == FieldDescriptor.TYPE_STRING:
        hostile = [t for t in HOSTILE_TEXTS if not (field.name.endswith("_json") and t == "a\r\nb")]
        return [(t, len(t) <= 1000 or not field.name.endswith("_json")) for t in hostile] + [
            (text, False) for text in WRONG_TEXTS
        ]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return [(b"\x00" * 1000, False)]
    if field.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64):
        signed = field.cpp_type == FieldDescriptor.CPPTYPE_INT64
        hostile_integers = () if signed else HOSTILE_INTEGERS
        return [(n, True) for n in hostile_integers] + [(n, False) for n in WRONG_INTEGERS]
    return []


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


@pytest.mark.parametrize("method", METHODS)
def test_every_bad_field_is_refused_in_words_and_one_log_line(place: Place, method: str) -> None:
    good = place.good.get(method)
    request = good.request if good else GetMessageClass(METHODS[method].input_type)()
    if good is not None:
        assert place.send(method, request).error_id == good.error_id, "the good request"
    for where, field, value, spoiled, always in _spoiled(request):
        outcome = place.send(method, spoiled)
        case = f"{where} = {value!r:.60}: {outcome}"
        _check_words(method, outcome, case)
        if always:
            assert outcome.error_id == "bad_request", case
            assert where.partition("[")[0].split(".")[-1] in outcome.details, case
        elif good is not None and value not in FREE.get(field.full_name, ()):
            assert outcome.error_id not in ("", good.error_id), case


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_refused_in_words(place: Place, method: str) -> None:
    request = GetMessageClass(METHODS[method].input_type)()
    junk = [b"\xff\xff", b"\x0a\xff\xff\xff\xff\x7f", b"\x08" + b"\xff" * 20]
    texts = [f for f in request.DESCRIPTOR.fields if f.type == FieldDescriptor.TYPE_STRING]
    for field in texts:
        request.MergeFrom(type(request)(**{field.name: ["AAAA"] if field.is_repeated else "AAAA"}))
        junk.append(request.SerializeToString().replace(b"AAAA", b"\xff\xfe\xc0\x80"))
    for raw in junk:
        outcome = place.call(method, raw)
        _check_words(method, outcome, repr(raw))
        assert outcome.error_id == "bad_request", raw


def _check_words(method: str, outcome: Outcome, case: str) -> None:
    """The promise: an answer without a word, or a refusal with a remedy and one line."""
    loud = [
        line for line in outcome.log if line["level"] != "info" or line["event"] == "rpc.refused"
    ]
    if not outcome.error_id:
        assert loud == [], case
        return
    entry = CATALOGUE[outcome.error_id]
    assert outcome.error_id != "internal", case
    assert outcome.code is entry.status, case
    assert entry.do in outcome.details or len(outcome.details) > MAX_TEXT, case
    assert len(outcome.details) < MAX_TEXT + 40, case
    assert outcome.details.isprintable(), case
    assert "Traceback" not in outcome.details, case
    assert [(line["event"], line["method"]) for line in loud] == [("rpc.refused", method)], case
    assert loud[0]["error_id"] == outcome.error_id, case
    stranger = loud[0]["caller"] == "nobody" and ANYBODY in ROLES[method]
    assert stranger or loud[0]["caller"].startswith("cofuse://"), case


# ------------------------------------------------------------------------------- the spec's JSON

JSON_TEXTS = (
    "",
    "null",
    "[]",
    "{}",
    '"text"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    '{"seed": ' + "9" * 5000 + "}",
    "\ufeff{}",
    '{"name": "\\ud800"}',
)
JSON_VALUES = (
    None,
    True,
    -1,
    0,
    10**30,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x" * 10_000,
    "a\x00b",
    "\ud800",
    "../../etc/passwd",
    "sha256:" + "0" * 64,
    [],
    [None],
    ["a"] * 2000,
    {"a": {}},
)


@pytest.mark.parametrize("text", JSON_TEXTS, ids=range(len(JSON_TEXTS)))
def test_a_spec_that_is_no_spec_is_refused_in_words(place: Place, text: str) -> None:
    request = research_pb2.SubmitRoundRequest(spec_json=text, request_id="json")
    outcome = place.send("/cofuse.v1.Research/SubmitRound", request)
    _check_words("/cofuse.v1.Research/SubmitRound", outcome, text[:40])
    assert outcome.error_id in ("bad_spec", "bad_request")


@pytest.mark.parametrize(
    "field", [*RoundSpec.model_fields, *(f"training.{f}" for f in TrainingSpec.model_fields)]
)
def test_no_value_in_a_spec_makes_the_coordinator_stumble(place: Place, field: str) -> None:
    method = "/cofuse.v1.Research/SubmitRound"
    good = place.good[method].request
    for number, value in enumerate(JSON_VALUES):
        spec = json.loads(good.spec_json)
        *outer, last = field.split(".")
        (spec[outer[0]] if outer else spec)[last] = value
        request = _ordered(place, json.dumps(spec), f"{field.replace('.', '-')}-{number}")
        outcome = place.send(method, request)
        _check_words(method, outcome, f"{field} = {value!r:.40}: {outcome}")


# --------------------------------------------------------------------------------- who and when


def test_a_call_in_the_wrong_state_is_told_the_state(place: Place) -> None:
    for name, round_id, state in (
        ("ApproveRound", "rnd-2", "CANCELLED"),
        ("ApproveRound", "rnd-3", "COLLECTING"),
        ("CancelRound", "rnd-2", "CANCELLED"),
    ):
        method = f"/cofuse.v1.Research/{name}"
        outcome = place.send(method, research_pb2.RoundRequest(round_id=round_id))
        assert outcome.error_id == "wrong_state"
        assert state in outcome.details
        _check_words(method, outcome, name)
    commit = _copy(place.good["/cofuse.v1.Fleet/CommitContribution"].request)
    for round_id in ("rnd-1", "rnd-2"):
        commit.round_id = round_id
        outcome = place.send("/cofuse.v1.Fleet/CommitContribution", commit)
        assert outcome.error_id in ("wrong_state", "bad_contribution")


def test_every_role_that_may_not_call_is_one_line_too(place: Place) -> None:
    for method, role in itertools.product(METHODS, ("operator", "researcher", "participant")):
        if role not in ROLES[method]:
            outcome = place.call(method, b"", role)
            assert outcome.error_id == "not_allowed"
            _check_words(method, outcome, f"{method} by {role}")


@pytest.mark.parametrize(
    ("method", "query"),
    [("/cofuse.v1.Research/ListRounds", "rounds"), ("/cofuse.v1.Research/WatchRound", "events")],
)
def test_a_fault_of_ours_is_told_by_reference_and_explained_in_the_log(
    place: Place, monkeypatch: pytest.MonkeyPatch, method: str, query: str
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("found a secret\nin /var/lib")

    monkeypatch.setattr(Store, query, broken)
    outcome = place.send(method, place.good[method].request)
    assert (outcome.error_id, outcome.code) == ("internal", grpc.StatusCode.INTERNAL)
    assert "secret" not in outcome.details
    assert CATALOGUE["internal"].do in outcome.details
    [line] = outcome.log
    assert (line["event"], line["level"]) == ("rpc.failed", "error")
    assert line["reference"] in outcome.details
    assert line["error"] == "RuntimeError: found a secret\\nin /var/lib"
    assert "broken" in line["where"][0]
