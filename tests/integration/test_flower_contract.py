"""Every symbol of flwr that the two engines use and that Flower does not promise to keep.

The engines are written against exactly one release. When one of these fails after an upgrade,
read what moved, then change coordinator/superlink.py or participant/supernode.py.
"""

import ast
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.config import get_fab_config
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TaskType
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.superlink import config_loader
from flwr.superlink.dependencies import linkstate
from flwr.superlink.routers.fleet import router
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.superlink import FLEET_ROUTES
from participant.supernode import empty_bundle
from trust import ca


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def test_the_release_is_the_one_the_engines_were_written_for() -> None:
    assert version("flwr") == "1.41.0"


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(
            "coordinator.superlink", marks=pytest.mark.slow
        ),  # it loads what the next does
        "coordinator.flower_run",
        "participant.supernode",
    ],
)
def test_nothing_phones_home(module: str) -> None:
    """In a process of its own: the switches count only before the first import of flwr."""
    program = (
        f"import sys, {module}, flwr.supercore.telemetry as t\n"
        "sys.exit(f'telemetry {t.FLWR_TELEMETRY_ENABLED}, torch {\"torch\" in sys.modules}')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == "telemetry 0, torch False"
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "module", ["coordinator.superlink", "coordinator.flower_run", "participant.supernode"]
)
def test_the_switches_stand_before_the_first_import_of_flwr(module: str) -> None:
    path = Path(*module.split(".")).with_suffix(".py")
    lines = (Path(__file__).parents[2] / path).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("from flwr"))
    switches = [i for i, line in enumerate(lines) if line.startswith("os.environ[")]
    assert len(switches) == 2
    assert max(switches) < first


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("get_run_info", {"run_ids", "statuses"}),
        ("stop_run", {"run_id"}),
        ("get_node_id_by_public_key", {"public_key"}),
        ("create_node", {"owner_aid", "owner_name", "public_key", "heartbeat_interval", "name"}),
        ("get_node_info", {"node_ids", "statuses"}),
        (
            "create_run",
            {"fab_id", "fab_version", "fab_hash", "override_config", "federation_id"}
            | {"federation_config", "flwr_aid", "primary_task_type"},
        ),
        ("claim_task", {"task_id"}),
        ("activate_task", {"task_id"}),
        ("acknowledge_task_heartbeat", {"task_id"}),
        ("finish_task", {"task_id", "sub_status", "details"}),
        ("start_session", {"run_id"}),
        ("store_message_and_object_tree", {"message", "object_tree", "session_id"}),
        ("store_object", {"run_id", "session_id", "object_id", "object_content"}),
        ("get_message_res", {"message_ids", "run_id"}),
        ("get_object", {"run_id", "object_id"}),
        ("cleanup_run", {"run_id"}),
    ],
)
def test_the_superlink_state_keeps_its_methods(method: str, wanted: set[str]) -> None:
    assert wanted <= parameters(getattr(SqlLinkState, method))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("get_tasks", {"task_ids", "statuses"}),
        ("claim_task", {"task_id"}),
        ("activate_task", {"task_id"}),
        ("acknowledge_task_heartbeat", {"task_id"}),
        ("finish_task", {"task_id", "sub_status", "details"}),
        ("get_messages_legacy", {"run_ids", "is_reply", "limit"}),
        ("record_message_processing_start", {"message_id"}),
        ("record_message_processing_end", {"message_id"}),
    ],
)
def test_the_supernode_state_keeps_its_methods(method: str, wanted: set[str]) -> None:
    assert wanted <= parameters(getattr(InMemoryNodeState, method))


@pytest.mark.parametrize("store", [SqlObjectStore, InMemoryObjectStore])
def test_the_object_stores_keep_their_methods(store: type) -> None:
    assert parameters(store.get_object_tree) == {"object_id"}
    assert parameters(store.get) == {"object_id"}
    assert parameters(store.delete) == {"object_id"}


def test_the_databases_can_be_closed(tmp_path: Path) -> None:
    database = str(tmp_path / "x.sqlite")
    stores, states = config_loader.get_objectstore_linkstate_factories(
        database, config_loader.get_federation_manager()
    )
    assert states.state().object_store is stores.store()
    for opened in (states.state(), stores.store()):
        opened._engine.dispose()


def test_messages_can_be_made_without_the_process_wide_run() -> None:
    assert {"metadata", "content"} <= parameters(make_message)
    assert parameters(remove_content_from_message) == {"message"}
    assert {
        "run_id",
        "message_id",
        "src_node_id",
        "dst_node_id",
        "reply_to_message_id",
        "group_id",
        "created_at",
        "ttl",
        "message_type",
        "src_task_id",
    } <= parameters(Metadata)
    assert {"object_id", "object_contents"} <= parameters(inflate_object_from_contents)
    assert SUPERLINK_NODE_ID == 1


def test_the_fleet_routes_are_there_and_read_the_state_that_is_set() -> None:
    routes = {route.path for route in router.router.routes}
    kept_out = {f"/v1/fleet/{name}" for name in ("register-node", "unregister-node", "get-fab")}
    assert routes == FLEET_ROUTES | kept_out
    assert "linkstate_factory" in inspect.getsource(linkstate.get_linkstate)
    assert "enable_supernode_auth" in inspect.getsource(router.get_enable_supernode_auth)
    assert FLEET_HTTP_PUBLIC_KEY_HEADER == "flwr-public-key"


def test_the_protobuf_fields_are_there() -> None:
    assert {"node", "messages_list"} <= set(PushMessagesRequest.DESCRIPTOR.fields_by_name)
    assert {"primary_task_type", "override_config"} <= set(Run.DESCRIPTOR.fields_by_name)
    assert "public_key" in NodeInfo.DESCRIPTOR.fields_by_name
    assert {TaskType.SERVER_APP, TaskType.CLIENT_APP} == {"flwr-serverapp", "flwr-clientapp"}


def test_the_supernode_can_be_started_with_our_client() -> None:
    assert {
        "state_factory",
        "server_address",
        "node_config",
        "root_certificates",
        "insecure",
        "authentication_keys",
        "isolation",
    } <= parameters(start_client_internal.start_client_internal)
    assert parameters(NodeStateFactory) == {"objectstore_factory"}
    assert list(inspect.signature(start_client_internal._insert_message).parameters) == [
        "msg",
        "state",
        "store",
    ]
    # The connection looks the class up in its module, where the child process replaces it.
    assert fleet_http_connection.FleetHttpClient is FleetHttpClient
    names = {
        node.id
        for node in ast.walk(ast.parse(inspect.getsource(fleet_http_connection)))
        if isinstance(node, ast.Name)
    }
    assert "FleetHttpClient" in names


def test_the_fleet_client_keeps_the_methods_that_are_overridden() -> None:
    assert parameters(FleetHttpClient.from_server_address) == {
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
        "retry_invoker",
    }
    for method in ("ActivateNode", "DeactivateNode", "PullMessages", "GetRun", "GetFab"):
        assert parameters(getattr(FleetHttpClient, method)) == {"request"}


def test_a_node_that_seems_alive_is_refused_with_412() -> None:
    assert API_ERROR_MAP[ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED].http_status_code == 412


def test_the_empty_bundle_satisfies_the_supernode_and_holds_no_code() -> None:
    config = get_fab_config(empty_bundle())
    assert config["tool"]["flwr"]["app"].get("config") is None
    assert b".py" not in empty_bundle().replace(b"pyproject", b"")
    assert empty_bundle() == empty_bundle()


def test_certificate_keys_are_node_keys(tmp_path: Path) -> None:
    ca.create_authority(tmp_path / "ca", "x")
    request = ca.new_identity(tmp_path / "a", "participant", "a")
    pem = ca.sign_request(tmp_path / "ca", request, role="participant", name="a")
    key = load_pem_x509_certificate(pem).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(key)
    assert public_key_to_bytes(key) == ca.public_key_bytes(pem)


def test_the_web_server_hands_its_connection_state_to_the_application() -> None:
    assert "app_state" in parameters(H11Protocol)
    assert '"state": self.app_state.copy()' in inspect.getsource(H11Protocol)


def test_flowers_words_can_be_taken_off_the_console() -> None:
    assert FLOWER_LOGGER.name == "flwr"
    assert console_handler is not None
