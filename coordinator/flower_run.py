"""One Flower run: messages to nodes and what comes back, on Flower's own state, in process."""

import os

# flwr reads these two switches when it is first imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError

from coordinator.engine import MAX_PAYLOAD_BYTES, EngineError, Reply

logger = logging.getLogger(__name__)

# A record of this name, with one text under this key, is the whole content of every message.
RECORD: Final = "cofuse"
KEY: Final = "json"
MESSAGE_TYPE: Final = "train"
# A message is three objects: itself, its records, the one record.
MAX_OBJECTS: Final = 4
HEARTBEAT_S: Final = 10.0
LOST_S: Final = 20.0
"""A participant that has been idle for so long since its message left did not get it."""
AGAIN_S: Final = 2.0
"""Before a message that was lost goes out again."""
# What a participant says itself; every other error is Flower telling that a message was lost.
_OWN_ERRORS: Final = frozenset({ErrorCode.CLIENT_APP_RAISED_EXCEPTION})


_LOST: Final = Reply(None, "the answer came without its content", lost=True)


class Run:
    """One Flower run: its task is claimed by this process, so nothing else executes it."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.run_id: int = state.create_run(
            fab_id="cofuse/round",
            fab_version="1",
            fab_hash=None,
            override_config={},
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        runs = state.get_run_info(run_ids=[self.run_id])
        if not runs or not state.claim_task(runs[0].primary_task_id):
            raise EngineError("Flower made no run: look at the coordinator's log")
        self._task_id: int = runs[0].primary_task_id
        if not state.activate_task(self._task_id):
            raise EngineError("Flower did not start the run: look at the coordinator's log")
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S
        self.open_messages: dict[str, int] = {}
        self._incomplete: dict[str, Message] = {}

    def send(self, node: int, payload: str, *, ttl_s: float) -> None:
        """Queue one message for a node; Flower keeps it for ttl_s seconds."""
        self.heartbeat()  # sending to hundreds may take longer than Flower waits for one
        content = RecordDict({RECORD: ConfigRecord({KEY: payload})})
        message = make_message(self._metadata(node, ttl_s), content)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self._state.start_session(self.run_id)
        stored, missing = self._state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session
        )
        if not stored:
            raise EngineError(f"Flower took no message for node {node}: look at the log")
        objects = get_all_nested_objects(message)
        for object_id in missing:
            self._state.store_object(self.run_id, session, object_id, objects[object_id].deflate())
        self.open_messages[message.metadata.message_id] = node

    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Replies that have arrived whole since the last call; each is given once."""
        if asked := set(self.open_messages) - set(self._incomplete):
            for message in self._state.get_message_res(message_ids=asked, run_id=self.run_id):
                self._incomplete[message.metadata.reply_to_message_id] = message
        for message_id, message in list(self._incomplete.items()):
            self.heartbeat()
            if message_id not in self._incomplete:
                continue  # forgotten just now: its node got two messages, and answered both
            if (reply := self._read(message)) is not None:
                del self._incomplete[message_id]
                yield self.open_messages.pop(message_id), reply

    def forget(self, node: int) -> None:
        """Take no further answer of a node."""
        for message_id in [one for one, to in self.open_messages.items() if to == node]:
            del self.open_messages[message_id]
            self._incomplete.pop(message_id, None)

    def heartbeat(self) -> None:
        """Tell Flower, every HEARTBEAT_S, that the run's task is alive."""
        if time.monotonic() < self._heartbeat_due:
            return
        if not self._state.acknowledge_task_heartbeat(self._task_id):
            raise EngineError(f"Flower has ended run {self.run_id}: issue a new attempt")
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S

    def close(self, *, completed: bool) -> None:
        """End the run and drop its messages; later replies to it are refused by Flower."""
        outcome = SubStatus.COMPLETED if completed else SubStatus.STOPPED
        self._state.finish_task(self._task_id, outcome, "")
        self._state.cleanup_run(self.run_id)

    def _metadata(self, node: int, ttl_s: float) -> Metadata:
        # Message(...) would read the run from a process-wide variable; several runs live here.
        return Metadata(
            run_id=self.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=max(ttl_s, 1.0),
            message_type=MESSAGE_TYPE,
            src_task_id=self._task_id,
        )

    def _read(self, message: Message) -> Reply | None:
        """The reply, or None while its objects are still on the way."""
        if message.has_error():
            words = f"code {message.error.code}: {message.error.reason}"
            return Reply(None, words, lost=message.error.code not in _OWN_ERRORS)
        reply_id = message.metadata.message_id
        try:
            tree = self._state.object_store.get_object_tree(reply_id)
        except NoObjectInStoreError:
            return _LOST
        object_ids = [node.object_id for node in iterate_object_tree(tree)]
        if len(object_ids) > MAX_OBJECTS:
            return Reply(None, f"found a reply of {len(object_ids)} objects, wanted 3")
        contents = {one: self._state.get_object(self.run_id, one) for one in object_ids}
        if None in contents.values():
            return _LOST
        if b"" in contents.values():
            return None
        return reply_of(reply_id, contents)


class Post:
    """What one delivery has sent to whom, and what it must send again."""

    def __init__(
        self, run: Run, waiting: dict[int, str], idle_s: Callable[[int], float], ends: float
    ) -> None:
        """Args: waiting: node -> message; those that have replied are taken out."""
        self._run = run
        self._waiting = waiting
        self._idle_s = idle_s
        self._ends = ends
        self._due = dict.fromkeys(waiting, 0.0)  # node -> when it may be sent; inf: it is out
        self._sent: dict[int, float] = {}

    def send(self, online: Collection[int]) -> None:
        """Send what is due to whoever is there."""
        now = time.monotonic()
        for node in self._waiting.keys() & online:
            if self._due[node] <= now or self._silently_lost(node, now):
                self._run.send(node, self._waiting[node], ttl_s=self._ends - now)
                self._sent[node], self._due[node] = now, math.inf

    def take(self) -> Iterator[tuple[int, Reply]]:
        """The first answer of each node; a message that Flower lost becomes due again."""
        for node, reply in self._run.replies():
            if reply.lost:
                logger.warning("node %s: %s; sending again", node, reply.error)
                self._due[node] = time.monotonic() + AGAIN_S
            elif self._waiting.pop(node, None) is not None:
                self._run.forget(node)
                yield node, reply

    def _silently_lost(self, node: int, now: float) -> bool:
        lost = min(self._idle_s(node), now - self._sent[node]) > LOST_S
        if lost:
            logger.warning("node %s has nothing in hand: its message was lost", node)
        return lost


def reply_of(reply_id: str, contents: dict[str, bytes]) -> Reply:
    """Read an answer; whatever it is, its sender is answerable for it."""
    try:
        message = inflate_object_from_contents(reply_id, contents)
        payload = message.content.config_records[RECORD][KEY]
    except Exception as error:  # noqa: BLE001 - hostile bytes may make Flower's parser raise anything
        return Reply(None, f"found a reply that is not one text: {error!r}")
    if not isinstance(payload, str) or len(payload) > MAX_PAYLOAD_BYTES:
        return Reply(None, f"found a reply that is not a text of {MAX_PAYLOAD_BYTES} bytes at most")
    return Reply(payload)
