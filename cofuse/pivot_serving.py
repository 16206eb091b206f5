"""How a pivot is served, by servers that others write: transformers here, vLLM on a GPU host."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NEEDS: Final = ("fastapi", "uvicorn", "openai")
"""What `transformers serve` imports beside transformers."""
_RUN: Final = "from transformers.cli.transformers import main; main()"


@dataclass(frozen=True, slots=True)
class Server:
    """A program that answers by the OpenAI API."""

    command: Sequence[str]
    """What a person would type."""
    program: Sequence[str]
    """The same, by this Python."""
    environment: Mapping[str, str]


def transformers_server(folder: Path, host: str, port: int, cache: Path) -> Server:
    """`transformers serve`. Args: cache: any folder that exists: its list of models reads one."""
    words = ["serve", str(folder), "--host", host, "--port", str(port)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_CACHE": str(cache)}
    program = [sys.executable, "-c", _RUN, *words]
    return Server(["transformers", *words], program, {**os.environ, **quiet})


def vllm_line(folder: Path) -> str:
    """What to type on a GPU host that has vLLM."""
    words = ["vllm", "serve", str(folder), "--served-model-name", folder.resolve().name]
    return shlex.join(words)


def missing() -> list[str]:
    """The packages that the server needs and that are not here."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]
