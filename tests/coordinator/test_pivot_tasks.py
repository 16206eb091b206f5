"""Held-out material as tasks: nothing is left out, nothing runs, each has its own name."""

import json

import pytest
import yaml

from coordinator.pivot_tasks import MAX_DOMAINS, results, task_files, tasks_of
from protos.public_sets import EvalSet
from trust.model_config import check_file_name, check_plain_yaml

QUESTION = {"prompt": "Is {{x}}", "options": ["yes", "{% no %}"], "answer": 1}
EVALS = EvalSet.model_validate(
    {
        "domains": {
            "A b": {"documents": ["one", "", "caf\u00e9"], "questions": [QUESTION]},
            "a_b": {"documents": ["two"]},
        }
    }
)


def test_every_text_and_question_is_in_a_file_of_its_own_domain() -> None:
    tasks = tasks_of(EVALS, "<eos>")
    assert [(task.name, task.domain) for task in tasks] == [
        ("cofuse_a_b_text", "A b"), ("cofuse_a_b_choice", "A b"), ("cofuse_a_b_2_text", "a_b"),
    ]  # fmt: skip
    files = task_files(tasks)
    texts = [json.loads(line) for line in files["cofuse_a_b_text.jsonl"].splitlines()]
    assert texts == [{"text": "one"}, {"text": "caf\u00e9"}]  # an empty text has no bytes
    asked = json.loads(files["cofuse_a_b_choice.jsonl"])
    assert asked == {**QUESTION, "prompt": "<eos>Is {{x}}"}
    for name, text in files.items():
        check_file_name(name)
        if name.endswith(".yaml"):
            check_plain_yaml(name, text.encode())
            config = yaml.safe_load(text)
            assert config["dataset_kwargs"]["data_files"]["test"] == f"{config['task']}.jsonl"


def test_results_are_what_lm_eval_would_write() -> None:
    tasks = tasks_of(EVALS, "")
    scores = {"text": {"A b": 1.5, "a_b": 2.5}, "choice": {"A b": 1.0}}
    found = results(tasks, scores, "pretrained=.")
    assert found["results"]["cofuse_a_b_2_text"]["bits_per_byte,none"] == 2.5
    assert found["results"]["cofuse_a_b_choice"]["acc_mutual_info,none"] == 1.0
    assert found["n-samples"]["cofuse_a_b_text"] == {"original": 2, "effective": 2}
    assert found["higher_is_better"]["cofuse_a_b_text"] == {"bits_per_byte": False}


def test_more_domains_than_a_folder_has_room_for_have_no_tasks() -> None:
    domains = {f"d{n}": {"documents": ["x"]} for n in range(MAX_DOMAINS + 1)}
    assert tasks_of(EvalSet.model_validate({"domains": domains}), "") == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_share_of_one_question_has_no_error(count: int) -> None:
    asked = {"documents": ["x"], "questions": [QUESTION] * count}
    tasks = tasks_of(EvalSet.model_validate({"domains": {"x": asked}}), "")
    row = results(tasks, {"text": {"x": 1.0}, "choice": {"x": 0.5}}, "")["results"]
    wanted = "N/A" if count == 1 else 0.5
    assert row["cofuse_x_choice"]["acc_mutual_info_stderr,none"] == wanted
