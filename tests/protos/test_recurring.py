"""A recurring spec is read strictly, and says where it is wrong."""

from pathlib import Path

import pytest

from protos.recurring import load_recurring, parse_recurring
from protos.spec import SpecError

TEXT = """\
name: weekly
every: "0 2 * * sun"
timezone: Europe/Paris
newer_experts: 2
round:
  name: fuse
  pivot: pivot-0
  participants: [ada, bob, cyd]
  kind: logits
  method: unified
  prompts: sha256:{digest}
  training: {{steps: 10, lr: 0.001}}
""".format(digest="0" * 64)


def test_a_spec_reads_the_same_from_yaml_and_from_json(tmp_path: Path) -> None:
    path = tmp_path / "weekly.yaml"
    path.write_text(TEXT)
    spec = load_recurring(path)
    assert parse_recurring(spec.model_dump_json()) == spec
    assert spec.round.participants == ("ada", "bob", "cyd")


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("newer_e", "newr_e", "unknown key 'newr_experts'; did you mean 'newer_experts'"),
        ("0 2 * * sun", "sundays", "recurring.yaml:2: every: wanted five fields"),
        ("0 2 * * sun", "0 2 31 2 *", "wanted five fields"),  # a day that never comes
        ("0 2 * * sun", "R R * * *", "wanted five fields"),  # croniter's own: drawn at random
        ("0 2 * * sun", "* * * * * *", "wanted five fields"),
        ("Europe/Paris", "Europe/Atlantis", "recurring.yaml:3: timezone: wanted a name"),
        ("Europe/Paris", "../../etc/passwd", "timezone: wanted a name"),
        ("newer_experts: 2", "newer_experts: 4", "4 is more than the 3 participants"),
        ("steps: 10", "steps: 10, stps: 9", "recurring.yaml:12: unknown key 'round.training.stps'"),
        ("  method: unified\n", "", "round.method: Field required"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    tmp_path: Path, good: str, bad: str, says: str
) -> None:
    path = tmp_path / "recurring.yaml"
    path.write_text(TEXT.replace(good, bad, 1))
    with pytest.raises(SpecError) as caught:
        load_recurring(path)
    assert says in str(caught.value)


def test_the_example_is_a_valid_one() -> None:
    examples = Path(__file__).parents[2] / "examples"
    assert load_recurring(examples / "recurring-weekly.yaml").newer_experts == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", TEXT.replace("sha256:", "")])
def test_bad_json_is_refused_in_words(text: str) -> None:
    with pytest.raises(SpecError):
        parse_recurring(text)


def test_a_file_that_is_not_pinned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weekly.yaml"
    path.write_text(TEXT.replace("sha256:" + "0" * 64, "prompts.jsonl"))
    with pytest.raises(SpecError, match=r"prompts: found 'prompts\.jsonl', wanted"):
        parse_recurring(load_recurring(path).model_dump_json())
