"""A participant.toml of the least that is taken, for whoever needs one on disk."""

from pathlib import Path
from typing import Any

from protos.config import toml_text


def write_settings(home: Path, **change: Any) -> Path:
    """Write participant.toml into `home`; return its path. Args: change: other or further keys."""
    settings = {
        "name": "st-mary",
        "coordinator": "localhost:1",
        "corpus": "c.jsonl",
        "data_dir": "data",
        "policy": "policy.toml",
        "model": {
            "architecture": "llama",
            "hidden_size": 32,
            "layers": 1,
            "heads": 1,
            "vocab_size": 300,
        },
        "training": {"steps": 1},
        "tls": {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"},
        **change,
    }
    path = home / "participant.toml"
    path.write_text(toml_text(settings), encoding="utf-8")
    return path
