"""What a demo's programs read: texts of the hospitals, public prompts, questions, a first job."""

import json
from collections.abc import Sequence
from pathlib import Path

from cofuse.demo.corpora import Department, departments, general_text, write_department
from cofuse.demo.result import DemoPlan
from protos.public_sets import Prompt, write_prompts


def write_texts(plan: DemoPlan, work: Path) -> None:
    """Private text to each hospital; prompt set, evaluation set and general text to the public."""
    names = [hospital.department for hospital in plan.hospitals]
    found = departments(names, plan.seed, limits=plan.settings.limits, source=plan.source)
    for hospital, department in zip(plan.hospitals, found, strict=True):
        write_department(department, work / "text" / hospital.name)
    public = work / "public"
    public.mkdir()
    write_prompts(public / "prompts.jsonl", _interleaved(found))
    evals = {
        department.name: {
            "documents": department.heldout,
            "questions": [
                {"prompt": q.prompt, "options": q.options, "answer": q.answer}
                for q in department.questions
            ],
        }
        for department in found
    }
    (public / "evals.json").write_text(json.dumps({"domains": evals}), encoding="utf-8")
    general = general_text(plan.seed, plan.settings.general_bytes, source=plan.source)
    write_prompts(public / "general.jsonl", general)


def _interleaved(found: Sequence[Department]) -> list[Prompt]:
    """Public documents of all departments, one of each in turn: no block of one topic."""
    longest = max(len(department.public) for department in found)
    return [
        Prompt(text=department.public[at], domain=department.name)
        for at in range(longest)
        for department in found
        if at < len(department.public)
    ]


def base_job(plan: DemoPlan, work: Path) -> Path:
    """What cofuse.demo.base_pivot is to train, as a file; return its path."""
    job = {
        "general": str(work / "public" / "general.jsonl"),
        "prompts": str(work / "public" / "prompts.jsonl"),
        "model": plan.settings.pivot_model,
        "training": plan.settings.pivot_training,
        "seed": plan.seed,
        "out": str(work / "pivot-0"),
    }
    path = work / "pivot-0.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path
