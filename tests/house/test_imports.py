"""What a program loads is part of its promise."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "never"),
    [
        # Each of these makes a restart longer for everybody who waits.
        ("coordinator.wiring", ("torch", "numpy", "flwr", "alembic", "sqlalchemy.orm", "rich")),
        ("coordinator.opener", ("torch", "sqlalchemy", "rich")),
        ("participant.daemon", ("grpc", "numpy", "pydantic", "torch", "flwr", "rich")),
        ("participant.trainer", ("flwr",)),
        ("participant.loop", ("torch", "transformers", "flwr", "croniter", "rich")),
        ("participant.courier", ("torch", "numpy", "transformers", "flwr")),
        ("cofuse.cli", ("torch", "flwr", "transformers", "matplotlib")),
        ("fusion.codec", ("torch",)),
    ],
)
def test_a_module_does_not_load(module: str, never: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
