"""The export proves itself, holds nothing private, and is named on the chain."""

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.compliance import CONTROLS, EXPORTED, egress_csv
from participant.egress import EgressLog, Release, read_records
from tests.participant.settings import write_settings

SECRET = "Patient Zebulon Quartermain"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "st-mary"
    home.mkdir()
    write_settings(home)
    (home / "policy.toml").write_text("version = 2\n", encoding="utf-8")
    (home / "c.jsonl").write_text(json.dumps({"text": SECRET}), encoding="utf-8")
    log = EgressLog(home / "data", "st-mary")
    log.policy(hashlib.sha256((home / "policy.toml").read_bytes()).hexdigest())
    log.append(round_id="rnd-1", what="logits", size_bytes=1000, sha256="0" * 64, rule="allow 1")
    log.refuse(round_id="rnd-2", what="weights", why="no rule allows weights")
    log.close()
    return home


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)])
    return result.exit_code, result.output


def test_an_export_proves_itself(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = run("compliance", "export", home, out, "--json")
    assert code == 0, said
    listed = json.loads(said.splitlines()[-1])["data"]["files"]
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert there == {*listed, "SHA256SUMS"}
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert run("audit", "verify", out / "audit")[0] == 0
    policy = hashlib.sha256((out / "policy.toml").read_bytes()).hexdigest()
    assert policy in (out / "README.md").read_text()
    rows = list(csv.DictReader(io.StringIO((out / "egress.csv").read_text())))
    assert [(row["round"], row["allowed"]) for row in rows] == [
        ("rnd-1", "True"),
        ("rnd-2", "False"),
    ]
    [record] = list(read_records(home / "data", EXPORTED))
    assert record["obj"] == hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()
    assert run("audit", "verify", home)[0] == 0


def test_nothing_private_is_in_it(home: Path, tmp_path: Path) -> None:
    run("compliance", "export", home, tmp_path / "out")
    raw = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert SECRET.encode() not in raw
    assert b"PRIVATE KEY" not in raw


def test_what_cannot_be_exported_is_refused_in_words(home: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for words, says in (
        ((home, tmp_path / "there"), "name another folder"),
        ((tmp_path / "nowhere", tmp_path / "out"), "cannot be read"),
    ):
        code, said = run("compliance", "export", *words)
        assert code == 2
        assert says in said
    assert not (tmp_path / "out").exists()


def test_no_cell_of_the_list_is_a_formula() -> None:
    one = Release(
        seq=1,
        time="t",
        round="=cmd()",
        what="@x",
        size_bytes=1,
        sha256="",
        allowed=True,
        rule="+1",
        approver="-1",
    )
    [row] = list(csv.reader(io.StringIO(egress_csv([one]))))[1:]
    assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_every_file_that_a_control_names_is_in_the_export_or_the_documentation() -> None:
    known = ("audit/", "policy.toml", "egress.csv", "reliability.json of the release")
    for control in CONTROLS:
        for name in control.evidence.split(", "):
            assert name in known or Path(name).exists(), name
