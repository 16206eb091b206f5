from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("software_version",)
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    software_version: str
    def __init__(self, software_version: _Optional[str] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("engine_address",)
    ENGINE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    engine_address: str
    def __init__(self, engine_address: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("software_version", "clock_unix_ms", "free_disk_bytes", "paused", "expert_version", "expert_steps", "expert_age_s", "working_rounds", "audit_seq", "audit_head", "awaiting_approval")
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLOCK_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FREE_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_STEPS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    WORKING_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_SEQ_FIELD_NUMBER: _ClassVar[int]
    AUDIT_HEAD_FIELD_NUMBER: _ClassVar[int]
    AWAITING_APPROVAL_FIELD_NUMBER: _ClassVar[int]
    software_version: str
    clock_unix_ms: int
    free_disk_bytes: int
    paused: bool
    expert_version: int
    expert_steps: int
    expert_age_s: int
    working_rounds: _containers.RepeatedScalarFieldContainer[str]
    audit_seq: int
    audit_head: str
    awaiting_approval: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, software_version: _Optional[str] = ..., clock_unix_ms: _Optional[int] = ..., free_disk_bytes: _Optional[int] = ..., paused: _Optional[bool] = ..., expert_version: _Optional[int] = ..., expert_steps: _Optional[int] = ..., expert_age_s: _Optional[int] = ..., working_rounds: _Optional[_Iterable[str]] = ..., audit_seq: _Optional[int] = ..., audit_head: _Optional[str] = ..., awaiting_approval: _Optional[_Iterable[str]] = ...) -> None: ...

class Summons(_message.Message):
    __slots__ = ("summoned", "ended_rounds", "beat_interval_s", "audit_seq", "audit_head")
    SUMMONED_FIELD_NUMBER: _ClassVar[int]
    ENDED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    AUDIT_SEQ_FIELD_NUMBER: _ClassVar[int]
    AUDIT_HEAD_FIELD_NUMBER: _ClassVar[int]
    summoned: bool
    ended_rounds: _containers.RepeatedScalarFieldContainer[str]
    beat_interval_s: int
    audit_seq: int
    audit_head: str
    def __init__(self, summoned: _Optional[bool] = ..., ended_rounds: _Optional[_Iterable[str]] = ..., beat_interval_s: _Optional[int] = ..., audit_seq: _Optional[int] = ..., audit_head: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("round_id", "sha256", "size_bytes")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    sha256: str
    size_bytes: int
    def __init__(self, round_id: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("round_id", "participant", "sha256", "size_bytes", "committed_unix_ms", "signed_json")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SIGNED_JSON_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    participant: str
    sha256: str
    size_bytes: int
    committed_unix_ms: int
    signed_json: str
    def __init__(self, round_id: _Optional[str] = ..., participant: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., committed_unix_ms: _Optional[int] = ..., signed_json: _Optional[str] = ...) -> None: ...
