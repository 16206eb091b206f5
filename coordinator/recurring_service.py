"""Rounds by the calendar: gRPC in and out; coordinator/recurring.py decides."""

from collections.abc import Callable
from typing import Any

from coordinator.access import caller
from coordinator.clock import now_unix_ms
from coordinator.orders import Orders, checked_request_id
from coordinator.recurring import Recurring, next_due
from coordinator.store import Store
from protos.errors import CofuseError, abort
from protos.recurring import parse_recurring
from protos.spec import RoundSpec, SpecError
from protos.v1 import recurring_pb2 as pb
from protos.v1 import recurring_pb2_grpc


class RecurringService(recurring_pb2_grpc.RecurringServicer):
    """Start, list, stop."""

    def __init__(self, store: Store, check: Callable[[str], RoundSpec], orders: Orders) -> None:
        """Args: check: refuses the JSON of a round's spec that could not be run here."""
        self._orders = orders
        self._store = store
        self._check = check

    def StartRecurring(self, request: pb.StartRecurringRequest, context: Any) -> pb.RecurringRounds:
        """Check the spec against what is here, then store it."""
        try:
            spec = parse_recurring(request.spec_json)
            self._check(spec.round.model_dump_json())
            who, request_id = caller(context), checked_request_id(request.request_id)
            self._orders.check(
                request.order_json,
                who,
                spec_json=request.spec_json,
                request_id=request_id,
                recurring=True,
            )
            row = self._store.add_recurring(
                request_id=request_id,
                submitted_by=who.name,
                spec_json=spec.model_dump_json(),
                due_unix_ms=next_due(spec, now_unix_ms()),
                order_json=request.order_json,
            )
            return _message(row)
        except SpecError as error:
            abort(context, CofuseError("bad_spec", str(error).rstrip(".")))
        except CofuseError as error:
            abort(context, error)

    def ListRecurring(
        self, request: pb.ListRecurringRequest, context: Any
    ) -> pb.ListRecurringReply:
        """All of them, oldest first."""
        return pb.ListRecurringReply(recurring=[_message(row) for row in self._store.recurring()])

    def StopRecurring(self, request: pb.StopRecurringRequest, context: Any) -> pb.RecurringRounds:
        """Make no more rounds of one."""
        try:
            by = caller(context).uri
            row = self._store.stop_recurring(request.recurring_id, f"by {by}", by)
            return _message(row)
        except CofuseError as error:
            abort(context, error)


def _message(row: Recurring) -> pb.RecurringRounds:
    return pb.RecurringRounds(
        recurring_id=row.recurring_id,
        state=row.state,
        spec_json=row.spec_json,
        due_unix_ms=row.due_unix_ms,
        last_round_id=row.last_round_id,
        detail=row.detail,
    )
