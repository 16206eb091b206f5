from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AuthorityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuthorityReply(_message.Message):
    __slots__ = ("certificate_pem",)
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ...) -> None: ...

class RedeemRequest(_message.Message):
    __slots__ = ("invitation", "secret", "request_pem")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_PEM_FIELD_NUMBER: _ClassVar[int]
    invitation: str
    secret: str
    request_pem: bytes
    def __init__(self, invitation: _Optional[str] = ..., secret: _Optional[str] = ..., request_pem: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Issued(_message.Message):
    __slots__ = ("certificate_pem", "pivot_signer_pem", "fusion_worker_pem")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    PIVOT_SIGNER_PEM_FIELD_NUMBER: _ClassVar[int]
    FUSION_WORKER_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    pivot_signer_pem: bytes
    fusion_worker_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., pivot_signer_pem: _Optional[bytes] = ..., fusion_worker_pem: _Optional[bytes] = ...) -> None: ...
