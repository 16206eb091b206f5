"""What every request keeps to, whatever its fields mean.

Read from the message's descriptor, so that a field that comes tomorrow is bounded already.
"""

from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protos.errors import CofuseError

MAX_TEXT_CHARS: Final = 256
"""Of an id, a name, a version."""
MAX_JSON_CHARS: Final = 1024 * 1024
"""Of a field whose name ends in _json."""
MAX_ITEMS: Final = 1024
MAX_INTEGER: Final = 2**63 - 1
"""SQL's largest."""

_F = FieldDescriptor
_INTEGERS: Final = frozenset({_F.CPPTYPE_INT64, _F.CPPTYPE_UINT64})


def check_bounds(message: Message, place: str = "") -> None:
    """Refuse a message with a field that is too long, too large, or not printable.

    Bytes are not looked at: the largest message of the wire bounds them (protos/tls.py).

    Raises: CofuseError bad_request, naming the field.
    """
    for field in message.DESCRIPTOR.fields:
        name = f"{place}{field.name}"
        if field.cpp_type == _F.CPPTYPE_MESSAGE and not field.is_repeated:
            if message.HasField(field.name):
                check_bounds(getattr(message, field.name), f"{name}.")
        elif field.type != _F.TYPE_BYTES:
            value = getattr(message, field.name)
            values = list(value) if field.is_repeated else [value]
            if len(values) > MAX_ITEMS:
                raise _refusal(name, f"{len(values)} items", f"at most {MAX_ITEMS}")
            for number, item in enumerate(values):
                _check(field, f"{name}[{number}]" if field.is_repeated else name, item)


def _check(field: Any, name: str, value: object) -> None:
    if isinstance(value, Message):
        check_bounds(value, f"{name}.")
    elif isinstance(value, str):
        _check_text(name, value, is_json=field.name.endswith("_json"))
    elif field.enum_type is not None and value not in field.enum_type.values_by_number:
        known = ", ".join(sorted(field.enum_type.values_by_name))
        raise _refusal(name, str(value), f"one of {known}")
    elif field.cpp_type in _INTEGERS and isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise _refusal(name, str(value), f"at most {MAX_INTEGER}")


def _check_text(name: str, value: str, *, is_json: bool) -> None:
    most = MAX_JSON_CHARS if is_json else MAX_TEXT_CHARS
    if len(value) > most:
        raise _refusal(name, f"{len(value)} characters", f"at most {most}")
    text = value.translate({ord(c): " " for c in "\t\n\r"}) if is_json else value
    if not text.isprintable():
        odd = next(c for c in text if not c.isprintable())
        raise _refusal(name, f"the character {odd!r}", "printable characters")


def _refusal(name: str, found: str, wanted: str) -> CofuseError:
    return CofuseError("bad_request", f"{name}: found {found}, wanted {wanted}")
