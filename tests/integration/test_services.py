"""The services over real mutual TLS: who may do what, and what bad input is told."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cofuse.sdk import Coordinator
from coordinator.access import ROLES
from coordinator.rounds import Event
from coordinator.store import Store
from coordinator.wiring import serving
from fusion.codec import write_logits
from fusion.extract import extract_logits
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from participant.client import Client
from participant.sealer import Sealer
from protos.chunks import CHUNK_BYTES, sha256_of
from protos.errors import RemoteError, remote_errors
from protos.public_sets import write_prompts
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec
from protos.tls import TlsFiles, dial
from protos.v1 import fleet_pb2, research_pb2, transfer_pb2, transfer_pb2_grpc
from tests.integration.conftest import MakeIdentity, config_at, identities_at
from tests.uploads import put_requests
from trust.ca import create_authority, new_identity, sign_request
from trust.seal_keys import RECIPIENT_FILE
from trust.statements import Release

TEXTS = ["Aortic valve stenosis is a narrowing.", "Atrial fibrillation is an arrhythmia."]


@dataclass(frozen=True)
class Hub:
    """A coordinator that serves all tests of this file; its scheduler does not run."""

    root: Path
    identities: MakeIdentity
    address: str
    store: Store

    def collect(self, operator: Coordinator, round_id: str) -> None:
        """Bring a round to COLLECTING, as the scheduler would."""
        operator.approve(round_id)
        self.store.advance(round_id, Event.ISSUE)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    identities = identities_at(root)
    with serving(config_at(root, identities)) as running:
        yield Hub(root, identities, running.address, running.store)


@pytest.fixture(scope="module")
def address(hub: Hub) -> str:
    return hub.address


@pytest.fixture(scope="module")
def identities(hub: Hub) -> MakeIdentity:
    return hub.identities


@pytest.fixture(scope="module")
def researcher(hub: Hub) -> Iterator[Coordinator]:
    with _sdk(hub.address, hub.identities("researcher", "ada")) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def operator(hub: Hub) -> Iterator[Coordinator]:
    with _sdk(hub.address, hub.identities("operator", "grace")) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def participant(hub: Hub) -> Iterator[Client]:
    client = Client(hub.address, hub.identities("participant", "st-mary"))
    client.join("test")
    yield client
    client.close()


@pytest.fixture(scope="module")
def public(hub: Hub) -> Path:
    folder = hub.root / "public"
    folder.mkdir()
    write_prompts(folder / "prompts.jsonl", TEXTS)
    return folder


@pytest.fixture(scope="module")
def model(hub: Hub) -> Any:
    tokenizer = train_tokenizer(TEXTS, 300)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    built = build_model(spec, 0)
    save_model(built, tokenizer, hub.root / "model")
    return built, tokenizer


@pytest.fixture
def round_id(
    operator: Coordinator, researcher: Coordinator, participant: Client, public: Path, model: Any
) -> str:
    """A round that waits for its operator; nothing moves by itself."""
    operator.import_pivot("pivot-0", public.parent / "model")
    return researcher.submit(_spec(), folder=public)


def _sdk(address: str, files: TlsFiles) -> Coordinator:
    return Coordinator(address, ca=files.ca, certificate=files.certificate, key=files.key)


def _spec(**change: Any) -> RoundSpec:
    values = {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ("st-mary",),
        "kind": "logits",
        "method": "unified",
        "prompts": "prompts.jsonl",
        "top_k": 4,
        "training": {"steps": 1, "lr": 0.001},
        **change,
    }
    return RoundSpec.model_validate(values)


# ------------------------------------------------------------------------------ who may do what


@pytest.mark.parametrize("role", ["participant", "researcher", "operator"])
def test_the_role_table_is_what_the_wire_does(
    address: str, identities: MakeIdentity, role: Any
) -> None:
    channel = dial(address, identities(role, "somebody"))
    for method, allowed in ROLES.items():
        call = channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff", timeout=10)  # no message of any method: who may call hears of that
        denied = caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert denied == (role not in allowed), method
    channel.close()


@pytest.fixture
def stranger(tmp_path: Path) -> TlsFiles:
    """A certificate of another authority, and that authority."""
    other, home = tmp_path / "other", tmp_path / "stranger"
    create_authority(other, "other")
    request = new_identity(home, "participant", "eve")
    certificate = sign_request(other, request, role="participant", name="eve")
    (home / "certificate.pem").write_bytes(certificate)
    return TlsFiles(ca=other / "ca.pem", certificate=home / "certificate.pem", key=home / "key.pem")


def test_a_certificate_of_another_authority_is_told_what_to_check(
    address: str, identities: MakeIdentity, stranger: TlsFiles
) -> None:
    ours = identities("participant", "x").ca
    client = Client(address, dataclasses.replace(stranger, ca=ours), patience_s=0.5)
    with pytest.raises(
        RemoteError, match=r"certificate\.pem was issued by its authority"
    ) as caught:
        client.join("test")
    assert caught.value.error_id == "unreachable"
    client.close()


def test_a_coordinator_of_another_authority_is_not_trusted(
    address: str, stranger: TlsFiles
) -> None:
    client = Client(address, stranger)
    with pytest.raises(RemoteError, match=r"check that ca\.pem") as caught:
        client.join("test")
    assert caught.value.error_id == "wrong_authority"
    client.close()


def test_a_participant_cannot_read_what_another_one_shipped(
    address: str, identities: MakeIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"logits")
    sha256 = sha256_of(path)
    channels = {name: dial(address, identities("participant", name)) for name in ("a", "b")}
    stubs = {name: transfer_pb2_grpc.TransferStub(channel) for name, channel in channels.items()}
    list(stubs["a"].Put(put_requests(path, sha256, transfer_pb2.CONTRIBUTION, 0)))
    for name in ("a", "b"):
        with pytest.raises(RemoteError, match="no file"), remote_errors():
            list(stubs[name].Get(transfer_pb2.GetRequest(sha256=sha256)))
    assert not stubs["b"].Stat(transfer_pb2.StatRequest(sha256=sha256)).complete
    for kind in (transfer_pb2.PIVOT, transfer_pb2.PROMPTS):
        with pytest.raises(RemoteError, match="may not put"), remote_errors():
            list(stubs["a"].Put(put_requests(path, sha256, kind, 0)))
    for channel in channels.values():
        channel.close()


# ---------------------------------------------------------------------------------- submitting


def test_a_round_is_submitted_once_and_waits_for_the_operator(
    researcher: Coordinator, operator: Coordinator, round_id: str, public: Path
) -> None:
    again = [researcher.submit(_spec(), folder=public, request_id="same") for _ in range(2)]
    assert again[0] == again[1] != round_id
    assert researcher.round(round_id).state == "SUBMITTED"
    with pytest.raises(RemoteError, match="not for the role researcher"):
        researcher.approve(round_id)
    assert operator.approve(round_id).state == "APPROVED"
    assert researcher.cancel(round_id).state == "CANCELLED"
    with pytest.raises(RemoteError, match="final"):
        researcher.cancel(round_id)


def test_nobody_approves_their_own_round_under_any_certificate(
    address: str, identities: MakeIdentity, operator: Coordinator, round_id: str, public: Path
) -> None:
    own = operator.submit(_spec(), folder=public)
    with _sdk(address, identities("operator", "ada")) as ada:  # who has submitted round_id
        for who, one in ((operator, own), (ada, round_id)):
            with pytest.raises(RemoteError, match="another operator") as caught:
                who.approve(one)
            assert caught.value.error_id == "own_round"
            assert who.round(one).state == "SUBMITTED"
        assert ada.approve(own).state == "APPROVED"


def test_a_researcher_cancels_nobody_elses_round_and_an_operator_any(
    address: str,
    identities: MakeIdentity,
    researcher: Coordinator,
    operator: Coordinator,
    round_id: str,
) -> None:
    with (
        _sdk(address, identities("researcher", "bob")) as other,
        pytest.raises(RemoteError, match="not yours") as caught,
    ):
        other.cancel(round_id)
    assert caught.value.error_id == "not_allowed"
    assert researcher.round(round_id).state == "SUBMITTED"
    assert operator.cancel(round_id).state == "CANCELLED"


@pytest.mark.parametrize(
    ("change", "error_id"),
    [
        ({"pivot": "pivot-7"}, "unknown_pivot"),
        ({"participants": ("nobody",)}, "unknown_participant"),
        ({"prompts": "sha256:" + "0" * 64}, "unknown_artifact"),
    ],
)
def test_a_spec_that_names_what_is_not_there_is_refused(
    researcher: Coordinator, round_id: str, public: Path, change: dict[str, Any], error_id: str
) -> None:
    with pytest.raises(RemoteError) as caught:
        researcher.submit(_spec(**change), folder=public)
    assert caught.value.error_id == error_id


def test_an_unknown_key_in_a_spec_is_refused_by_the_server_too(
    address: str, identities: MakeIdentity, round_id: str
) -> None:
    channel = dial(address, identities("researcher", "raw"))
    call = channel.unary_unary(
        "/cofuse.v1.Research/SubmitRound",
        request_serializer=research_pb2.SubmitRoundRequest.SerializeToString,
    )
    values = {**json.loads(_spec().model_dump_json()), "run_code": "import os"}
    request = research_pb2.SubmitRoundRequest(spec_json=json.dumps(values), request_id="x")
    with pytest.raises(RemoteError, match="unknown key 'run_code'"), remote_errors():
        call(request)
    channel.close()


# ------------------------------------------------------------------------------- contributions


def _contribution(tmp_path: Path, model: Any, public: Path, top_k: int = 4) -> Path:
    path = tmp_path / "logits.safetensors"
    digest = sha256_of(public / "prompts.jsonl")
    arrays = extract_logits(
        *model, TEXTS, top_k=top_k, prompt_set_sha256=digest, model_sha256="0" * 64
    )
    write_logits(path, arrays)
    return path


def _sealed(path: Path, round_id: str, ca: Path, says: str = "st-mary") -> Path:
    """What the guard of st-mary makes of a file. Args: says: who has released it, as it says."""
    release = Release(
        sha256=sha256_of(path),
        round_id=round_id,
        participant=says,
        kind="logits",
        size_bytes=path.stat().st_size,
        submitted_by="grace",
        model="0" * 64,
        prompt_set="",
        positions=0,
        policy_sha256="",
        key="0" * 64,
    )
    sealer = Sealer.at("st-mary", ca / RECIPIENT_FILE, ca.parent / "st-mary-release.pem")
    sealer.seal(release, path, path.with_suffix(".sealed"))
    return path.with_suffix(".sealed")


def _spoil(path: Path, kind: str) -> None:
    """Damage a good contribution in one way."""
    arrays = {name: values.copy() for name, values in load_file(path).items()}
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    if kind == "mass":
        arrays["tail"][3] = arrays["topk"][3] = 0
    elif kind == "vocabulary":
        arrays["topk_ids"][0] = 255
    elif kind == "spelling":
        arrays["vocab_bytes"][:] = 65
    save_file(arrays, path, metadata=metadata)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mass", "mass"),
        ("vocabulary", "id_out_of_vocabulary"),
        ("truncated", "truncated"),
        ("spelling", "spell"),
    ],
)
def test_a_bad_contribution_is_refused_and_a_good_one_is_still_welcome(
    hub: Hub,
    operator: Coordinator,
    participant: Client,
    round_id: str,
    tmp_path: Path,
    model: Any,
    public: Path,
    kind: str,
    says: str,
) -> None:
    hub.collect(operator, round_id)
    path = _contribution(tmp_path, model, public)
    _spoil(path, kind)
    path = _sealed(path, round_id, hub.root / "ca")
    participant.put(path, sha256_of(path))
    with pytest.raises(RemoteError, match=says) as caught:
        participant.commit(round_id, sha256_of(path), path.stat().st_size)
    assert caught.value.error_id == "bad_contribution"
    assert "still waits" in str(caught.value)
    good = _sealed(_contribution(tmp_path, model, public), round_id, hub.root / "ca")
    participant.put(good, sha256_of(good))
    receipt = participant.commit(round_id, sha256_of(good), good.stat().st_size)
    assert receipt.sha256 == sha256_of(good)
    assert participant.commit(round_id, sha256_of(good), good.stat().st_size) == receipt
    assert operator.round(round_id).contributions[0].status == "committed"


def test_only_what_this_guard_sealed_for_this_round_counts(
    hub: Hub,
    operator: Coordinator,
    participant: Client,
    round_id: str,
    tmp_path: Path,
    model: Any,
    public: Path,
) -> None:
    hub.collect(operator, round_id)
    plain, ca = _contribution(tmp_path, model, public), hub.root / "ca"

    def refused(path: Path, says: str) -> None:
        participant.put(path, sha256_of(path))
        with pytest.raises(RemoteError, match=says) as caught:
            participant.commit(round_id, sha256_of(path), path.stat().st_size)
        assert caught.value.error_id == "bad_contribution"

    refused(plain, "found no sealed file")
    refused(_sealed(plain, "rnd-77", ca), "for rnd-77, sent by st-mary for")
    refused(_sealed(plain, round_id, ca, "bob"), "released by bob")
    good = _sealed(plain, round_id, ca)
    participant.put(good, sha256_of(good))
    assert participant.commit(round_id, sha256_of(good), good.stat().st_size)
    children = psutil.Process().children()
    (opener,) = (one for one in children if "coordinator.opener" in one.cmdline())
    opener.kill()  # another one is started
    own = hub.root / "st-mary-release.pem"
    kept = own.rename(tmp_path / "kept.pem")  # a thief of the TLS key has not this one
    refused(_sealed(plain, round_id, ca), "the operator removes senders/st-mary")
    kept.rename(own)
    left = [path for path in (hub.root / "coordinator-coordinator" / "worker").rglob("*")]
    assert sorted(path.name for path in left) == ["key.pem", "opened", "senders", "st-mary.pem"]


def test_a_wrong_k_is_refused(
    hub: Hub,
    operator: Coordinator,
    participant: Client,
    round_id: str,
    tmp_path: Path,
    model: Any,
    public: Path,
) -> None:
    hub.collect(operator, round_id)
    path = _contribution(tmp_path, model, public, top_k=5)
    path = _sealed(path, round_id, hub.root / "ca")
    participant.put(path, sha256_of(path))
    with pytest.raises(RemoteError, match=r"wrong_k.*asks for 4"):
        participant.commit(round_id, sha256_of(path), path.stat().st_size)


def test_a_commit_without_an_upload_or_to_a_closed_round_is_refused(
    operator: Coordinator, participant: Client, round_id: str, tmp_path: Path
) -> None:
    with pytest.raises(RemoteError) as caught:
        participant.commit(round_id, "0" * 64, 5)
    assert caught.value.error_id == "unknown_artifact"


def test_an_upload_cut_short_resumes_and_a_wrong_digest_is_refused(
    address: str, identities: MakeIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "big"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    sha256 = sha256_of(path)
    channel = dial(address, identities("participant", "a"))
    stub = transfer_pb2_grpc.TransferStub(channel)

    def cut() -> Iterator[transfer_pb2.PutRequest]:
        requests = put_requests(path, sha256, transfer_pb2.CONTRIBUTION, 0)
        yield next(requests)
        yield next(requests)

    with pytest.raises(RemoteError) as caught, remote_errors():
        list(stub.Put(cut()))
    assert caught.value.error_id == "truncated_upload"
    status = stub.Stat(transfer_pb2.StatRequest(sha256=sha256))
    assert (status.complete, status.received_bytes) == (False, CHUNK_BYTES)
    rest = put_requests(path, sha256, transfer_pb2.CONTRIBUTION, status.received_bytes)
    assert list(stub.Put(rest))[-1].complete

    wrong = hashlib.sha256(b"something else").hexdigest()

    def renamed() -> Iterator[transfer_pb2.PutRequest]:
        for request in put_requests(path, sha256, transfer_pb2.CONTRIBUTION, 0):
            if request.WhichOneof("part") == "header":
                request.header.sha256 = wrong
            yield request

    with pytest.raises(RemoteError) as caught, remote_errors():
        list(stub.Put(renamed()))
    assert caught.value.error_id == "wrong_digest"
    assert stub.Stat(transfer_pb2.StatRequest(sha256=wrong)).received_bytes == 0
    channel.close()


def test_a_file_larger_than_the_limit_is_refused_before_its_bytes(
    address: str, identities: MakeIdentity, tmp_path: Path
) -> None:
    channel = dial(address, identities("participant", "a"))
    header = transfer_pb2.PutHeader(
        sha256="0" * 64, size_bytes=10**12, kind=transfer_pb2.CONTRIBUTION
    )
    stub = transfer_pb2_grpc.TransferStub(channel)
    with pytest.raises(RemoteError) as caught, remote_errors():
        list(stub.Put(iter([transfer_pb2.PutRequest(header=header)])))
    assert caught.value.error_id == "too_large"
    channel.close()


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "0" * 63, "\x00" * 64, "A" * 64])
def test_a_name_that_is_no_digest_is_refused_everywhere(
    address: str, identities: MakeIdentity, sha256: str
) -> None:
    files = identities("participant", "a")
    channel = dial(address, files)
    stub = transfer_pb2_grpc.TransferStub(channel)
    with pytest.raises(RemoteError), remote_errors():
        stub.Stat(transfer_pb2.StatRequest(sha256=sha256))
    with pytest.raises(RemoteError), remote_errors():
        list(stub.Get(transfer_pb2.GetRequest(sha256=sha256)))
    client = Client(Path(files.ca).name and address, files)
    with pytest.raises(RemoteError):
        client.commit("rnd-1", sha256, 1)
    client.close()
    channel.close()


def test_joining_twice_is_one_participant(researcher: Coordinator, participant: Client) -> None:
    assert participant.join("again") == participant.join("and again")
    assert list(researcher.participants()) == ["st-mary"]
    assert fleet_pb2.JoinRequest().software_version == ""


# --------------------------------------------------------------------------------- the calendar


def test_rounds_by_the_calendar_are_started_shown_and_stopped(
    operator: Coordinator, researcher: Coordinator, round_id: str, public: Path
) -> None:
    weekly = RecurringSpec(name="weekly", every="0 2 * * sun", round=_spec())
    with pytest.raises(RemoteError, match="not for the role"):
        researcher.start_recurring(weekly, folder=public)
    with pytest.raises(RemoteError, match="pivot-7"):
        operator.start_recurring(
            weekly.model_copy(update={"round": _spec(pivot="pivot-7")}), folder=public
        )
    started = operator.start_recurring(weekly, folder=public, request_id="once")
    assert operator.start_recurring(weekly, folder=public, request_id="once") == started
    (shown,) = researcher.recurring()
    assert (shown.recurring_id, shown.state, shown.spec.every) == (started, "ACTIVE", "0 2 * * sun")
    assert shown.due_unix_ms > time.time() * 1000
    assert operator.stop_recurring(started).state == "STOPPED"
    assert "grace" in researcher.recurring()[0].detail
    with pytest.raises(RemoteError) as caught:
        operator.stop_recurring("rec-9")
    assert caught.value.error_id == "unknown_recurring"
