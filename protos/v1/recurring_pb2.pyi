from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StartRecurringRequest(_message.Message):
    __slots__ = ("spec_json", "request_id", "order_json")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_JSON_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    request_id: str
    order_json: str
    def __init__(self, spec_json: _Optional[str] = ..., request_id: _Optional[str] = ..., order_json: _Optional[str] = ...) -> None: ...

class StopRecurringRequest(_message.Message):
    __slots__ = ("recurring_id",)
    RECURRING_ID_FIELD_NUMBER: _ClassVar[int]
    recurring_id: str
    def __init__(self, recurring_id: _Optional[str] = ...) -> None: ...

class RecurringRounds(_message.Message):
    __slots__ = ("recurring_id", "state", "spec_json", "due_unix_ms", "last_round_id", "detail")
    RECURRING_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    DUE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    recurring_id: str
    state: str
    spec_json: str
    due_unix_ms: int
    last_round_id: str
    detail: str
    def __init__(self, recurring_id: _Optional[str] = ..., state: _Optional[str] = ..., spec_json: _Optional[str] = ..., due_unix_ms: _Optional[int] = ..., last_round_id: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ListRecurringRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRecurringReply(_message.Message):
    __slots__ = ("recurring",)
    RECURRING_FIELD_NUMBER: _ClassVar[int]
    recurring: _containers.RepeatedCompositeFieldContainer[RecurringRounds]
    def __init__(self, recurring: _Optional[_Iterable[_Union[RecurringRounds, _Mapping]]] = ...) -> None: ...
