from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
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
    __slots__ = ("round_id", "participant", "sha256", "size_bytes", "committed_unix_ms")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    participant: str
    sha256: str
    size_bytes: int
    committed_unix_ms: int
    def __init__(self, round_id: _Optional[str] = ..., participant: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., committed_unix_ms: _Optional[int] = ...) -> None: ...
