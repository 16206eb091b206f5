"""A Python of a test's own, with tools that others use on a pivot and we do not bring along."""

import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest


def python_with(home: Path, *packages: str) -> Path:
    """Make a virtual environment that has the packages, and torch and transformers from here.

    Skips the test where they cannot be installed.
    """
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = "\n".join(site.getsitepackages())
    (home / "lib" / version / "site-packages" / "ours.pth").write_text(ours)
    words = [str(python), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{', '.join(packages)} cannot be installed: {done.stderr[-300:]}")
    return python
