"""The contract between the programs: messages, round specs, errors, chunk streams. A leaf."""

import os
from typing import Final

# gRPC's C core writes each failed handshake to stderr; our own errors say it once, with the cure.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

VERSION: Final = "0.1.0"
"""Of the software, as in pyproject.toml; a beat says it."""
