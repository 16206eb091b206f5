"""A pivot's held-out material as tasks of lm-eval: whoever has the folder can measure again. Pure.

The task files hold names of fields and no templates, so that reading one runs nothing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import yaml

from protos.public_sets import DomainSet, EvalSet

TAG: Final = "cofuse"
"""What all tasks answer to: `--tasks cofuse`."""
RESULTS_FILE: Final = "lm_eval_results.json"
MAX_DOMAINS: Final = 64
"""More have no task files: a pivot's folder holds 512 files at most."""
Kind = Literal["text", "choice"]
METRIC: Final[Mapping[Kind, str]] = {"text": "bits_per_byte", "choice": "acc_mutual_info"}
_OUTPUT: Final[Mapping[Kind, Mapping[str, str]]] = {
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": " ",
    },
}
_VERSION: Final = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """One domain's text, or its questions."""

    name: str
    domain: str
    kind: Kind
    rows: Sequence[Mapping[str, Any]]

    def config(self) -> dict[str, Any]:
        """What lm-eval reads of it."""
        aggregation = "bits_per_byte" if self.kind == "text" else "mean"
        metric = {
            "metric": METRIC[self.kind],
            "aggregation": aggregation,
            "higher_is_better": self.kind == "choice",
        }
        return {
            "task": self.name,
            "tag": TAG,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{self.name}.jsonl"}},
            "test_split": "test",
            **_OUTPUT[self.kind],
            "num_fewshot": 0,
            "metric_list": [metric],
            "metadata": {"version": _VERSION},
        }


def tasks_of(evals: EvalSet, eos: str) -> list[Task]:
    """The tasks of an evaluation set; none when it has more than MAX_DOMAINS domains.

    Args: eos: the token that a document ends in. Questions begin with it, as cofuse asks them.
    """
    if len(evals.domains) > MAX_DOMAINS:
        return []
    found: list[Task] = []
    for domain, slug in zip(evals.domains, _slugs(list(evals.domains)), strict=True):
        material = evals.domains[domain]
        texts = [{"text": text} for text in material.documents if text]
        if texts:
            found.append(Task(f"{TAG}_{slug}_text", domain, "text", texts))
        # lm-eval's own tasks ask with letters; ours would score the options' texts there.
        if (rows := _questions(material, eos)) and not material.lettered:
            found.append(Task(f"{TAG}_{slug}_choice", domain, "choice", rows))
    return found


def task_files(tasks: Sequence[Task]) -> dict[str, str]:
    """Texts of the task files and their data, by file name."""
    files: dict[str, str] = {}
    for task in tasks:
        files[f"{task.name}.yaml"] = yaml.safe_dump(task.config(), sort_keys=False)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in task.rows)
        files[f"{task.name}.jsonl"] = "".join(lines)
    return files


def results(
    tasks: Sequence[Task], scores: Mapping[Kind, Mapping[str, float]], model_args: str
) -> dict[str, Any]:
    """What lm-eval would write about these tasks, from our own measurement.

    Args: scores: by kind and domain.
    """
    rows = {task.name: _row(task, scores[task.kind][task.domain]) for task in tasks}
    counts = {task.name: len(task.rows) for task in tasks}
    return {
        "results": rows,
        "group_subtasks": {},
        "configs": {task.name: task.config() for task in tasks},
        "versions": {task.name: _VERSION for task in tasks},
        "n-shot": {task.name: 0 for task in tasks},
        "higher_is_better": {t.name: {METRIC[t.kind]: t.kind == "choice"} for t in tasks},
        "n-samples": {name: {"original": n, "effective": n} for name, n in counts.items()},
        "config": {"model": "hf", "model_args": model_args},
    }


def _row(task: Task, value: float) -> dict[str, Any]:
    """A task's line: the standard error of a share is of a sample; bits per byte have none."""
    metric, n = METRIC[task.kind], len(task.rows)
    known = task.kind == "choice" and n > 1
    error = math.sqrt(value * (1 - value) / (n - 1)) if known else "N/A"
    return {"alias": task.name, f"{metric},none": value, f"{metric}_stderr,none": error}


def _questions(material: DomainSet, eos: str) -> list[dict[str, Any]]:
    return [
        {"prompt": eos + q.prompt, "options": list(q.options), "answer": q.answer}
        for q in material.questions
    ]


def _slugs(domains: Sequence[str]) -> list[str]:
    """Names for files, one each."""
    taken: list[str] = []
    for domain in domains:
        plain = re.sub(r"[^a-z0-9]+", "_", domain.lower()).strip("_")
        slug, number = plain, 2
        while slug in taken:
            slug, number = f"{plain}_{number}", number + 1
        taken.append(slug)
    return taken
