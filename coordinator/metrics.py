"""What the coordinator counts while it works. coordinator/figures.py adds what is on its disk.

Names and labels are a promise to whoever has alerts on them: docs/operator.md lists them.
"""

from typing import Final

import grpc
from prometheus_client import Counter, Histogram

_DENIED: Final = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED})
RPC_SECONDS: Final = Histogram(
    "fed_rpc_seconds",
    "Duration of the calls that ended, by method and gRPC status.",
    ["method", "code"],
    # To an hour: an upload over a slow link is one call.
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 120, 600, 3600),
    registry=None,
)
AUTH_DENIED: Final = Counter(
    "fed_auth_denied", "Calls refused for who made them.", ["reason"], registry=None
)
UPLOAD_BYTES: Final = Counter(
    "fed_upload_bytes", "Bytes received in uploads, those sent again too.", registry=None
)
UPLOAD_RESUMES: Final = Counter(
    "fed_upload_resumes", "Uploads that went on after an interruption.", registry=None
)
DB_COMMIT_SECONDS: Final = Histogram(
    "fed_db_commit_seconds",
    "Duration of the database's writing transactions, waiting for their turn included.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
    registry=None,
)
LIVE: Final = (RPC_SECONDS, AUTH_DENIED, UPLOAD_BYTES, UPLOAD_RESUMES, DB_COMMIT_SECONDS)


def observe_rpc(method: str, code: grpc.StatusCode, seconds: float) -> None:
    """Count one call that has ended.

    Args: method: full name of one that is served, never what a caller made up. seconds: >= 0.
    """
    RPC_SECONDS.labels(method, code.name).observe(seconds)
    if code in _DENIED:
        AUTH_DENIED.labels(code.name.lower()).inc()
