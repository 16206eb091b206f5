"""Invented patients to plant in a corpus, and a search for them in every form of bytes."""

import base64
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

REPEATS: Final = 12
"""Times each patient stands in the corpus: often enough to be learned by heart."""
MIN_IDS: Final = 4
"""Token ids in a row that are a finding; fewer come about by chance."""
_WORD_TYPES: Final = ("<u2", "<i4", "<i8")


def patients(hospital: str, count: int = 2) -> list[str]:
    """Names, numbers and addresses that are nowhere else; the same for one hospital."""
    random_ = random.Random(hospital)

    def word(length: int) -> str:
        pairs = (random_.choice("bdfgklmnprstvz") + random_.choice("aeiou") for _ in range(length))
        return "".join(pairs).capitalize()

    def digits(count: int) -> str:
        return "".join(random_.choices("0123456789", k=count))

    return [
        f"{word(3)} {word(4)}, MRN {digits(9)}, {digits(3)}-555-{digits(4)}, {word(4)} Lane"
        for _ in range(count)
    ]


def secrets(hospital: str) -> list[str]:
    """What must be found nowhere: each part of each patient that is telling alone."""
    return [part for patient in patients(hospital) for part in patient.split(", ")]


def plant(corpus: Path, hospital: str) -> None:
    """Add notes about the patients to a corpus of JSON lines."""
    notes = [
        json.dumps({"text": f"Patient {patient} was seen in clinic today."})
        for patient in patients(hospital)
    ]
    with corpus.open("a", encoding="utf-8") as file:
        file.writelines(f"{note}\n" for note in notes * REPEATS)


def forms(secret: str, tokenizers: Sequence[Any] = ()) -> dict[str, bytes]:
    """The bytes that a secret might be as, by the form's name; letters are lower case in plain."""
    raw = secret.encode()
    found = {
        "plain": raw.lower(),
        "utf-16": secret.encode("utf-16-le"),
        "hex": raw.hex().encode(),
        "backwards": raw[::-1],
    }
    for shift in range(3):  # base64 of a text that holds it, wherever in it
        inside = base64.b64encode(bytes(shift) + raw)[4 if shift else 0 :]
        whole = inside[: len(inside) // 4 * 4 - 4]  # the last group depends on what follows
        found[f"base64+{shift}"] = whole
    for number, tokenizer in enumerate(tokenizers):
        for lead in ("", " "):
            ids = tokenizer(lead + secret, add_special_tokens=False)["input_ids"]
            if len(ids) >= MIN_IDS:
                for kind in _WORD_TYPES:
                    found[f"ids {number}{lead!r} {kind}"] = np.asarray(ids, kind).tobytes()
                for comma in (", ", ","):
                    text = comma.join(map(str, ids))
                    found[f"ids {number}{lead!r} {comma!r}"] = text.encode()
    return found


def hits(
    where: Iterable[tuple[str, bytes]], needles: Mapping[str, Mapping[str, bytes]]
) -> tuple[list[str], int]:
    """Where something was found, and as what; and the bytes that were searched.

    Args: where: name and bytes. needles: what to look for in its forms().
    """
    found, size = [], 0
    for place, raw in where:
        size += len(raw)
        lower = raw.lower()
        found += [
            f"{secret!r} as {form} in {place}"
            for secret, kinds in needles.items()
            for form, needle in kinds.items()
            if needle in (lower if form == "plain" else raw)
        ]
    return found, size


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, whatever it is."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder.parent)), path.read_bytes()


def likeliest(contribution: Path, prompts: Sequence[str | bytes]) -> bytes:
    """What an expert would say at each position of a contribution: its first ids, in order."""
    from fusion.codec import read_logits

    return read_logits(contribution, prompts).topk_ids[:, 0].astype("<i4").tobytes()
