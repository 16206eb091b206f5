"""What can go wrong with a database: for the operator at start, and for callers afterwards."""

from dataclasses import dataclass


class StoreError(Exception):
    """The database cannot be used as it is; says what was found, wanted, and what to do."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A driver's error, sorted."""

    says: str
    """For people: what happened, without SQL."""
    error_id: str = "store_unavailable"
    """Entry of the catalogue in protos/errors.py."""
    retry: bool = False
    """The connection is lost; another may come."""
    fatal: bool = False
    """No later success could be believed: the program must end."""
