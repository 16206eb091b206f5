"""The walls between the participant's processes, tried for real."""

from pathlib import Path

import pytest

from participant.checkup import attempts_of, check, record
from participant.config import ParticipantConfig, load_config
from participant.egress import CHECKED, read_records
from tests.participant.settings import write_settings
from trust.landlock import SCOPE_ABI, abi


def config_at(home: Path, corpus: Path) -> ParticipantConfig:
    home.mkdir(exist_ok=True)
    corpus.parent.mkdir(parents=True, exist_ok=True)
    for path in (corpus, home / "policy.toml", home / "key.pem"):
        path.write_text("", encoding="utf-8")
    return load_config(write_settings(home, corpus=str(corpus)))


@pytest.mark.skipif(abi() < SCOPE_ABI, reason="this kernel's Landlock is older than Linux 6.12")
def test_every_wall_holds_and_a_corpus_in_the_couriers_own_folder_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Python looks for code there: the courier must not see the rest
    config = config_at(tmp_path / "p", tmp_path / "p" / "data" / "inbox" / "corpus.jsonl")
    found = check(tmp_path / "p" / "participant.toml", config)
    no_namespace = any("namespace" in words for words in found.missing)
    open_here = {(one.role, one.says) for one in found.findings if one.verdict != "held"}
    wrong = {("courier", "reads the corpus"), ("courier", "changes the corpus")}
    udp = {(role, "reaches another program by UDP") for role in ("trainer", "guard")}
    assert open_here == (wrong | udp if no_namespace else wrong)
    assert {(one.role, one.says) for one in found.broken} == wrong
    record(config, found)
    (line,) = read_records(config.data_dir, CHECKED)
    assert line["res"] == "deny"
    assert line["data"]["broken"] == ["courier reads the corpus", "courier changes the corpus"]


def test_nothing_is_tried_on_what_is_not_there(tmp_path: Path) -> None:
    """To be stopped by its absence would prove nothing."""
    config = config_at(tmp_path / "p", tmp_path / "corpus.jsonl")
    says = [one.says for one in attempts_of("courier", config, 1, "x")]
    assert "reads the corpus" in says
    assert "reads the expert" not in says
