"""The role table covers the wire, and grants nothing to nobody."""

import importlib
import pkgutil

import pytest
from grpc_health.v1 import health_pb2

import protos.v1
from coordinator.access import ANYBODY, GET_KINDS, PUT_ROLES, ROLES, require_grant
from protos.errors import CofuseError
from protos.v1 import transfer_pb2


def test_the_table_names_every_call_of_every_proto_and_no_other() -> None:
    modules = [
        importlib.import_module(f"protos.v1.{found.name}")
        for found in pkgutil.iter_modules(protos.v1.__path__)
        if found.name.endswith("_pb2")
    ]
    calls = {
        f"/{service.full_name}/{method.name}"
        for module in [health_pb2, *modules]
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert len(modules) > 4
    assert set(ROLES) == calls


def test_every_row_grants_members_or_strangers_and_never_both() -> None:
    members = {"participant", "researcher", "operator"}
    for method, roles in ROLES.items():
        assert roles, method
        assert roles <= members or roles == {ANYBODY}, method


@pytest.mark.parametrize("method", ["/cofuse.v1.Fleet/New", "", "Join"])
def test_what_the_table_does_not_name_is_nobodys(method: str) -> None:
    for role in ("participant", "researcher", "operator", "coordinator", ANYBODY, ""):
        with pytest.raises(CofuseError, match="not for the role"):
            require_grant(method, role)


def test_every_kind_of_file_has_somebody_who_may_put_it_and_contributions_no_reader() -> None:
    kinds = set(transfer_pb2.ArtifactKind.keys()) - {"ARTIFACT_KIND_UNSPECIFIED"}
    assert set(PUT_ROLES) == kinds
    assert all(roles for roles in PUT_ROLES.values())
    assert not any("CONTRIBUTION" in kinds for kinds in GET_KINDS.values())
