"""The folder of a participant as it is before anybody has edited it: it allows nothing."""

from pathlib import Path
from typing import Any, Final

from participant.config import ParticipantConfig
from protos.config import checked, toml_text

POLICY: Final = """\
# What may leave this institution. What no rule below allows, is refused.
# The file is read anew for each round; one that cannot be read allows nothing.
version = 2

# One [[allow]] for each purpose you agree to. A round must fit exactly one of them.
[[allow]]
purpose = "general"      # as the round says it; "*": any
submitters = ["*"]       # researchers by name; "*": all whom the coordinator lets in
kinds = []               # what may leave; nothing until you name some of
                         #   "logits"   top-K log-probabilities of the expert on public prompts
                         #   "pairs"    how likely the expert finds answers of public pairs
                         #   "scores"   the expert's own scores, a few numbers
                         #   "grown"    as logits, of a received pivot that read our text first
                         #   "weights"  of a pivot trained here; they tell more than logits
prompt_sets = ["*"]      # public texts that may be asked about: "sha256:..."; "*": any
approval = "manual"      # each release waits for `cofuse approve`; "auto": none does
# not_after = 2027-12-31 # the last day on which this rule holds, UTC

[logits]
k_max = 16                   # log-probabilities per position
positions_per_round = 200000 # a position is one token of public text, or of an answer
positions_per_30d = 2000000  # over all rounds of thirty days
releases_per_prompt = 4      # rounds that may ever ask about one prompt set

[weights]
enabled = false          # weights need this as well as a rule

[prompts]                # "block", "warn" or "off", when a prompt set
overlap = "block"        #   shares thirteen words in a row with our text
phi = "block"            #   holds what looks like a person's data

[gates]                  # "block", "warn" or "off", when a release tells
canaries = "block"       #   of the invented records planted in our text
"""


def first_settings(home: Path, name: str, coordinator: str, corpus: Path) -> dict[str, Any]:
    """What participant.toml will hold, checked before anything is made.

    Args: coordinator: host:port. corpus: the text; its absolute path is written.
    Raises: ConfigError.
    """
    settings = {
        "name": name,
        "coordinator": coordinator,
        "corpus": str(corpus.resolve()),
        "data_dir": "data",
        "policy": "policy.toml",
        "canaries": True,
        "model": {
            "architecture": "llama",
            "hidden_size": 256,
            "layers": 6,
            "heads": 8,
            "vocab_size": 8192,
        },
        "training": {"steps": 1000, "decay_steps": 300},
        "tls": {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"},
    }
    checked(home / "participant.toml", settings, ParticipantConfig)
    return settings


def lay_out(home: Path, settings: dict[str, Any]) -> None:
    """Write participant.toml and policy.toml beside the identity's files."""
    (home / "participant.toml").write_text(toml_text(settings), encoding="utf-8")
    (home / "policy.toml").write_text(POLICY, encoding="utf-8")
