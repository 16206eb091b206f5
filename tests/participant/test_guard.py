"""The one door: in its order, once, about these bytes, shut when anything is not as said."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.sealed import Worker, ensure_worker_key
from fusion.codec import LogitFile, read_logits, rewrite_logits, write_logits
from fusion.contribution import ContributionError
from fusion.delta_file import read_delta, write_delta
from fusion.models import ModelSpec, build_model, load_model, parameter_arrays, save_model
from fusion.models import train_tokenizer as train
from participant.approvals import TTL_MS
from participant.config import ModelConfig, ParticipantConfig, TrainingConfig
from participant.export import export_logits
from participant.guard import AwaitingApprovalError, Guard, Released
from participant.policy import PolicyRefusalError
from participant.sealing import Asked, Draft, question_of
from participant.spool import Entry, Spool
from protos.chunks import sha256_of
from protos.config import TlsConfig
from protos.messages import Assignment, FileRef
from protos.public_sets import read_prompts, write_prompts
from protos.spec import RoundSpec
from tests.participant.ordering import authority_at, ordered
from trust.seal import SealError
from trust.seal_keys import RECIPIENT_FILE

SECRET = "she told the doctor at night that her left hand had been shaking ever since the fall"
PUBLIC = ["zebras graze; buzzards gaze. amazed, a wizard razed the plaza.", "by the azure haze"]
POLICY = """
version = 2
[[allow]]
purpose = "radiology"
submitters = ["ada"]
kinds = ["logits", "weights"]
prompt_sets = ["*"]
approval = "{approval}"
[logits]
positions_per_30d = {positions}
[weights]
enabled = true
"""
DAY_MS = 24 * 3600 * 1000


@dataclass
class House:
    """A participant's folder with a finished expert; `now` is its clock."""

    home: Path
    now: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    orders: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def policy(self, approval: str = "auto", positions: int = 10_000) -> None:
        text = POLICY.format(approval=approval, positions=positions)
        (self.home / "policy.toml").write_text(text, encoding="utf-8")

    @property
    def spool(self) -> Spool:
        return Spool(self.home / "data" / "spool")

    def guard(self) -> Guard:
        """A new process' view."""
        model = ModelConfig(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)
        config = ParticipantConfig(
            name="st-mary",
            coordinator="localhost:1",
            corpus=self.home / "corpus.jsonl",
            data_dir=self.home / "data",
            policy=self.home / "policy.toml",
            model=model,
            training=TrainingConfig(steps=1),
            tls=TlsConfig(ca=self.home / "ca.pem", certificate=Path(), key=Path()),
        )
        return Guard(config, self.spool, lambda: self.now)

    def entry(self, round_id: str = "rnd-1", **spec: Any) -> Entry:
        prompts, weights = self.home / "prompts.jsonl", self.home / "model" / "model.safetensors"
        digest = sha256_of(prompts)
        values = {
            "name": "x",
            "pivot": "pivot-0",
            "purpose": "radiology",
            "participants": ["a"],
            "kind": "logits",
            "method": "unified",
            "top_k": 4,
            "prompts": f"sha256:{digest}",
            "training": {"steps": 3, "batch_size": 2, "seq_len": 16, "lr": 0.1},
            **spec,
        }
        size = prompts.stat().st_size
        text = RoundSpec.model_validate(values).model_dump_json()
        if text + round_id not in self.orders:
            nonce = f"{round_id}-{len(self.orders)}"
            self.orders[text + round_id] = ordered(self.home, text, nonce, self.now)
        return self.spool.accept(
            Assignment.model_validate(
                {
                    "round_id": round_id,
                    "attempt": 1,
                    "submitted_by": "ada",
                    "spec": values,
                    "prompts": FileRef(name="prompts.jsonl", sha256=digest, size_bytes=size),
                    "pivot_sha256": sha256_of(weights),
                    "deadline_unix_ms": 0,
                    "order": self.orders[text + round_id],
                }
            )
        )

    def release(self, guard: Guard, entry: Entry, work: Any = None) -> Released:
        """What the worker does, with `work` in place of the extraction."""
        entry = self.spool.get(entry.round_id) or entry
        texts = read_prompts(self.home / "prompts.jsonl")

        def prepare() -> Asked:
            question = question_of(entry.assignment, self.home / "model", texts)
            return Asked(question=question, texts=texts, pivot=self.home / "model")

        def count(asked: Asked) -> Draft:
            self.made += 1
            return Draft(path=(work or self.honest)(entry), model=self.home / "model")

        return guard.release(entry, prepare, count)

    def honest(self, entry: Entry) -> Path:
        outbox = self.home / "data" / "outbox"
        outbox.mkdir(exist_ok=True)
        prompts = self.home / "prompts.jsonl"
        return export_logits(
            self.home / "model", prompts, entry.assignment, outbox, lambda *_: None
        )

    def inside(self, released: Released) -> Path:
        """What the fusion worker finds in it."""
        out = self.home / "inside.safetensors"
        worker = Worker.at(self.home / "worker")
        said = worker.open(released.path, out, round_id=released.path.stem, participant="st-mary")
        assert said.submitted_by == "ada"
        assert said.policy_sha256 == sha256_of(self.home / "policy.toml")
        return out

    def rewritten(self, entry: Entry) -> bytes:
        """What may leave of the honest draft: its values, and public words alone."""
        asked, out = entry.assignment, self.home / "again"
        assert asked.prompts is not None
        rewrite_logits(
            self.honest(entry),
            out,
            prompts=read_prompts(self.home / "prompts.jsonl"),
            prompt_set_sha256=asked.prompts.sha256,
            top_k=asked.spec.top_k,
        )
        return out.read_bytes()

    @property
    def sealed(self) -> list[str]:
        return sorted(path.name for path in (self.home / "data" / "sealed").iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "model"
    tokenizer = train([*PUBLIC, SECRET], 270)
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": len(tokenizer)}
    save_model(build_model(ModelSpec(architecture="llama", **shape), 0), tokenizer, folder)
    return folder


@pytest.fixture
def house(tmp_path: Path, model: Path) -> House:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "data").mkdir()
    authority_at(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    write_prompts(tmp_path / "prompts.jsonl", PUBLIC)
    ensure_worker_key(tmp_path / "worker", tmp_path / RECIPIENT_FILE)
    made = House(tmp_path)
    made.policy()
    return made


def test_what_is_let_out_is_the_draft_s_values_and_is_made_once(house: House) -> None:
    entry = house.entry()
    released = house.release(house.guard(), entry)
    assert house.inside(released).read_bytes() == house.rewritten(entry)
    assert released.path.parent.name == "sealed"
    assert (released.approver, released.rule) == ("policy", "allow 1: radiology")
    assert not released.scores  # the rule does not name them
    again = house.release(house.guard(), entry)
    assert (again, house.made) == (released, 1)


def test_what_leaves_tells_its_carrier_nothing_and_no_plain_copy_stays(house: House) -> None:
    entry = house.entry()
    released = house.release(house.guard(), entry)
    plain, sealed = house.honest(entry).read_bytes(), released.path.read_bytes()
    assert not any(plain[at : at + 16] in sealed for at in range(0, len(plain) - 16, 97))
    assert house.sealed == [released.path.name]


def test_without_a_key_to_seal_to_nothing_is_computed(house: House) -> None:
    (house.home / RECIPIENT_FILE).unlink()
    with pytest.raises(SealError, match=r"get fusion-worker\.pem from the operator"):
        house.release(house.guard(), house.entry())
    assert (house.made, house.guard().ledger.entries()) == (0, [])


def test_the_budget_is_taken_on_disk_before_the_work_begins(house: House) -> None:
    entry = house.entry()

    def crash(_: Entry) -> Path:
        assert house.guard().ledger.used() > 0
        raise InterruptedError

    for _ in range(2):  # a crash counts, and the next try of the same round costs no more
        with pytest.raises(InterruptedError):
            house.release(house.guard(), entry, crash)
    released = house.release(house.guard(), entry)
    header = LogitFile(house.inside(released), PUBLIC).header
    assert house.guard().ledger.used() == header.positions


def refused(house: House, entry: Entry, says: str) -> PolicyRefusalError:
    with pytest.raises(PolicyRefusalError, match=says) as caught:
        house.release(house.guard(), entry)
    assert (house.made, house.sealed) == (0, [])
    return caught.value


def test_a_no_of_the_policy_the_checks_or_the_budget_comes_before_any_work(house: House) -> None:
    refused(house, house.entry(purpose="oncology"), "no rule allows logits for purpose")
    house.policy(positions=3)
    refused(house, house.entry(), "positions_per_30d")
    house.policy()
    write_prompts(house.home / "prompts.jsonl", [*PUBLIC, f"Note: {SECRET.upper()}!"])
    refused(house, house.entry(), "did not pass this institution's prompt checks$")
    write_prompts(house.home / "prompts.jsonl", ["DOB: 12/03/1957", *PUBLIC])
    refused(house, house.entry(), "did not pass this institution's prompt checks$")
    assert house.guard().ledger.entries() == []


def test_which_prompt_looks_private_and_why_is_told_here_alone(house: House) -> None:
    write_prompts(house.home / "prompts.jsonl", [*PUBLIC, SECRET])
    error = refused(house, house.entry(), "prompt checks")
    assert "thirteen words in a row of the corpus: [3]" in error.here
    for told in (str(error), error.here):
        assert not {"shaking", "doctor"} & set(told.split())


def test_a_policy_that_only_warns_lets_it_pass_and_says_so(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    path = house.home / "policy.toml"
    path.write_text(path.read_text() + '[prompts]\noverlap = "warn"\n')
    write_prompts(house.home / "prompts.jsonl", [*PUBLIC, SECRET])
    with caplog.at_level(logging.WARNING):
        house.release(house.guard(), house.entry())
    assert "look private" in caplog.text
    assert "shaking" not in caplog.text


def test_no_score_is_told_of_texts_that_look_private(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    guard = house.guard()
    assert guard.lets_score("rnd-1", PUBLIC)
    with caplog.at_level(logging.WARNING):
        assert not guard.lets_score("rnd-1", [*PUBLIC, SECRET])
    assert "no scores leave" in caplog.text
    (house.home / "policy.toml").unlink()
    assert not guard.lets_score("rnd-1", PUBLIC)


def test_a_policy_that_is_taken_back_holds_at_once(house: House) -> None:
    guard, path = house.guard(), house.home / "policy.toml"
    entry = house.entry()
    path.write_text("version = 2\n[[allow]]\n")
    with pytest.raises(PolicyRefusalError, match=r"it cannot be read$") as caught:
        house.release(guard, entry)
    assert "purpose" in caught.value.here
    house.policy()
    house.release(guard, entry)
    path.unlink()
    with pytest.raises(PolicyRefusalError, match=r"it cannot be read$"):
        house.release(guard, entry)  # although it is made


def _changed(house: House, entry: Entry, **header: Any) -> Path:
    """A draft that says something else of itself than is true."""
    honest = read_logits(house.honest(entry), PUBLIC)
    path = house.home / "data" / "outbox" / "changed"
    write_logits(path, replace(honest, header=replace(honest.header, **header)))
    return path


def _hotter(house: House, entry: Entry) -> Path:
    honest = read_logits(house.honest(entry), PUBLIC)
    path = house.home / "data" / "outbox" / "hotter"
    logprobs = honest.topk_logprobs / np.float32(3)
    own = np.maximum(honest.own_logprob / 3, logprobs.min(axis=1))
    write_logits(path, replace(honest, topk_logprobs=logprobs, own_logprob=own))
    return path


def _more_columns(house: House, entry: Entry) -> Path:
    return house.honest(house.entry("rnd-2", top_k=5))


@pytest.mark.parametrize(
    "draft",
    [
        lambda house, entry: _changed(house, entry, model_sha256="5ec4e7" + "0" * 58),
        lambda house, entry: _changed(house, entry, tokenizer_sha256="5ec4e7" + "0" * 58),
        lambda house, entry: _changed(house, entry, prompt_set_sha256="0" * 64),
        _hotter,
        _more_columns,
    ],
    ids=["a word for a digest", "another", "other prompts", "temperature", "K + 1"],
)
def test_a_draft_that_is_not_what_was_asked_for_does_not_leave(house: House, draft: Any) -> None:
    entry = house.entry()
    with pytest.raises(ContributionError):
        house.release(house.guard(), entry, lambda one: draft(house, one))
    assert house.sealed == []
    found = house.spool.get(entry.round_id)
    assert found is not None
    assert found.made is None


def test_nothing_that_a_draft_hides_in_its_layout_leaves(house: House) -> None:
    entry = house.entry()

    def hiding(one: Entry) -> Path:
        honest = house.honest(one).read_bytes()
        size = int.from_bytes(honest[:8], "little")
        table = json.loads(honest[8 : 8 + size])
        hidden = json.dumps(dict(reversed(table.items()))).encode() + b"\t \t\t  \t "
        path = house.home / "hiding"
        path.write_bytes(len(hidden).to_bytes(8, "little") + hidden + honest[8 + size :])
        return path

    released = house.release(house.guard(), entry, hiding)
    assert house.inside(released).read_bytes() == house.rewritten(entry)


def _delta(house: House, **change: Any) -> Any:
    def make(entry: Entry) -> Path:
        arrays = parameter_arrays(load_model(house.home / "model")[0])
        path = house.home / "delta"
        told = {"pivot_sha256": entry.assignment.pivot_sha256, "steps": 3, "tokens": 96, **change}
        write_delta(path, {name: values * 0 + 1 for name, values in arrays.items()}, **told)
        return path

    return make


def test_weights_leave_as_the_values_that_were_asked_for(house: House) -> None:
    entry = house.entry(kind="weights", method="merge")
    with pytest.raises(ContributionError, match="steps and tokens"):
        house.release(house.guard(), entry, _delta(house, tokens=0x5EC4E7))
    released = house.release(house.guard(), entry, _delta(house))
    header, arrays = read_delta(house.inside(released))
    assert (header.steps, header.tokens) == (3, 96)
    assert all((values == 1).all() for values in arrays.values())


def test_a_manual_rule_keeps_the_finished_release_until_a_person_says_yes(house: House) -> None:
    house.policy("manual")
    guard, entry = house.guard(), house.entry()
    for _ in range(2):
        with pytest.raises(AwaitingApprovalError) as caught:
            house.release(guard, entry)
    assert (guard.waits("rnd-1"), guard.waiting(), house.made) == (True, ["rnd-1"], 1)
    shown = caught.value.release
    assert (shown.purpose, shown.submitted_by, shown.top_k) == ("radiology", "ada", 4)
    assert shown.positions == guard.ledger.used() > 0
    guard.approvals.decide(shown, approved=True, by="grace")
    assert not guard.waits("rnd-1")
    released = house.release(house.guard(), entry)  # after a restart as well
    assert (released.approver, released.made.sha256, house.made) == ("grace", shown.sha256, 1)


def test_other_bytes_than_were_approved_do_not_leave(house: House) -> None:
    house.policy("manual")
    entry = house.entry()
    with pytest.raises(AwaitingApprovalError) as caught:
        house.release(house.guard(), entry)
    house.guard().approvals.decide(caught.value.release, approved=True, by="grace")
    sealed = house.home / "data" / "sealed" / "rnd-1.sealed"
    sealed.write_bytes(sealed.read_bytes() + b"stowaway")
    with pytest.raises(AwaitingApprovalError) as again:  # made and sealed again: other bytes
        house.release(house.guard(), entry)
    assert again.value.release.sha256 != caught.value.release.sha256
    assert house.made == 2


@pytest.mark.parametrize("silence", [False, True])
def test_a_no_and_three_days_of_silence_end_the_wait(house: House, silence: bool) -> None:
    house.policy("manual")
    guard, entry = house.guard(), house.entry()
    with pytest.raises(AwaitingApprovalError) as caught:
        house.release(guard, entry)
    if silence:
        house.now += TTL_MS
    else:
        guard.approvals.decide(caught.value.release, approved=False, by="grace", why="not now")
    assert not guard.waits("rnd-1")
    with pytest.raises(PolicyRefusalError, match="within 72 hours" if silence else "not now"):
        house.release(guard, entry)


def test_a_round_that_is_over_leaves_no_copy_and_asks_nobody(house: House) -> None:
    house.policy("manual")
    guard, entry = house.guard(), house.entry()
    with pytest.raises(AwaitingApprovalError):
        house.release(guard, entry)
    guard.close("rnd-1")
    assert (house.sealed, guard.waiting(), guard.approvals.waiting()) == ([], [], [])
    assert guard.ledger.used() > 0  # asked is asked


def test_a_rule_ends_with_its_last_day(house: House) -> None:
    path = house.home / "policy.toml"
    today, tomorrow = (
        datetime.fromtimestamp((house.now + days * DAY_MS) / 1000, UTC).date() for days in (0, 1)
    )
    path.write_text(path.read_text().replace("[logits]", f"not_after = {today}\n[logits]", 1))
    entry = house.entry()
    house.release(house.guard(), entry)
    house.now += DAY_MS
    with pytest.raises(PolicyRefusalError, match=f"after {tomorrow}"):
        house.release(house.guard(), entry)


def test_one_model_answers_on_one_prompt_set_in_one_form(house: House) -> None:
    house.release(house.guard(), house.entry("rnd-1"))
    with pytest.raises(PolicyRefusalError, match="another form"):
        house.release(house.guard(), house.entry("rnd-2", top_k=5))
    house.release(house.guard(), house.entry("rnd-3"))
