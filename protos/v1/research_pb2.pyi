from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitRoundRequest(_message.Message):
    __slots__ = ("spec_json", "request_id", "order_json")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_JSON_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    request_id: str
    order_json: str
    def __init__(self, spec_json: _Optional[str] = ..., request_id: _Optional[str] = ..., order_json: _Optional[str] = ...) -> None: ...

class RoundRequest(_message.Message):
    __slots__ = ("round_id",)
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    def __init__(self, round_id: _Optional[str] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round_id", "state", "spec_json", "created_unix_ms", "deadline_unix_ms", "detail", "pivot_name", "contributions")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PIVOT_NAME_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    state: str
    spec_json: str
    created_unix_ms: int
    deadline_unix_ms: int
    detail: str
    pivot_name: str
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    def __init__(self, round_id: _Optional[str] = ..., state: _Optional[str] = ..., spec_json: _Optional[str] = ..., created_unix_ms: _Optional[int] = ..., deadline_unix_ms: _Optional[int] = ..., detail: _Optional[str] = ..., pivot_name: _Optional[str] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("participant", "status", "detail", "size_bytes", "report_json")
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    participant: str
    status: str
    detail: str
    size_bytes: int
    report_json: str
    def __init__(self, participant: _Optional[str] = ..., status: _Optional[str] = ..., detail: _Optional[str] = ..., size_bytes: _Optional[int] = ..., report_json: _Optional[str] = ...) -> None: ...

class ListRoundsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRoundsReply(_message.Message):
    __slots__ = ("rounds",)
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    rounds: _containers.RepeatedCompositeFieldContainer[Round]
    def __init__(self, rounds: _Optional[_Iterable[_Union[Round, _Mapping]]] = ...) -> None: ...

class WatchRoundRequest(_message.Message):
    __slots__ = ("round_id", "after_seq")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    round_id: str
    after_seq: int
    def __init__(self, round_id: _Optional[str] = ..., after_seq: _Optional[int] = ...) -> None: ...

class RoundEvent(_message.Message):
    __slots__ = ("seq", "time_unix_ms", "kind", "body_json")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BODY_JSON_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time_unix_ms: int
    kind: str
    body_json: str
    def __init__(self, seq: _Optional[int] = ..., time_unix_ms: _Optional[int] = ..., kind: _Optional[str] = ..., body_json: _Optional[str] = ...) -> None: ...

class ListParticipantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Participant(_message.Message):
    __slots__ = ("name", "joined_unix_ms", "online")
    NAME_FIELD_NUMBER: _ClassVar[int]
    JOINED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    name: str
    joined_unix_ms: int
    online: bool
    def __init__(self, name: _Optional[str] = ..., joined_unix_ms: _Optional[int] = ..., online: _Optional[bool] = ...) -> None: ...

class ListParticipantsReply(_message.Message):
    __slots__ = ("participants",)
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    participants: _containers.RepeatedCompositeFieldContainer[Participant]
    def __init__(self, participants: _Optional[_Iterable[_Union[Participant, _Mapping]]] = ...) -> None: ...

class PivotFile(_message.Message):
    __slots__ = ("name", "sha256", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Pivot(_message.Message):
    __slots__ = ("name", "parent", "round_id", "files", "evals_json", "created_unix_ms", "promotions_needed", "promoted_by")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    EVALS_JSON_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    PROMOTIONS_NEEDED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_BY_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: str
    round_id: str
    files: _containers.RepeatedCompositeFieldContainer[PivotFile]
    evals_json: str
    created_unix_ms: int
    promotions_needed: int
    promoted_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[str] = ..., round_id: _Optional[str] = ..., files: _Optional[_Iterable[_Union[PivotFile, _Mapping]]] = ..., evals_json: _Optional[str] = ..., created_unix_ms: _Optional[int] = ..., promotions_needed: _Optional[int] = ..., promoted_by: _Optional[_Iterable[str]] = ...) -> None: ...

class PromotePivotRequest(_message.Message):
    __slots__ = ("name", "promotion_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROMOTION_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    promotion_json: str
    def __init__(self, name: _Optional[str] = ..., promotion_json: _Optional[str] = ...) -> None: ...

class RollbackPivotRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetPivotRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListPivotsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPivotsReply(_message.Message):
    __slots__ = ("pivots",)
    PIVOTS_FIELD_NUMBER: _ClassVar[int]
    pivots: _containers.RepeatedCompositeFieldContainer[Pivot]
    def __init__(self, pivots: _Optional[_Iterable[_Union[Pivot, _Mapping]]] = ...) -> None: ...

class WhyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WhyReply(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("says", "do")
    SAYS_FIELD_NUMBER: _ClassVar[int]
    DO_FIELD_NUMBER: _ClassVar[int]
    says: str
    do: str
    def __init__(self, says: _Optional[str] = ..., do: _Optional[str] = ...) -> None: ...
