"""Whether a round is what its submitter ordered, by the submitter's own signature.

`submitted_by` is the coordinator's word; the order is the submitter's. An order for one round is
carried out once: the round that it came for is kept, by the order's nonce.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from participant.durable import write_durably
from participant.policy import PolicyRefusalError
from protos.files import flush
from protos.messages import Assignment
from protos.recurring import parse_recurring
from protos.spec import RoundSpec, SpecError, parse_spec
from trust.orders import open_order
from trust.statements import Order, StatementError

FOLDER: Final = "orders"
"""Of the data folder: a file for each order that was carried out, holding its round."""


def believe(assignment: Assignment, authority: Path, taken: Path, now_unix_ms: int) -> None:
    """Return when the submitter has ordered exactly this round, for the first time.

    Args: authority: ca.pem. taken: the folder of orders that were carried out.
    Raises: PolicyRefusalError, OSError.
    """
    if not assignment.order:
        raise PolicyRefusalError("the round has no order that its submitter signed")
    now = datetime.fromtimestamp(now_unix_ms / 1000, UTC)
    try:
        order = open_order(assignment.order, authority.read_bytes(), now)
        ordered = _ordered(order, assignment.spec)
    except (StatementError, SpecError) as error:
        raise PolicyRefusalError("the round's order is not to be believed", str(error)) from error
    if order.submitted_by.rpartition("/")[2] != assignment.submitted_by:
        raise PolicyRefusalError("the round's order is another submitter's")
    if ordered != assignment.spec:
        raise PolicyRefusalError("the round is not what its submitter ordered")
    if not order.recurring:
        _take(order, assignment, taken)


def _ordered(order: Order, found: RoundSpec) -> RoundSpec:
    """The round that was ordered. Rounds by the calendar start from the newest pivot each."""
    if not order.recurring:
        return parse_spec(order.spec)
    return parse_recurring(order.spec).round.model_copy(update={"pivot": found.pivot})


def _take(order: Order, assignment: Assignment, taken: Path) -> None:
    path = taken / f"{assignment.submitted_by}.{order.nonce}"
    if not path.exists():
        if not taken.exists():
            taken.mkdir(parents=True)
            flush(taken.parent)
        write_durably(path, assignment.round_id)
    elif path.read_text(encoding="utf-8") != assignment.round_id:
        raise PolicyRefusalError("the round's order was carried out before, as another round")
