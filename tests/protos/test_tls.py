"""Who dials the wrong name or port reads what to dial instead."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.tls import reason
from trust.ca import create_authority, new_identity, sign_request


@pytest.mark.parametrize(
    ("host", "says"),
    [("127.0.0.1", "dial one that it has"), ("localhost", "usually 7443")],
)
def test_grpcs_words_for_a_wrong_name_and_a_wrong_port_become_ours(
    tmp_path: Path, host: str, says: str
) -> None:
    create_authority(tmp_path / "ca", "test")
    request = new_identity(tmp_path / "hub", "coordinator", "hub")
    pem = sign_request(
        tmp_path / "ca", request, role="coordinator", name="hub", hosts=("localhost",)
    )
    shown = grpc.ssl_server_credentials([((tmp_path / "hub" / "key.pem").read_bytes(), pem)])
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", shown)
    server.start()
    trusted = grpc.ssl_channel_credentials((tmp_path / "ca" / "ca.pem").read_bytes())
    with grpc.secure_channel(f"{host}:{port}", trusted) as channel:
        call = channel.unary_unary("/not/There")  # type: ignore[call-overload, unused-ignore]
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=30)
    server.stop(None)
    assert says in reason(caught.value.details())


def test_other_words_stay() -> None:
    assert reason("Connection refused") == "Connection refused"
    assert reason(None) == "no reason given"
