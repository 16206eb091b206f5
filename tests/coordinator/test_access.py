"""The role table covers the wire, and grants nothing to nobody."""

from grpc_health.v1 import health_pb2

from coordinator.access import GET_KINDS, PUT_ROLES, ROLES
from protos.v1 import fleet_pb2, recurring_pb2, research_pb2, transfer_pb2


def test_the_table_names_every_call_and_no_other() -> None:
    calls = {
        f"/{service.full_name}/{method.name}"
        for module in (fleet_pb2, health_pb2, recurring_pb2, research_pb2, transfer_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(ROLES) == calls


def test_every_kind_of_file_has_somebody_who_may_put_it_and_contributions_no_reader() -> None:
    kinds = set(transfer_pb2.ArtifactKind.keys()) - {"ARTIFACT_KIND_UNSPECIFIED"}
    assert set(PUT_ROLES) == kinds
    assert all(roles for roles in PUT_ROLES.values())
    assert not any("CONTRIBUTION" in kinds for kinds in GET_KINDS.values())
