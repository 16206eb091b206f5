"""Standard error has our words alone: gRPC's core is told so before it is loaded."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["cofuse", "coordinator", "participant"])
def test_whichever_package_comes_first_the_core_is_silent(package: str) -> None:
    code = (
        f"import sys, os, {package}\n"
        "print(os.environ.get('GRPC_VERBOSITY'), 'grpc._cython' in sys.modules)"
    )
    bare = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["NONE", "False"]
