"""Program A: enrols participants, schedules rounds, fuses what arrives into the pivot."""

import protos  # noqa: F401 - before anything loads gRPC, whose core it silences
