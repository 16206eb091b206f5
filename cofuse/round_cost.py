"""What a round would ask of each participant, before anybody has done anything.

Positions and bytes follow from the prompt set and a tokenizer; without one they are a range.
Minutes depend on the participants' machines: only rounds that were done tell them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cofuse.sdk_rows import Event, Round
from fusion import packing
from protos.spec import RoundSpec

BYTES_A_TOKEN: Final = (6.0, 2.5)
"""Of plain text, from tokenizers of 150,000 ids to those of 1,000: the range that is shown. One of
300 ids has 1.4 and one of 257 has 1: see Cost.positions_bound."""
VOCABULARY: Final = 151_936
"""Assumed for the width of an id where no tokenizer is given: the largest in wide use."""


_HEAD_BYTES: Final = 290
_ANSWER_BYTES: Final = (8, 16)
"""Of an answer's two numbers in JSON (fusion/pair_scores.py): from -1.23 and 4 to -12345.67, 12345.
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What each participant is asked for."""

    documents: int
    """Of a pairs round: answers, two a pair."""
    text_bytes: int
    positions: tuple[int, int]
    """Least and most: tokens of the public text, each document's end among them."""
    positions_bound: int
    """More are not possible, as no token writes less than a byte; near it with few hundred ids."""
    ship_bytes: tuple[int, int] | None
    """Of the file that leaves, its vocabulary aside; None: of a weights round, the pivot's size."""
    exact: bool
    """Whether a tokenizer has counted; each participant's own may still count otherwise."""


def cost_of(spec: RoundSpec, texts: Sequence[str], tokenizer: Path | None) -> Cost:
    """Estimate what each participant is asked for.

    Args: texts: the prompt set's documents, or the answers of the pairs. tokenizer: tokenizer.json,
        or a folder with one.
    Raises: OSError, ValueError.
    """
    size = sum(len(text.encode()) for text in texts)
    vocabulary = VOCABULARY
    if tokenizer is None:
        few, many = (int(size / per) + len(texts) for per in BYTES_A_TOKEN)
        # Its bytes, its end, and the space that some tokenizers put before a document.
        bound = size + 2 * len(texts)
    else:
        few, vocabulary = _count(texts, tokenizer)
        many = bound = few
    ship = None
    if spec.kind == "logits":
        width = spec.top_k if spec.sampler == "top_k" else min(spec.draws, vocabulary)
        # fusion/logit_file.py: a byte each for every token's length and own log-probability, and
        # where a row is shipped its ids, a byte each for their log-probabilities, and the tail.
        row = packing.row_bytes(width, packing.bits_for(vocabulary)) + width + 1
        per_position = 2 + spec.ship_share * row
        ship = int(few * per_position), int(many * per_position)
    if spec.kind == "pairs":
        least, most = (_HEAD_BYTES + n * len(texts) for n in _ANSWER_BYTES)
        ship = least, most
    return Cost(len(texts), size, (few, many), bound, ship, tokenizer is not None)


@dataclass(frozen=True, slots=True)
class Done:
    """What one participant did in an earlier round."""

    participant: str
    round_id: str
    size_bytes: int
    minutes: float
    """From the round's being handed out to the participant's file being durable."""


def done_before(rounds: Iterable[tuple[Round, Sequence[Event]]]) -> dict[str, Done]:
    """The last contribution of each participant to rounds like this one, oldest given first."""
    found = {}
    for round_, events in rounds:
        start = _moment(events, "state", "COLLECTING")
        for part in round_.contributions:
            end = next(
                (
                    e.time_unix_ms
                    for e in events
                    if e.kind == "contribution"
                    and e.body.get("participant") == part.participant
                    and e.body.get("status") == "committed"
                ),
                None,
            )
            if part.size_bytes and start is not None and end is not None:
                minutes = (end - start) / 60_000
                found[part.participant] = Done(
                    part.participant, round_.round_id, part.size_bytes, minutes
                )
    return found


def _moment(events: Sequence[Event], kind: str, state: str) -> int | None:
    return next(
        (e.time_unix_ms for e in events if e.kind == kind and e.body.get("state") == state), None
    )


def _count(texts: Sequence[str], tokenizer: Path) -> tuple[int, int]:
    """Tokens with an end for each document, and the ids there are."""
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; wanted a tokenizer.json or its folder")
    reader: Any = Tokenizer.from_file(str(file))
    found = reader.encode_batch(list(texts), add_special_tokens=False)
    return sum(len(one.ids) + 1 for one in found), int(reader.get_vocab_size())
