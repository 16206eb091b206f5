"""The front door: command line, SDK for researchers, and the demo.

`from cofuse import Coordinator, FusionRound` works; nothing of it is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import protos  # noqa: F401 - before anything loads gRPC, whose core it silences

if TYPE_CHECKING:
    from cofuse.async_sdk import AsyncCoordinator
    from cofuse.evals import Evals
    from cofuse.fusion_round import FusionRound, RoundFailedError, WaitTimedOutError
    from cofuse.sdk import Coordinator

_FROM: Final = {
    "AsyncCoordinator": "cofuse.async_sdk",
    "Coordinator": "cofuse.sdk",
    "Evals": "cofuse.evals",
    "FusionRound": "cofuse.fusion_round",
    "RoundFailedError": "cofuse.fusion_round",
    "WaitTimedOutError": "cofuse.fusion_round",
}
__all__ = [
    "AsyncCoordinator",
    "Coordinator",
    "Evals",
    "FusionRound",
    "RoundFailedError",
    "WaitTimedOutError",
]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)
