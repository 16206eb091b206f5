"""Landlock by its three system calls: a process gives up rights, for itself and all its children.

Nothing here needs a privilege. What a kernel is too old for is left out of what is asked of it, so
the answer says which rights are gone. Rights belong to files as they are, not to names: of a file
that is replaced later, the new one is reached only through a rule on its folder.
Source: the kernel's own userspace-api/landlock; ABI 1 (Linux 5.13) to 6 (6.12).
"""

import ctypes
import os
import struct
from collections.abc import Iterable, Mapping
from enum import IntFlag
from pathlib import Path
from typing import Final

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same on every architecture
_ASK_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
TCP_ABI: Final = 4
"""From here on it closes TCP."""
SCOPE_ABI: Final = 6
"""From here on it closes abstract Unix sockets and signals to other processes."""
_BIND, _CONNECT = 1 << 0, 1 << 1
_SCOPES: Final = 0b11  # abstract Unix sockets, signals


class Right(IntFlag):
    """What may be done with files."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14


NOTHING: Final = Right(0)
READ: Final = Right.EXECUTE | Right.READ_FILE | Right.READ_DIR
MAKE_DEVICES: Final = Right.MAKE_CHAR | Right.MAKE_BLOCK
WRITE: Final = (
    Right.WRITE_FILE
    | Right.TRUNCATE
    | Right.REMOVE_DIR
    | Right.REMOVE_FILE
    | Right.MAKE_DIR
    | Right.MAKE_REG
    | Right.MAKE_SOCK
    | Right.MAKE_FIFO
    | Right.MAKE_SYM
    | Right.REFER
)
"""All that changes something, but for making devices, which nobody needs."""
_ON_FILES: Final = Right.EXECUTE | Right.WRITE_FILE | Right.READ_FILE | Right.TRUNCATE
_SINCE: Final[Mapping[Right, int]] = {Right.REFER: 2, Right.TRUNCATE: 3}

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def abi() -> int:
    """The version of Landlock that this kernel has; 0: none, or it is switched off."""
    return max(0, int(_LIBC.syscall(_CREATE, None, ctypes.c_size_t(0), _ASK_VERSION)))


def restrict(given_up: Right, allowed: Iterable[tuple[Path, Right]], *, tcp: bool) -> None:
    """Give up rights on all files but those allowed, and the right to listen on TCP; for good.

    Processes that are not our children get no signal of ours any more, and no abstract Unix socket
    of theirs is reached, where the kernel knows how. Call it while the process has one thread:
    others keep what they have.
    Args: allowed: files and folders, each with what lies beneath; one that is missing is left out.
        tcp: whether TCP may still be dialled.
    Raises: OSError: the kernel refuses, and nothing is given up.
    """
    version = abi()
    handled = given_up & _known(version)
    if not handled and version < TCP_ABI:
        return  # this kernel could close nothing of what is to be closed
    rules = struct.pack("=Q", handled)
    if version >= TCP_ABI:
        rules += struct.pack("=Q", _BIND if tcp else _BIND | _CONNECT)
    if version >= SCOPE_ABI:
        rules += struct.pack("=Q", _SCOPES)
    ruleset = _call(_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    try:
        for path, rights in allowed:
            _allow(ruleset, path, rights & handled)
        if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise _error()
        _call(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _known(version: int) -> Right:
    known = READ | WRITE | MAKE_DEVICES
    for right, since in _SINCE.items():
        if version < since:
            known &= ~right
    return known


def _allow(ruleset: int, path: Path, rights: Right) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not path.is_dir():
            rights &= _ON_FILES
        if rights:
            rule = struct.pack("=Qi", rights, place)
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: object) -> int:
    done = int(_LIBC.syscall(number, *arguments))
    if done < 0:
        raise _error()
    return done


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
