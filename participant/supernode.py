"""Flower's SuperNode, in a child process of the participant's engine.

Run by participant.engine, never by hand. It dials the coordinator and listens on nothing: tasks go
to the parent as JSON lines on stdout, answers come back as JSON lines on stdin, and log lines go
to stderr. It asks the coordinator for messages only. Whatever run the coordinator names, an empty
bundle made here stands in for the one it would send, so no code ever travels.

It imports nothing of ours: behind the courier's walls only its own file is sure to be readable.
"""

import os

# flwr reads these two switches when it is first imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import ctypes
import fcntl
import hashlib
import io
import json
import logging
import queue
import signal
import ssl
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ISOLATION_MODE_PROCESS, ErrorCode, Status, SubStatus
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
)
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message, start_client_internal

logger = logging.getLogger(__name__)

# The same two words as in coordinator/flower_run.py; the integration test holds them together.
RECORD: Final = "cofuse"
KEY: Final = "json"

HEARTBEAT_S: Final = 10.0
TASK_POLL_S: Final = 0.1
ALREADY_ACTIVE: Final = httpx.codes.PRECONDITION_FAILED
PR_SET_PDEATHSIG: Final = 1
# The parent's word for "stop"; participant/engine.py sends it too.
LEAVE: Final = signal.SIGUSR1

_BUNDLE_TOML: Final = """\
[project]
name = "nothing"
version = "1"
[tool.flwr.app]
publisher = "cofuse"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The first line on stdin."""

    state_dir: str
    superlink_address: str
    ca: str
    certificate: str
    key: str
    poll_s: float
    parent: int


def empty_bundle() -> bytes:
    """A Flower app bundle that holds a project file and no code: the same bytes every time."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(zipfile.ZipInfo("pyproject.toml"), _BUNDLE_TOML)
    return archive.getvalue()


def fleet_client(settings: Settings, on_active: Any) -> type[Any]:
    """Flower's Fleet client, with our certificate, and with nothing of a bundle let in."""
    bundle = empty_bundle()
    bundle_sha256 = hashlib.sha256(bundle).hexdigest()
    known_node = Path(settings.state_dir) / "node_id"

    class InstitutionClient(FleetHttpClient):  # type: ignore[misc]
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,
            interceptors: Sequence[Any],
            *,
            retry_invoker: Any = None,
        ) -> Any:
            """Dial with a client certificate; TLS 1.3 and our authority only."""
            tls = ssl.create_default_context(cafile=settings.ca)
            tls.minimum_version = ssl.TLSVersion.TLSv1_3
            tls.load_cert_chain(settings.certificate, settings.key)
            url = f"https://{server_address}"
            return cls(url, interceptors=interceptors, verify=tls, retry_invoker=retry_invoker)

        def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
            """Come online, also right after this node died without a goodbye."""
            response: ActivateNodeResponse
            try:
                response = super().ActivateNode(request)
            except httpx.HTTPStatusError as refusal:
                # Flower takes the dead one for alive for up to 60 s. Its id is our own.
                if refusal.response.status_code != ALREADY_ACTIVE or not known_node.exists():
                    raise
                self.DeactivateNode(DeactivateNodeRequest(node_id=int(known_node.read_text())))
                response = super().ActivateNode(request)
            known_node.write_text(str(response.node_id))
            on_active(response.node_id)
            return response

        def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:
            """Ask every poll_s until there is a message; Flower alone would ask every 3 s."""
            response: PullMessagesResponse = super().PullMessages(request)
            while not response.messages_list:
                time.sleep(settings.poll_s)
                response = super().PullMessages(request)
            return response

        def GetRun(self, request: GetRunRequest) -> GetRunResponse:
            """Take the run's numbers, and nothing that chooses code or its configuration."""
            response: GetRunResponse = super().GetRun(request)
            response.run.primary_task_type = TaskType.SERVER_APP
            response.run.override_config.clear()
            return response

        def GetFab(self, request: GetFabRequest) -> GetFabResponse:
            """The empty bundle, from here: the coordinator is not asked."""
            return GetFabResponse(fab=Fab(hash_str=bundle_sha256, content=bundle))

    return InstitutionClient


class Runner:
    """Hands each message to the parent process and its answer to the SuperNode, one at a time."""

    def __init__(self, state: Any, store: Any, parent: "Pipe") -> None:
        self._state = state
        self._store = store
        self._parent = parent

    def run(self) -> None:
        """Work until the process ends."""
        while True:
            time.sleep(TASK_POLL_S)
            for task in self._state.get_tasks(statuses=[Status.PENDING]):
                self._handle(task)

    def _handle(self, task: Any) -> None:
        if task.type != TaskType.CLIENT_APP or not self._state.claim_task(task.task_id):
            return
        self._state.activate_task(task.task_id)
        if (message := self._message(task)) is None:
            self._state.finish_task(task.task_id, SubStatus.FAILED, "no message")
            return
        try:
            payload = message.content.config_records[RECORD][KEY]
            answer = self._ask_parent(task.task_id, str(payload))
        except (KeyError, ValueError) as error:
            answer = {"error": f"found a message that is not one text: {error!r}"}
        self._state.record_message_processing_end(message.metadata.message_id)
        _insert_message(_reply(message, answer), self._state, self._store)
        outcome = SubStatus.FAILED if "error" in answer else SubStatus.COMPLETED
        self._state.finish_task(task.task_id, outcome, answer.get("error", ""))

    def _message(self, task: Any) -> Message | None:
        """The task's message; None when the SuperNode gave up fetching it."""
        message_id = ""
        while not message_id:
            found = self._state.get_messages_legacy(run_ids=[task.run_id], is_reply=False, limit=1)
            if found:
                message_id = found[0].metadata.message_id
            elif not self._still_running(task):
                return None
            else:
                time.sleep(TASK_POLL_S)
        self._state.record_message_processing_start(message_id)
        contents = self._contents(task, message_id)
        if contents is None:
            return None
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id
        self._store.delete(message_id)
        assert isinstance(message, Message)
        return message

    def _contents(self, task: Any, message_id: str) -> dict[str, bytes] | None:
        """The message's objects, once the SuperNode has fetched them all."""
        tree = self._store.get_object_tree(message_id)
        object_ids = [node.object_id for node in iterate_object_tree(tree)]
        while self._still_running(task):
            contents = {one: self._store.get(one) for one in object_ids}
            if all(contents.values()):
                return contents
            time.sleep(TASK_POLL_S)
        return None

    def _still_running(self, task: Any) -> bool:
        return bool(self._state.get_tasks(task_ids=[task.task_id], statuses=[Status.RUNNING]))

    def _ask_parent(self, task_id: int, payload: str) -> dict[str, str]:
        self._parent.send({"task": str(task_id), "payload": payload})
        while True:
            try:
                answer = self._parent.answers.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                self._state.acknowledge_task_heartbeat(task_id)
                continue
            if answer.pop("task") == str(task_id):
                return answer


def _reply(message: Message, answer: dict[str, str]) -> Message:
    if "error" in answer:
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, answer["error"])
        return Message(error, reply_to=message)
    return Message(RecordDict({RECORD: ConfigRecord({KEY: answer["json"]})}), reply_to=message)


class Pipe:
    """The two ends that lead to the parent process."""

    def __init__(self, lines: Iterable[str], out: IO[str]) -> None:
        self.answers: queue.Queue[dict[str, str]] = queue.Queue()
        self._lines = lines
        self._out = out
        self._lock = threading.Lock()

    def send(self, event: dict[str, str]) -> None:
        """Write one JSON line."""
        with self._lock:
            self._out.write(json.dumps(event) + "\n")
            self._out.flush()

    def read(self) -> None:
        """Queue the parent's answers; when it is gone, leave in good order."""
        for line in self._lines:
            self.answers.put(json.loads(line))
        os.kill(os.getpid(), LEAVE)


def die_with(parent: int) -> None:
    """Make LEAVE a goodbye to the coordinator, and have Linux send it when the parent dies."""
    first = iter((True,))

    def leave(_number: int, _frame: object) -> None:
        # LEAVE may come more than once: from the end of stdin, and from Linux for every thread
        # of the parent, also while this runs. A second SIGTERM would end this process before its
        # goodbye, and what takes a lock (Event.set does) would wait for itself for ever.
        if next(first, False):
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(LEAVE, leave)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, LEAVE)
    if os.getppid() != parent:
        sys.exit("the parent process is gone")


def main() -> None:
    """Read the settings, then be a SuperNode until the parent or the coordinator ends it."""
    settings = Settings(**json.loads(sys.stdin.readline()))
    die_with(settings.parent)
    # Whatever prints must not land between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with open(Path(settings.state_dir) / "supernode.lock", "w") as lock:
        # One node key, one SuperNode: an earlier one may still be saying goodbye.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _serve(settings, Pipe(sys.stdin, out))


def _serve(settings: Settings, parent: Pipe) -> None:
    key = load_pem_private_key(Path(settings.key).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    runner = Runner(states.state(), states.objectstore_factory.store(), parent)
    client = fleet_client(settings, lambda node_id: parent.send({"node": str(node_id)}))
    fleet_http_connection.FleetHttpClient = client
    threading.Thread(target=parent.read, name="parent", daemon=True).start()
    threading.Thread(target=_or_die, args=(runner.run,), name="runner", daemon=True).start()
    start_client_internal(
        state_factory=states,
        server_address=settings.superlink_address,
        node_config={},
        root_certificates=settings.ca,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        isolation=ISOLATION_MODE_PROCESS,
    )


def _or_die(work: Any) -> None:
    """Without its runner a SuperNode would take messages and never answer: end the process."""
    try:
        work()
    except Exception:
        logger.exception("the runner stopped")
        os.kill(os.getpid(), LEAVE)
        raise


if __name__ == "__main__":
    main()
