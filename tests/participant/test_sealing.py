"""A pairs round at the one door: of each answer two numbers leave, and nothing with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.contribution import ContributionError
from fusion.pair_file import PairFile, read_pairs
from fusion.pair_scores import read_scores
from participant.export import export_pairs
from participant.guard import Released
from participant.policy import PolicyRefusalError
from participant.sealing import Asked, Draft, question_of
from participant.spool import Entry
from protos.chunks import sha256_of
from protos.messages import FileRef
from tests.participant.test_guard import SECRET, House, house, model  # noqa: F401 - fixtures

Change = Callable[[dict[str, Any]], object]
ROWS = [
    {"prompt": "Zebras", "chosen": " graze.", "rejected": " raze the plaza."},
    {"prompt": "A wizard", "chosen": " is amazed.", "rejected": " grazes."},
]


def asks(house: House, round_id: str = "rnd-1", rows: Any = ROWS) -> Entry:  # noqa: F811
    """A signed assignment of a pairs round, its file here, under a policy that knows such."""
    policy = house.home / "policy.toml"
    policy.write_text(policy.read_text().replace('["logits",', '["pairs",'))
    path = house.home / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    digest = sha256_of(path)
    wanted = {"kind": "pairs", "method": "preference", "prompts": None}
    training = {"steps": 3, "lr": 0.1}
    entry = house.entry(round_id, **wanted, pairs=f"sha256:{digest}", training=training)
    reference = FileRef(name=path.name, sha256=digest, size_bytes=path.stat().st_size)
    named = {"pairs": reference, "prompts": None}
    return house.spool.accept(entry.assignment.model_copy(update=named))


def asked_pairs(house: House) -> PairFile:  # noqa: F811
    return read_pairs(house.home / "pairs.jsonl")


def release(house: House, entry: Entry, change: Change = lambda _: None) -> Released:  # noqa: F811
    """What the worker does; `change` is what a corrupt trainer does to the honest draft."""
    found, expert = asked_pairs(house), house.home / "model"
    question = question_of(entry.assignment, expert, found.texts(), found.pairs)
    asked = Asked(question=question, texts=found.texts(), pairs=found.pairs)

    def work(_: Asked) -> Draft:
        house.made += 1
        path = draft(house, entry)
        said = json.loads(path.read_text())
        change(said)
        path.with_name("changed").write_text(json.dumps(said))
        return Draft(path=path.with_name("changed"), model=expert)

    return house.guard().release(entry, lambda: asked, work)


def draft(house: House, entry: Entry) -> Path:  # noqa: F811
    outbox = house.home / "data" / "outbox"
    outbox.mkdir(exist_ok=True)
    pairs = house.home / "pairs.jsonl"
    return export_pairs(house.home / "model", pairs, entry.assignment, outbox, lambda *_: None)


def test_what_leaves_is_two_numbers_an_answer_and_costs_the_tokens_it_tells_of(
    house: House,  # noqa: F811
) -> None:
    entry = asks(house)
    released = release(house, entry)
    pairs = asked_pairs(house).pairs
    inside = house.inside(released)
    told, honest = read_scores(inside, pairs), read_scores(draft(house, entry), pairs)
    assert told.chosen_logp.tolist() == honest.chosen_logp.tolist()
    assert inside.stat().st_size < 290 + 4 * len(pairs) * 16
    tokens = int(told.chosen_tokens.sum() + told.rejected_tokens.sum())
    assert house.guard().ledger.used() == tokens > 2 * len(pairs)
    question = house.guard().ledger.question("rnd-1")
    assert question is not None
    assert (question.kind, question.form, question.prompt_set) == (
        "pairs", "pairs", sha256_of(house.home / "pairs.jsonl"),
    )  # fmt: skip


def test_a_policy_that_does_not_name_pairs_lets_none_out(house: House) -> None:  # noqa: F811
    entry = asks(house)
    house.policy()  # logits and weights
    with pytest.raises(PolicyRefusalError, match="no rule allows pairs"):
        release(house, entry)
    assert (house.made, house.sealed, house.guard().ledger.entries()) == (0, [], [])


def test_an_answer_that_quotes_the_corpus_is_not_judged(house: House) -> None:  # noqa: F811
    entry = asks(house, rows=[*ROWS, {"prompt": "", "chosen": SECRET, "rejected": "no"}])
    with pytest.raises(PolicyRefusalError, match="prompt checks"):
        release(house, entry)
    assert house.made == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(model_sha256="5ec4e7" + "0" * 58),
        lambda said: said["chosen_tokens"].__setitem__(0, said["chosen_tokens"][0] + 1),
        lambda said: said["chosen_logp"].__setitem__(0, -1e6),
        lambda said: said.update(note="a word"),
    ],
    ids=["a word for a digest", "a token more", "no logarithm of a model", "a word beside"],
)
def test_a_draft_that_is_not_what_was_asked_for_does_not_leave(
    house: House,  # noqa: F811
    change: Change,
) -> None:
    entry = asks(house)
    with pytest.raises(ContributionError):
        release(house, entry, change)
    assert house.sealed == []


def test_nothing_that_a_draft_hides_in_its_digits_leaves(house: House) -> None:  # noqa: F811
    def hide(said: dict[str, Any]) -> None:
        said["chosen_logp"] = [log + 0.0012345 for log in said["chosen_logp"]]

    entry = asks(house)
    inside = house.inside(release(house, entry, hide)).read_bytes()
    assert inside == draft(house, entry).read_bytes()
