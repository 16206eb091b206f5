"""The demo's hospitals: one department each, the same kind of prose, no knowledge in common.

Every entity falls into one split, by the hash of seed and name: private (about 65 %), public
(20 %), held-out (15 %). So private text teaches what the held-out text measures, the public text is
of the same department, and no entity is in two splits. All of it is a pure function of the seed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final, Literal

from cofuse.demo.sources import (
    ATTRIBUTION,
    GENERAL,
    SPECIALTIES,
    Entity,
    MissingSourceError,
    entities_of_packages,
    entities_of_sample,
)
from cofuse.demo.wording import ORDERS, QUESTION_FRAMES, render

__all__ = [
    "ATTRIBUTION",
    "DEPARTMENTS",
    "Department",
    "Limits",
    "MissingSourceError",
    "Question",
    "departments",
    "general_text",
    "write_department",
]

Split = Literal["private", "public", "heldout"]
Source = Literal["packages", "sample"]

DEPARTMENTS: Final = tuple(SPECIALTIES)
PRIVATE_SHARE: Final = 0.65
PUBLIC_SHARE: Final = 0.20
WORDINGS: Final[Mapping[Split, int]] = {"private": ORDERS, "public": 2, "heldout": 2}
"""Documents per entity. Knowledge needs all orders; a measure is better with more entities."""

OPTIONS: Final = 4
LONGEST_ANSWER: Final = 90
LONGEST_QUESTION: Final = 300
"""Characters. A longer definition is asked by no question, rather than cut."""
FILLERS: Final = frozenset({"other", "unspe", "speci", "elsew", "class", "with", "witho", "from"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """At most this much of each split of each department."""

    private: int = 300_000
    """Bytes of UTF-8, one more for each document."""
    public: int = 70_000
    heldout: int = 25_000
    questions: int = 60


@dataclass(frozen=True, slots=True)
class Question:
    """Four options, one right. A model is asked for `prompt + " " + option`."""

    domain: str
    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Department:
    """One hospital's text: each document is one short text, and is whole by itself."""

    name: str
    private: list[str]
    public: list[str]
    heldout: list[str]
    questions: list[Question]
    """About private entities, in a wording that no text uses."""


def departments(
    names: Sequence[str],
    seed: int,
    *,
    limits: Limits | None = None,
    source: Source = "packages",
) -> list[Department]:
    """The named departments. What one holds does not depend on which others are asked for.

    Args: names out of DEPARTMENTS; source "sample" reads the committed ICD-10-CM sample instead of
        the installed packages and is small.
    Raises: ValueError for an unknown or repeated name; MissingSourceError without the sources.
    """
    if unknown := [name for name in names if name not in DEPARTMENTS]:
        raise ValueError(f"unknown departments {unknown}; choose among {', '.join(DEPARTMENTS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"departments {list(names)} name one twice; name each once")
    entities = _entities(source)
    return [_department(name, entities[name], seed, limits or Limits()) for name in names]


def general_text(seed: int, limit_bytes: int, *, source: Source = "packages") -> list[str]:
    """Public text of what no department owns: the same kinds of prose, so that a base model knows
    the language and none of the departments' facts.

    Kinds take turns, and among codes chapters: else injuries, half of all codes, would be half.
    """
    entities = _by_hash(_entities(source)[GENERAL], seed)
    codes: dict[int, list[Entity]] = {}
    for entity in entities:
        if entity.kind == "code":
            codes.setdefault(entity.chapter, []).append(entity)
    kinds = [
        list(_in_turns(codes[chapter] for chapter in sorted(codes))),
        [entity for entity in entities if entity.kind == "disease"],
        [entity for entity in entities if entity.kind == "sign"],
    ]
    within = _within(_in_turns(kinds), seed, WORDINGS["public"], limit_bytes)
    return _documents(within, seed, WORDINGS["public"])


def write_department(department: Department, directory: Path) -> Path:
    """Write what the hospital keeps to itself: private.jsonl, one {"text": ...} a line."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "private.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in department.private)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def split_of(entity: Entity, seed: int) -> Split:
    """The one split that an entity is in. Entities of the same name are in the same split."""
    share = _draw(seed, "split", entity.key) / 2**64
    if share < PRIVATE_SHARE:
        return "private"
    return "public" if share < PRIVATE_SHARE + PUBLIC_SHARE else "heldout"


def _entities(source: Source) -> Mapping[str, tuple[Entity, ...]]:
    return entities_of_sample() if source == "sample" else entities_of_packages()


def _department(name: str, entities: Iterable[Entity], seed: int, limits: Limits) -> Department:
    members: dict[Split, list[Entity]] = {"private": [], "public": [], "heldout": []}
    for entity in _by_hash(entities, seed):
        members[split_of(entity, seed)].append(entity)
    caps = {"private": limits.private, "public": limits.public, "heldout": limits.heldout}
    taken = {s: list(_within(members[s], seed, WORDINGS[s], caps[s])) for s in members}
    texts = {split: _documents(taken[split], seed, WORDINGS[split]) for split in members}
    questions = _questions(name, taken["private"], seed)[: limits.questions]
    return Department(name, texts["private"], texts["public"], texts["heldout"], questions)


def _by_hash(entities: Iterable[Entity], seed: int) -> list[Entity]:
    return sorted(entities, key=lambda e: _draw(seed, "order", e.kind, e.key))


def _in_turns(groups: Iterable[Iterable[Entity]]) -> Iterator[Entity]:
    """The first of each group, then the second of each, to the end of the longest."""
    turns = chain.from_iterable(zip_longest(*groups))
    return (entity for entity in turns if entity is not None)


def _within(
    entities: Iterable[Entity], seed: int, wordings: int, limit_bytes: int
) -> Iterator[Entity]:
    """The first entities whose documents, all of them, fit. A smaller limit keeps a prefix."""
    left = limit_bytes
    for entity in entities:
        left -= sum(len(text.encode()) + 1 for _, text in _wordings(entity, seed, wordings))
        if left < 0:
            return
        yield entity


def _documents(entities: Iterable[Entity], seed: int, wordings: int) -> list[str]:
    """The documents, shuffled: side by side, one wording would give the next one away."""
    pairs = chain.from_iterable(_wordings(entity, seed, wordings) for entity in entities)
    return [text for _, text in sorted(pairs)]


def _wordings(entity: Entity, seed: int, count: int) -> list[tuple[int, str]]:
    """The entity in `count` different orders of words, each with its place in the shuffle."""
    first = _draw(seed, "first order", entity.kind, entity.key)
    drawn = []
    for order in ((first + step) % ORDERS for step in range(count)):
        draw = _draw(seed, "variant", entity.kind, entity.key, str(order))
        drawn.append((draw, render(entity, order, draw)))
    return drawn


def _questions(domain: str, entities: Sequence[Entity], seed: int) -> list[Question]:
    """All questions that the entities allow; the kinds take turns, each in hash order."""
    kinds = []
    for kind in QUESTION_FRAMES:
        pool = [entity for entity in entities if entity.kind == kind and _may_be_asked(entity)]
        asked = (_question(domain, entity, pool, seed) for entity in pool)
        kinds.append([question for question in asked if question])
    return [question for turn in zip_longest(*kinds) for question in turn if question]


def _may_be_asked(entity: Entity) -> bool:
    """Short enough, and the definition gives no content word of the name away."""
    fits = len(entity.name) <= LONGEST_ANSWER and len(entity.definition) <= LONGEST_QUESTION
    return fits and not _stems(entity.name) & _stems(entity.definition)


def _question(domain: str, entity: Entity, pool: Sequence[Entity], seed: int) -> Question | None:
    """Ask for the entity's name among the pool's names of the nearest length.

    No two options share a content word, and none is named in the question.
    """
    kind, frame = QUESTION_FRAMES[entity.kind]
    options, used = [entity.name], _stems(entity.name) | _stems(entity.definition)
    for other in sorted(pool, key=lambda e: abs(len(e.name) - len(entity.name))):
        stems = _stems(other.name)
        if other is not entity and stems and not stems & used:
            options.append(other.name)
            used |= stems
        if len(options) == OPTIONS:
            break
    else:
        return None
    # The options by hash: the right one is in every place equally often.
    placed = sorted(options, key=lambda name: _draw(seed, "option", entity.key, name))
    prompt = frame.format(fact=entity.definition or entity.code)
    return Question(domain, kind, prompt, tuple(placed), placed.index(entity.name))


def _stems(text: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]{4,}", text.casefold())
    return frozenset(word[:5] for word in words) - FILLERS


def _draw(seed: int, *parts: str) -> int:
    """A number below 2**64 that depends on the seed and the parts, and on nothing else."""
    text = "\x1f".join((str(seed), *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
