"""Promises of `cofuse round check`: costs before any work, the policy's own word, file and line."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.participant_home import POLICY
from cofuse.round_cost import cost_of
from fusion.models import train_tokenizer
from protos.spec import RoundSpec
from tests.cofuse.envelope import told

SPEC = {
    "name": "first",
    "pivot": "pivot-0",
    "participants": ["st-mary"],
    "kind": "logits",
    "method": "unified",
    "prompts": "prompts.jsonl",
    "training": {"steps": 2, "lr": 0.001},
}
TEXTS = ["A stenosis of the aortic valve, seen early.", "An arrhythmia, treated late."]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return write(tmp_path / "round.yaml")


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(SPEC | changes, sort_keys=False), encoding="utf-8")
    return path


def check(spec: Path, *words: object, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["round", "check", str(spec), *map(str, words)])
    assert done.exit_code == status, done.stdout + done.stderr
    return done


def policy_at(path: Path, **limits: object) -> Path:
    text = POLICY.replace("kinds = []", 'kinds = ["logits"]')
    for key, value in limits.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
        text = text.replace(line, f"{key} = {value}")
    path.write_text(text)
    return path


def test_the_range_without_a_tokenizer_holds_what_one_counts(spec: Path, tmp_path: Path) -> None:
    guess = told(check(spec, "--json").stdout)["cost"]
    tokenizer = train_tokenizer(TEXTS * 20, 320)
    tokenizer.save_pretrained(tmp_path / "model")
    found = told(check(spec, "--tokenizer", tmp_path / "model", "--json").stdout)["cost"]
    ids = sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in TEXTS)
    assert (found["positions"], found["exact"]) == ([ids, ids], True)
    assert guess["positions"][0] <= ids <= guess["positions"][1]


def test_no_tokenizer_needs_more_positions_than_the_bound(spec: Path, tmp_path: Path) -> None:
    guess = told(check(spec, "--json").stdout)["cost"]
    train_tokenizer(["a"], 257).save_pretrained(tmp_path / "bytes")
    found = told(check(spec, "--tokenizer", tmp_path / "bytes", "--json").stdout)["cost"]
    assert guess["positions"][1] < found["positions"][1] <= guess["positions_bound"]
    assert f"up to {guess['positions_bound']:,}" in check(spec).stderr + check(spec).stdout
    assert "up to" not in check(spec, "--tokenizer", tmp_path / "bytes").stdout


def test_bytes_grow_with_k_and_shrink_with_the_share_that_is_shipped() -> None:
    def ship(**changes: object) -> int:
        asked = RoundSpec.model_validate(SPEC | {"top_k": 16} | changes)
        [_, most] = cost_of(asked, TEXTS, None).ship_bytes or (0, 0)
        return most

    assert ship(ship_share=0.1) < ship() < ship(top_k=32)
    positions = cost_of(RoundSpec.model_validate(SPEC), TEXTS, None).positions[1]
    # fusion/logit_file.py: 55 bytes a token at K = 16 and 151,936 ids.
    assert ship() / positions == pytest.approx(55, abs=2)


def test_a_policy_that_is_named_is_asked_and_its_limit_is_said(spec: Path, tmp_path: Path) -> None:
    kind = policy_at(tmp_path / "kind.toml")
    assert "allows it by rule 1 (general), approval manual" in check(spec, "--policy", kind).stdout
    tight = policy_at(tmp_path / "tight.toml", positions_per_round=3)
    refused = check(spec, "--policy", kind, "--policy", tight, "--json", status=5)
    said = json.loads(refused.stdout)
    assert said["error"]["code"] == "policy_refused"
    assert "positions_per_round allows 3" in said["error"]["message"]
    assert [verdict["allowed"] for verdict in said["data"]["policies"]] == [True, False]
    wide = write(tmp_path / "wide.yaml", top_k=99)
    assert "top_k is 99, k_max allows 16" in check(wide, "--policy", kind, status=5).stderr


def test_pairs_cost_the_tokens_of_both_answers_and_a_policy_must_name_them(
    spec: Path, tmp_path: Path
) -> None:
    row = {"prompt": "An arrhythmia is", "chosen": " treated early.", "rejected": " seen."}
    other = json.dumps({**row, "prompt": "A stenosis is"})
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n{{\n{other}\n")
    asks = {"kind": "pairs", "method": "preference", "prompts": None, "pairs": "pairs.jsonl"}
    path = write(tmp_path / "pairs.yaml", **asks)
    done = check(path)
    assert "pairs: 4 answers, 42 bytes" in done.stdout
    assert "skipped 1: no JSON (line 2)" in done.stderr
    tokenizer = train_tokenizer(TEXTS * 20, 320)
    tokenizer.save_pretrained(tmp_path / "model")
    kept = [json.dumps(row), other]
    (tmp_path / "pairs.jsonl").write_text("\n".join(kept[:1]))
    assert "leaves none to learn from" in check(path, status=2).stderr
    (tmp_path / "pairs.jsonl").write_text("\n".join(kept))
    cost = told(check(path, "--tokenizer", tmp_path / "model", "--json").stdout)["cost"]
    ids = 2 * sum(len(tokenizer(row[key]).input_ids) + 1 for key in ("chosen", "rejected"))
    assert cost["positions"] == [ids, ids]
    logits = policy_at(tmp_path / "kind.toml")
    assert "no rule allows pairs" in check(path, "--policy", logits, status=5).stderr
    logits.write_text(logits.read_text().replace('["logits"]', '["pairs"]'))
    assert "allows it by rule 1" in check(path, "--policy", logits).stdout


def test_what_the_usual_limits_would_refuse_is_said_unasked(spec: Path, tmp_path: Path) -> None:
    assert "usual limits" not in check(spec).stdout
    wide = check(write(tmp_path / "wide.yaml", top_k=99))
    assert "a policy with the usual limits refuses it: top_k is 99" in wide.stdout


def test_every_fault_has_its_line_and_the_nearest_right_word(spec: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.yaml", method="unifid", trainin={}, training={"steps": 0, "lr": 1})
    words = check(bad, status=2).stderr
    lines = bad.read_text().splitlines()
    for key, says in (
        ("method", "did you mean 'unified'?"),
        ("trainin", "unknown key 'trainin'; did you mean 'training'?"),
        ("  steps", "training.steps: "),
    ):
        line = next(n for n, text in enumerate(lines, 1) if text.startswith(f"{key}:"))
        assert any(says in told for told in words.splitlines() if f"bad.yaml:{line}: " in told)


def test_a_lock_that_nobody_asked_a_coordinator_for_pins_the_files(
    spec: Path, tmp_path: Path
) -> None:
    words = ["round", "lock", str(spec), "--offline"]
    assert CliRunner().invoke(app, words).stdout.strip() == str(tmp_path / "round.lock.yaml")
    first = (tmp_path / "round.lock.yaml").read_bytes()
    CliRunner().invoke(app, words)
    assert (tmp_path / "round.lock.yaml").read_bytes() == first
    check(tmp_path / "round.lock.yaml")
    (tmp_path / "prompts.jsonl").write_text('{"text": "other"}\n')
    assert "wanted" in check(tmp_path / "round.lock.yaml", status=2).stderr
