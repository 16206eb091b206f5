"""What the courier brings is copied out of its reach, and believed for its digest alone."""

import hashlib
import os
from pathlib import Path

import pytest

from participant.counterparts import take_over
from protos.errors import RemoteError
from protos.messages import FileRef

CONTENT = b"public text\n" * 1000


def reference(size_bytes: int = len(CONTENT)) -> FileRef:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return FileRef(name="prompts.jsonl", sha256=digest, size_bytes=size_bytes)


def test_the_copy_is_another_file(tmp_path: Path) -> None:
    """The courier may still hold the one it brought open, and write into it."""
    brought, final = tmp_path / "inbox", tmp_path / "rounds" / "rnd-1" / "prompts.jsonl"
    brought.write_bytes(CONTENT)
    with brought.open("r+b") as held:
        take_over(brought, final, reference())
        held.write(b"PATIENT")
    assert final.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"", b"z" * len(CONTENT)])
def test_something_else_is_refused_and_nothing_is_left(tmp_path: Path, content: bytes) -> None:
    brought, final = tmp_path / "inbox", tmp_path / "rounds" / "prompts.jsonl"
    brought.write_bytes(content)
    with pytest.raises(RemoteError, match="brought something else"):
        take_over(brought, final, reference())
    assert list(final.parent.iterdir()) == []


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path: Path) -> None:
    secret, final = tmp_path / "secret", tmp_path / "rounds" / "prompts.jsonl"
    secret.write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        take_over(tmp_path / "link", final, reference())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RemoteError, match="brought something else"):
        take_over(tmp_path / "pipe", final, reference())
    assert not final.exists()
