"""Program B: trains a private expert and ships only what its policy allows.

It dials out and listens on nothing.
"""

import protos  # noqa: F401 - before anything loads gRPC, whose core it silences
