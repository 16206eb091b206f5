"""Transfers over networks that cut, crawl, go silent and lie, over real mutual TLS."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protos.chunks import CHUNK_BYTES, sha256_of
from protos.errors import RemoteError
from protos.messages import FileRef
from protos.v1 import transfer_pb2
from tests.integration.transfer_site import MIB, Site, make_file, start_site

__all__ = ["start_site"]


def upload(site: Site, path: Path, sha256: str, **settings: float) -> None:
    """Put a contribution and look that it is there, byte for byte."""
    site.client(**settings).put(path, sha256, transfer_pb2.CONTRIBUTION)
    assert sha256_of(site.artifacts.path(sha256)) == sha256


def check_cuts(site: Site, folder: Path, size_bytes: int, cuts: int) -> None:
    """Upload through `cuts` resets at random bytes; count what went up twice."""
    path, sha256 = make_file(folder, size_bytes)
    dice = random.Random(0)
    mean = size_bytes // (cuts + 1)
    site.proxy.cuts = iter([dice.randint(mean // 2, mean) for _ in range(cuts)])
    upload(site, path, sha256)
    assert site.proxy.resets == cuts
    assert site.proxy.up_bytes - size_bytes <= cuts * 4 * MIB + 0.01 * size_bytes


def test_an_upload_cut_many_times_sends_little_twice(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    check_cuts(start_site(), tmp_path, 40 * MIB, 5)


@pytest.mark.slow
def test_a_gigabyte_cut_fifty_times_sends_little_twice(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    check_cuts(start_site(), tmp_path, 1024 * MIB, 50)


@pytest.mark.slow
def test_a_slow_link_that_resets_is_not_given_up_while_bytes_advance(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    """It takes several times the idle limit, and patience would not outlast it either."""
    site = start_site(idle_s=3.0)
    path, sha256 = make_file(tmp_path, 5 * MIB)
    site.proxy.bytes_per_s, site.proxy.latency_s = 1.0 * MIB, 0.002
    site.proxy.cuts = iter([int(1.5 * MIB), 2 * MIB])
    begun = time.monotonic()
    upload(site, path, sha256, idle_s=3.0, patience_s=3.0)
    assert time.monotonic() - begun > 4.0


def test_a_stall_is_said_the_slot_is_freed_and_the_rest_follows_once_it_is_over(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = start_site(idle_s=1.5)
    path, sha256 = make_file(tmp_path, 24 * MIB)
    site.proxy.bytes_per_s = 12.0 * MIB

    def stall_half_way() -> None:
        while site.proxy.up_bytes < 8 * MIB:
            threading.Event().wait(0.01)
        site.proxy.blackhole()

    threading.Thread(target=stall_half_way, daemon=True).start()
    with pytest.raises(RemoteError, match=r"nothing moved|not reached") as caught:
        upload(site, path, sha256, idle_s=1.0, patience_s=0.1)
    assert caught.value.error_id in ("stalled", "unreachable")
    assert "address and network" in str(caught.value) or "the network" in str(caught.value)
    received = site.artifacts.received_bytes(sha256, "participant_a")
    assert 0 < received < 24 * MIB
    deadline = time.monotonic() + 10
    while any(t.name == "read-ahead" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the server still holds the silent stream"
        threading.Event().wait(0.05)
    site.proxy.bytes_per_s = 0.0
    site.proxy.reset()  # what it held back is lost
    site.proxy.heal()
    site.proxy.up_bytes = 0
    upload(site, path, sha256)
    assert site.proxy.up_bytes <= 24 * MIB - received + MIB


def test_every_flipped_bit_on_the_wire_is_found(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = start_site()
    path, sha256 = make_file(tmp_path, 12 * MIB)
    site.proxy.flips = iter([int(2.3 * MIB)] * 4)
    upload(site, path, sha256)
    assert site.proxy.flipped == 4


def test_a_download_resumes_over_cuts_and_flips(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = start_site()
    path, sha256 = make_file(tmp_path, 10 * MIB + 17)
    site.artifacts.add(path, sha256)
    site.store.add_artifact(sha256, "coordinator", "PIVOT", path.stat().st_size)
    file = FileRef(name="model.safetensors", sha256=sha256, size_bytes=path.stat().st_size)
    site.proxy.bytes_per_s = 20.0 * MIB
    client = site.client()
    for pause_s in (0.15, 0.35):
        threading.Timer(pause_s, site.proxy.reset).start()
    got = client.get(file, tmp_path / "pivot")
    assert sha256_of(got) == sha256
    assert [p.name for p in (tmp_path / "pivot").iterdir()] == ["model.safetensors"]


def test_a_partial_download_that_decayed_is_begun_anew(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = start_site()
    path, sha256 = make_file(tmp_path, 3 * CHUNK_BYTES)
    site.artifacts.add(path, sha256)
    site.store.add_artifact(sha256, "coordinator", "PIVOT", path.stat().st_size)
    file = FileRef(name="m", sha256=sha256, size_bytes=path.stat().st_size)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{sha256}.part").write_bytes(b"?" * CHUNK_BYTES)
    assert sha256_of(site.client().get(file, tmp_path / "in")) == sha256


@pytest.mark.parametrize("noticed", [True, False])
def test_a_file_that_changes_after_it_was_named_is_refused_at_its_sender(
    start_site: Callable[..., Site], tmp_path: Path, noticed: bool
) -> None:
    site = start_site()
    path, sha256 = make_file(tmp_path, 2 * MIB)
    if noticed:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    else:  # as when it changes after the first look at it, or within a tick of the clock
        before = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RemoteError, match="changed after it was named") as caught:
        upload(site, path, sha256)
    assert caught.value.error_id == "wrong_digest"
    assert not site.artifacts.has(sha256)
